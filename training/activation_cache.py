"""Queries and keys of a data set, kept so that stage 1 can step over it many times without the backbone.

One dense pass for each document stores what stage 1 reads, for retrieval heads only: queries at a pool of sampled rows
and all keys of the KV heads that serve them, before and after RoPE. In memory, or one safetensors file a document in a
folder, which an interrupted run takes up again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .row_sampling import Rows, RowSampler, document_key, token_span
from .stage1 import LayerRows

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_TENSORS = ("query", "query_pre", "key", "key_pre")
_PLACES = ("slots", "row_positions", "positions")


@dataclass(frozen=True)
class CachedDocument:
    """One document: its `key`, the slots of its pool (`text` rows, then `needle` rows), and its layers `[1, ...]`."""

    key: int
    text: torch.Tensor
    needle: torch.Tensor
    layers: dict[int, LayerRows]

    def rows(self, chosen: torch.Tensor, device: torch.device) -> dict[int, LayerRows]:
        """The layers reduced to the rows at the given places of the pool, on a device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        reduced = {}
        for layer, data in self.layers.items():
            reduced[layer] = LayerRows(
                data.plan,
                move(data.query[:, :, chosen]),
                move(data.query_pre[:, :, chosen]),
                move(data.key),
                move(data.key_pre),
                move(data.slots[:, chosen]),
                move(data.row_positions[:, chosen]),
                move(data.positions),
                None if data.start is None else move(data.start),
                data.scale,
                data.softcap,
            )
        return reduced


class ActivationCache(Dataset):
    """A data set whose items are `{"cache_index": i}`; `document(i)` holds the activations.

    Args:
        model: the wrapped model, with its retrieval heads.
        dataset: items with `input_ids` `[L]`, and optionally `attention_mask` `[L]` and `needle_rows` (-1: none).
        sampler: which rows go into the pool.
        step: what the pool is drawn for (`CACHE_STEP`, `EVALUATION_STEP`).
        dtype: of the stored vectors; None: the model's own, which makes a cached step equal an uncached one.
        folder: keep the documents in files there; None: in memory.
        part: `(rank, world size)`: this process computes its share of the files; needs `folder`.

    Raises:
        ValueError: an empty data set, or a folder that was filled with other data, heads, rows or another model.
    """

    def __init__(
        self,
        model: RTPurboForCausalLM,
        dataset: Any,
        *,
        sampler: RowSampler,
        step: int,
        dtype: torch.dtype | None = None,
        folder: str | Path | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("an empty data set cannot be cached")
        if part[1] > 1 and folder is None:
            raise ValueError("several processes share an activation cache through a folder: give activation_cache_dir")
        self.model, self.dataset, self.sampler, self.step, self.dtype = model, dataset, sampler, step, dtype
        self.folder = None if folder is None else Path(folder)
        self.size = len(dataset)
        self._plans = {m.layer_idx: m.rtpurbo.plans["sparse"] for m in model.converted()}
        self._documents: dict[int, CachedDocument] = {}
        if self.folder is not None:
            self._claim()
        self._fill(range(part[0], self.size, part[1]))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"cache_index": torch.tensor(index)}

    def document(self, index: int) -> CachedDocument:
        """The activations of one document, from memory or from its file."""
        return self._documents[index] if self.folder is None else self._read(index)

    def nbytes(self) -> int:
        """Bytes of all stored vectors in memory, or of all files."""
        if self.folder is not None:
            return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        layers = [layer for d in self._documents.values() for layer in d.layers.values()]
        return sum(getattr(layer, name).nbytes for layer in layers for name in _TENSORS)

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:06d}.safetensors"

    def _claim(self) -> None:
        assert self.folder is not None
        digest = hashlib.sha256()
        for item in self._items(range(self.size)):
            digest.update(str(document_key(torch.as_tensor(item["input_ids"]))).encode() + b",")
        record = {
            "model": self.model.config.base_model_name_or_path,
            "revision": self.model.config.base_model_revision,
            "retrieval_heads": self.model.config.retrieval_heads,
            "documents": digest.hexdigest(),
            "rows": [self.sampler.count, self.sampler.needle_count, self.sampler.first_row, self.sampler.seed],
            "step": self.step,
            "dtype": str(self.dtype or self.model.dtype),
        }
        manifest = self.folder / _MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        if manifest.exists():
            known = json.loads(manifest.read_text(encoding="utf-8"))
            different = sorted(k for k in record if known.get(k) != record[k])
            if different:
                raise ValueError(
                    f"{self.folder} holds activations with another {', '.join(different)}: remove it, or choose "
                    "another activation_cache_dir"
                )
            return
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        temporary.replace(manifest)

    def _items(self, indices: Iterable[int]) -> Iterable[dict[str, Any]]:
        return (self.dataset[i] for i in indices)

    def _fill(self, indices: range) -> None:
        missing = [i for i in indices if self.folder is None or not self._file(i).exists()]
        for index in tqdm(missing, desc="activations", unit="doc", disable=not missing):
            document = self._compute(self.dataset[index])
            if self.folder is None:
                self._documents[index] = document
            else:
                self._write(index, document)
        if missing:
            logger.info("%d documents, %.2f GiB of activations", len(missing), self.nbytes() / 2**30)

    @torch.no_grad()
    def _compute(self, item: dict[str, Any]) -> CachedDocument:
        ids = torch.as_tensor(item["input_ids"]).long()
        mask = item.get("attention_mask")
        mask = None if mask is None else torch.as_tensor(mask)
        key = document_key(ids)
        text = self.sampler.text_rows(*token_span(mask, ids.numel()))
        needle = torch.as_tensor(item.get("needle_rows", ())).long()
        needle = needle[needle >= 0]
        chosen, is_needle = self.sampler.draw(text, needle, step=self.step, key=key)
        pool = torch.cat([text, needle])[chosen]
        device = self.model.device
        layers: dict[int, LayerRows] = {}
        observer = self._keep(layers, Rows(pool[None], is_needle[None]).to(device).slots)
        with self.model.attention_mode("dense"):
            self.model(
                ids[None].to(device),
                attention_mask=None if mask is None else mask[None].to(device),
                observer=observer,
                use_cache=False,
                logits_to_keep=1,
            )
        return CachedDocument(key, pool[~is_needle], pool[is_needle], layers)

    def _keep(self, layers: dict[int, LayerRows], slots: torch.Tensor) -> Callable[[AttentionInputs], None]:
        def observe(inputs: AttentionInputs) -> None:
            if not inputs.plan.retrieval:
                return
            taken = LayerRows.take(inputs, slots)
            tensors: dict[str, Any] = {
                name: getattr(taken, name).to("cpu", self.dtype or taken.key.dtype).detach() for name in _TENSORS
            }
            for name in (*_PLACES, "start"):
                value = getattr(taken, name)
                tensors[name] = None if value is None else value.cpu()
            layers[inputs.layer_idx] = replace(taken, **tensors)

        return observe

    def _write(self, index: int, document: CachedDocument) -> None:
        tensors = {"text": document.text, "needle": document.needle, "key": torch.tensor(document.key)}
        constants = {}
        for layer, data in document.layers.items():
            constants[str(layer)] = [data.scale, data.softcap]
            for name in (*_TENSORS, *_PLACES, "start"):
                if getattr(data, name) is not None:
                    # layers share some of these, which safetensors does not take
                    tensors[f"{layer}.{name}"] = getattr(data, name).clone(memory_format=torch.contiguous_format)
        file = self._file(index)
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt", "constants": json.dumps(constants)})
        temporary.replace(file)

    def _read(self, index: int) -> CachedDocument:
        path = self._file(index)
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                constants = json.loads(file.metadata()["constants"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it, and it is computed again") from error
        layers = {}
        for layer, (scale, softcap) in constants.items():
            own: dict[str, Any] = {name: tensors[f"{layer}.{name}"] for name in (*_TENSORS, *_PLACES)}
            layers[int(layer)] = LayerRows(
                plan=self._plans[int(layer)],
                start=tensors.get(f"{layer}.start"),
                scale=scale,
                softcap=softcap,
                **own,
            )
        return CachedDocument(int(tensors["key"]), tensors["text"], tensors["needle"], layers)


def cache_nbytes(model: RTPurboForCausalLM, documents: int, length: int, rows: int, itemsize: int) -> int:
    """Bytes that the activations of so many documents of a length take, with `rows` pooled rows in each."""
    total = 0
    for module in model.converted():
        plan = module.rtpurbo.plans["sparse"]
        if plan.retrieval:
            width = module.indexer.q_proj.shape[2]
            total += 2 * width * itemsize * (len(plan.full_kv) * length + len(plan.retrieval) * rows)
    return documents * total
