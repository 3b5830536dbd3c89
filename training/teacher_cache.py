"""The teacher of stage 2 on disk: the dense model's top logits at the rows that are learnt from (PAPER section 6).

A folder of safetensors shards and an `index.json`. Shard files appear whole or not at all, so that an interrupted run
goes on at the first missing one; the index names model, tokenizer and data, and another one's cache is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .packing import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
LABEL_ROWS = 300
TOP_K = 10
_SHARD_BLOCKS = 32
_SAMPLES = 256
# what must agree when a cache is used; when one is continued, the precision as well
_IDENTITY = ("model", "revision", "weights_sha256", "tokenizer_sha256", "data_sha256", "k")
_PRECISION = ("dtype", "autocast", "shard_blocks")


def label_rows(blocks: TokenBlocks, *, last: int = LABEL_ROWS) -> torch.Tensor:
    """Rows whose next token is a label: int64 `[N, R]`, ascending, padded with -1.

    Conversations: rows that predict an assistant's token. Plain text: the `last` rows of a block (the very last one,
    which predicts nothing, left out), and the rows that predict a needle's answer; also where it stands among
    conversations.

    Raises:
        ValueError: `last` below 1.
    """
    if last < 1:
        raise ValueError(f"at least 1 label row is needed in a block of plain text, got {last}")
    count, length = blocks.input_ids.shape
    labelled = torch.zeros(count, length, dtype=torch.bool)
    if blocks.label_mask is not None:
        labelled[:, :-1] = blocks.label_mask[:, 1:]
    # among conversations, too, there may be plain text
    plain = ~labelled.any(1)
    labelled[plain, max(length - 1 - last, 0) : length - 1] = True
    block, place = torch.nonzero(blocks.needle_rows >= 0, as_tuple=True)
    labelled[block, blocks.needle_rows[block, place]] = True
    rows = [torch.nonzero(mask)[:, 0] for mask in labelled]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of vocabulary, special tokens and chat template."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@torch.no_grad()
def weights_sha256(model: RTPurboForCausalLM) -> str:
    """SHA-256 of the backbone's tensor names and shapes, and of 256 values of each, rounded to 16 bits."""
    digest = hashlib.sha256()
    for name, tensor in model.model.named_parameters():
        if ".indexer." in name:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(flat.numel() // _SAMPLES, 1)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _identity(
    model: RTPurboForCausalLM, tokenizer: PreTrainedTokenizerBase, blocks: TokenBlocks, rows: torch.Tensor, k: int
) -> dict[str, Any]:
    config = model.config
    name = config.base_model_name_or_path or model.name_or_path
    data = hashlib.sha256(blocks.sha256().encode() + rows.numpy().tobytes()).hexdigest()
    return {
        # a folder's place says nothing about what is in it
        "model": Path(name).name if name and Path(name).is_dir() else name,
        "revision": config.base_model_revision,
        "weights_sha256": weights_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "data_sha256": data,
        "k": k,
    }


class TeacherCache(Dataset):
    """A distillation set: token blocks with the teacher's top logits at their label rows.

    Items: `input_ids` int64 `[L]`, `label_rows` int64 `[R]` (-1: none), `teacher_ids` int64 `[R, k]`, `teacher_logits`
    fp32 `[R, k]` (zeros at rows that are none), `block` (its place in the set).

    Args:
        folder: what `cache_teacher` filled.
        model, tokenizer, blocks: what it has to be of.
        rows: `label_rows` of the blocks.
        k: logits of a row.

    Raises:
        ValueError: no cache there, an incomplete one, or one of another model, tokenizer or data; names the field.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: RTPurboForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        blocks: TokenBlocks,
        rows: torch.Tensor,
        k: int = TOP_K,
    ) -> None:
        self.folder, self.blocks, self.rows, self.k = Path(folder), blocks, rows, k
        self.index = _read_index(self.folder)
        _compare(self.folder, self.index, _identity(model, tokenizer, blocks, rows, k), _IDENTITY)
        for shard in self.index["shards"]:
            if not (self.folder / shard["file"]).is_file():
                raise ValueError(
                    f"{self.folder} lacks {shard['file']}: run `rtpurbo cache-teacher` again to complete it"
                )
        counts = (rows >= 0).sum(1)
        self._first = (counts.cumsum(0) - counts).tolist()
        self._counts = counts.tolist()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = self.index["shard_blocks"]
        shard, count = index // size, self._counts[index]
        first = self._first[index] - self._first[shard * size]
        path = self.folder / self.index["shards"][shard]["file"]
        ids = torch.zeros(self.rows.shape[1], self.k, dtype=torch.int64)
        logits = torch.zeros(self.rows.shape[1], self.k)
        try:
            with safe_open(path, framework="pt") as file:
                ids[:count] = file.get_slice("ids")[first : first + count].long()
                logits[:count] = file.get_slice("logits")[first : first + count]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and run `rtpurbo cache-teacher`") from error
        return {
            "input_ids": self.blocks.input_ids[index].long(),
            "label_rows": self.rows[index],
            "teacher_ids": ids,
            "teacher_logits": logits,
            "block": torch.tensor(index),
        }


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {INDEX_FILE}: it is not a teacher cache")
    return json.loads(path.read_text(encoding="utf-8"))


def _compare(folder: Path, index: dict[str, Any], expected: dict[str, Any], fields: tuple[str, ...]) -> None:
    for field in fields:
        if index.get(field) != expected[field]:
            raise ValueError(
                f"{folder} is the cache of another teacher: {field} is {index.get(field)!r} there and "
                f"{expected[field]!r} here; choose another folder, or remove it"
            )


def cache_teacher(
    model: RTPurboForCausalLM,
    blocks: TokenBlocks,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rows: torch.Tensor | None = None,
    k: int = TOP_K,
    autocast: torch.dtype | None = None,
    shard_blocks: int = _SHARD_BLOCKS,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Run the dense model over the blocks and keep its top logits at the label rows; goes on after an interruption.

    Args:
        model: the wrapped model; its own dense attention is the teacher.
        blocks: the distillation set.
        folder: for the shards and their index.
        tokenizer: the model's tokenizer; recorded.
        rows: `label_rows`; None: those of the defaults.
        k: logits kept of a row.
        autocast: run the model under autocast to this dtype.
        shard_blocks: blocks of a shard file.
        part: `(rank, world size)`: this process writes every world-size-th shard.
        progress: show a bar.

    Raises:
        ValueError: `k` or `shard_blocks` below 1, a folder with another cache (names the field), or with other files.
    """
    rows = label_rows(blocks) if rows is None else rows
    if k < 1 or shard_blocks < 1:
        raise ValueError(f"k and shard_blocks must be at least 1, got {k} and {shard_blocks}")
    target = Path(folder)
    names = [f"teacher-{i:05d}.safetensors" for i in range(-(-len(blocks) // shard_blocks))]
    counts = (rows >= 0).sum(1).split(shard_blocks)
    record = {
        **_identity(model, tokenizer, blocks, rows, k),
        "dtype": str(model.dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "shard_blocks": shard_blocks,
        "shards": [{"file": name, "rows": int(count.sum())} for name, count in zip(names, counts, strict=True)],
    }
    if (target / INDEX_FILE).exists():
        _compare(target, _read_index(target), record, (*_IDENTITY, *_PRECISION))
    else:
        # what other processes of this run write at the same time begins with a dot, or so
        if target.exists() and any(not p.name.startswith((".", "teacher-", INDEX_FILE)) for p in target.iterdir()):
            raise ValueError(f"{target} is not empty and holds no teacher cache: choose another folder")
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / f".{INDEX_FILE}.{part[0]}.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target / INDEX_FILE)
    missing = [i for i in range(part[0], len(names), part[1]) if not (target / names[i]).exists()]
    if len(missing) < len(range(part[0], len(names), part[1])):
        logger.info("%s: going on, %d shards are missing", target, len(missing))
    training = model.training
    model.eval()
    bar = tqdm(total=sum(counts[i].numel() for i in missing), desc="teacher", disable=not progress)
    try:
        for shard in missing:
            places = range(shard * shard_blocks, min((shard + 1) * shard_blocks, len(blocks)))
            found = list(_top_logits(model, blocks, rows, places, k, autocast, bar))
            tensors = {"ids": torch.cat([ids for ids, _ in found]), "logits": torch.cat([top for _, top in found])}
            temporary = target / f".{names[shard]}.tmp"
            save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.replace(target / names[shard])
    finally:
        bar.close()
        model.train(training)


@torch.no_grad()
def _top_logits(model, blocks, rows, places, k, autocast, bar) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per block: int32 ids and fp32 logits `[rows of the block, k]`."""
    device = model.device
    for i in places:
        kept = rows[i][rows[i] >= 0].to(device)
        with model.attention_mode("dense"), torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(blocks.input_ids[i].long()[None].to(device), use_cache=False, logits_to_keep=kept).logits[0]
        top = logits.float().topk(k, -1)
        yield top.indices.int().cpu(), top.values.cpu()
        bar.update()
