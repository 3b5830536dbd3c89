"""`rtpurbo bench training`: what a training step costs, next to the dense model's own work.

Stage 1 on a randomly initialised model of Qwen3-8B's shape, every query row, one document a step: the time of a whole
step (forward, loss, gradients, optimiser) against one dense forward of the same base with SDPA, and the peak memory.
The loss kernels are checked in the same run, on a layer's own activations. A further case is a function from a preset
to rows, with a line in `CASES`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from ..kernels.indexer_kl import indexer_kl, indexer_kl_reference
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from ..training.indexer_arguments import IndexerTrainingArguments
from ..training.indexer_init import initialise_indexers
from ..training.indexer_trainer import IndexerTrainer, collate_documents
from ..training.stage1 import LayerRows
from .harness import Row, checked, environment, measure, relative_error, table, write

logger = logging.getLogger(__name__)

LENGTHS = {"quick": (8192, 16_384), "paper": (8192, 16_384, 32_768, 65_536)}
COLUMNS = ("geometry", "peer", "step_over_forward", "gib", "check", "checked_error")
RATIO, TOLERANCE, CHECKED_ROWS = 0.15, 1e-3, 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model."""

    layers: int = 36
    hidden: int = 4096
    intermediate: int = 12_288
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.kv_heads}/{self.head_dim} x {self.layers}"

    def base(self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """A frozen model of this shape with seeded random weights, made on the device; attention is SDPA."""
        config = Qwen3Config(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=131_072,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.eval().requires_grad_(False)

    def retrieval_heads(self, ratio: float) -> list[list[int]]:
        """Per layer, its retrieval heads: `ratio` of all heads, drawn unevenly over layers by a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(self.layers, 1, generator=generator).pow(2).expand(-1, self.query_heads).flatten()
        count = max(1, round(ratio * weight.numel()))
        drawn = torch.multinomial(weight, count, generator=generator).tolist()
        return [sorted(i % self.query_heads for i in drawn if i // self.query_heads == k) for k in range(self.layers)]


QWEN3_8B = Shape()


class Stage1Step:
    """A step over every row of one document, as the trainer takes it, with its own optimiser."""

    def __init__(self, model: RTPurboForCausalLM, folder: str):
        device = model.device
        args = IndexerTrainingArguments(
            output_dir=folder, rows_per_document=-1, cached_rows_per_document=-1, use_cpu=device.type == "cpu"
        )
        self.trainer = IndexerTrainer(model, args)
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of token ids `[L]`, after a step on it."""
        batch = {name: value.to(self.model.device) for name, value in collate_documents([{"input_ids": ids}]).items()}
        loss = self.trainer.compute_loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def loss_error(model: RTPurboForCausalLM, ids: torch.Tensor) -> float:
    """Worst relative error of loss and gradients against the fp32 reference, on the first layer with an indexer.

    The operation gets every row, as in a step; all but some rows weigh nothing, and those the reference repeats.
    """
    layer, indexer = min(model.indexers().items())
    length, device = ids.numel(), model.device
    slots = torch.arange(length, device=device)[None]
    taken: list[LayerRows] = []

    def observe(inputs: AttentionInputs) -> None:
        if inputs.layer_idx == layer:
            taken.append(LayerRows.take(inputs, slots))

    with torch.no_grad(), model.attention_mode("dense"):
        model(ids[None].to(device), observer=observe, use_cache=False, logits_to_keep=1)
    data = taken[0]
    rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length), device=device).long()
    weight = torch.zeros(1, length, device=device)
    weight[:, rows] = 1 / rows.numel()
    with torch.no_grad():
        vectors = data.index(indexer)
    heads, kv_heads, index_heads = data.head_rows

    def result(function: Callable[..., torch.Tensor], chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        index_query, index_key = (x.clone().requires_grad_() for x in (vectors[0][:, :, chosen], vectors[1]))
        loss = function(
            data.query[:, :, chosen],
            data.key,
            index_query,
            index_key,
            heads=heads,
            kv_heads=kv_heads,
            index_heads=index_heads,
            q_slots=slots[:, chosen],
            scale=data.scale,
            softcap=data.softcap,
            row_weight=weight[:, chosen],
        )
        return loss.detach(), *torch.autograd.grad(loss.sum(), (index_query, index_key))

    loss, grad_query, grad_key = result(indexer_kl, slots[0])
    expected = result(indexer_kl_reference, rows)
    spread = torch.zeros_like(grad_query)
    spread[:, :, rows] = expected[1]
    wanted = (expected[0], spread, expected[2])
    return max(relative_error(out, right) for out, right in zip((loss, grad_query, grad_key), wanted, strict=True))


def _documents(lengths: Sequence[int], vocabulary: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {length: torch.randint(vocabulary, (length,), generator=generator) for length in lengths}


def stage1_rows(preset: str, *, shape: Shape = QWEN3_8B, ratio: float = RATIO) -> list[Row]:
    """`stage1_step_vs_dense_forward` and `stage1_peak_gib` at each length of the preset; needs a CUDA device."""
    documents = _documents(LENGTHS[preset], shape.vocabulary)
    base = shape.base()

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> None:
        base.base_model(ids, use_cache=False)

    # before the base is wrapped, which changes its attention; no logits on either side
    peers = {
        length: measure(partial(forward, ids[None].to(base.device)), warmup=1, repeats=5, budget_ms=4000)
        for length, ids in tqdm(documents.items(), desc="dense forward", unit="length")
    }
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=shape.retrieval_heads(ratio))
    initialise_indexers(model, method="random")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        step = Stage1Step(model, folder)
        for length, ids in tqdm(documents.items(), desc="stage 1", unit="length"):
            torch.cuda.empty_cache()
            error = loss_error(model, ids)
            torch.cuda.reset_peak_memory_stats()
            finite = math.isfinite(step(ids).item())
            peak = torch.cuda.max_memory_allocated() / 2**30
            timing = measure(partial(step, ids), warmup=0, repeats=5, budget_ms=6000)
            verdict = checked(error if finite else math.inf, TOLERANCE)
            common: dict[str, Any] = {
                "geometry": str(shape),
                "retrieval_heads": sum(map(len, model.config.retrieval_heads)),
                "query_rows": length,
                **verdict,
            }
            # a wrong result has no figure
            good = verdict["check"] == "ok"
            times = {
                "peer": "one dense forward of the base, SDPA, no logits",
                "step_over_forward": timing.median_ms / peers[length].median_ms if good else None,
                "low_ms": timing.low_ms,
                "high_ms": timing.high_ms,
                "peer_low_ms": peers[length].low_ms,
                "peer_high_ms": peers[length].high_ms,
            }
            rows += [
                Row("stage1_step_vs_dense_forward", length, ratio, timing.median_ms, peers[length].median_ms,
                    extra=common | (times if good else {})),
                Row("stage1_peak_gib", length, ratio, timing.median_ms, extra=common | {"gib": peak if good else None}),
            ]  # fmt: skip
            logger.info("stage 1 at %d tokens: check %s (%.1e)", length, verdict["check"], error)
    return rows


CASES: dict[str, Callable[[str], list[Row]]] = {"stage1": stage1_rows}


def run_training_benchmarks(
    preset: str, output: str | Path, only: str | None = None, *, name: str = "training"
) -> list[Row]:
    """Run, check and store the training benchmarks; needs a CUDA device with 80 GB.

    Args:
        preset: `"quick"` (8K and 16K tokens) or `"paper"` (8K to 64K).
        output: folder for `name`.json, .csv and .png.
        only: one of `CASES`; None: all.

    Raises:
        ValueError: unknown preset or case.
        RuntimeError: no CUDA device.
    """
    if preset not in LENGTHS:
        raise ValueError(f"preset must be one of {tuple(LENGTHS)}, got {preset!r}")
    if only is not None and only not in CASES:
        raise ValueError(f"only must be one of {tuple(CASES)} or None, got {only!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("the training benchmarks need a CUDA device")
    rows: list[Row] = []
    for case, run in CASES.items():
        if only in (None, case):
            rows += run(preset)
            torch.cuda.empty_cache()
    write(rows, Path(output) / name, meta=environment() | {"preset": preset})
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    return table(rows, extra=COLUMNS)
