"""`rtpurbo bench training`: what a training step costs, next to the dense model's own work.

Stage 1 on a randomly initialised model of Qwen3-8B's shape, every query row, one document a step: the time of a whole
step (forward, loss, gradients, optimiser) against one dense forward of the same base with SDPA, and the peak memory.
The loss kernels are checked in the same run, on a layer's own activations.

Stage 2 on a few layers of that shape, a LoRA on the attention projections, gradient checkpointing, one document a step:
a whole step against the same step (loss, rows, LoRA, checkpointing, optimiser) of the untouched base with SDPA. The
gradients of sink + window attention are checked in the same run. A further case is a function from a preset to rows,
with a line in `CASES`.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from ..kernels.indexer_kl import indexer_kl, indexer_kl_reference
from ..kernels.sink_window import sink_window_attention
from ..kernels.window_gradient import window_gradient_tiled
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from ..training.distillation import SelfDistillationTrainer, collate_labelled, distillation_kl
from ..training.distillation_arguments import SelfDistillationArguments
from ..training.indexer_arguments import IndexerTrainingArguments
from ..training.indexer_init import initialise_indexers
from ..training.indexer_trainer import IndexerTrainer, collate_documents
from ..training.stage1 import LayerRows
from .harness import Row, checked, environment, measure, relative_error, table, write

logger = logging.getLogger(__name__)

LENGTHS = {"quick": (8192, 16_384), "paper": (8192, 16_384, 32_768, 65_536)}
COLUMNS = ("geometry", "peer", "step_over_forward", "step_over_dense_step", "gib", "check", "checked_error")
RATIO, TOLERANCE, CHECKED_ROWS = 0.15, 1e-3, 64
# bf16 weights and slopes inside the gradient kernels
STAGE2_TOLERANCE, LABEL_ROWS, TOP_K, LORA_RANK, STAGE2_LAYERS = 1e-2, 300, 10, 16, 4


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


def labelled(ids: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """A stage-2 item: token ids `[L]`, its last rows labelled, with a teacher drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    count = min(LABEL_ROWS, ids.numel() // 2)
    return {
        "input_ids": ids,
        "label_rows": torch.arange(ids.numel() - 1 - count, ids.numel() - 1),
        "teacher_ids": torch.randint(vocabulary, (count, TOP_K), generator=generator),
        "teacher_logits": torch.randn(count, TOP_K, generator=generator),
        "block": torch.tensor(0),
    }


class Stage2Step:
    """A step over one labelled document through a LoRA, as the trainer takes it, with its own optimiser."""

    def __init__(self, model: RTPurboForCausalLM, folder: str):
        args = SelfDistillationArguments(
            output_dir=folder, lora_rank=LORA_RANK, use_cpu=model.device.type == "cpu", learning_rate=1e-4
        )
        self.trainer, self.model = SelfDistillationTrainer(model, args), model
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, item: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {name: value.to(self.model.device) for name, value in collate_labelled([item]).items()}
        return _step(self.trainer.compute_loss(self.model, batch), self.optimizer)


class DenseStep:
    """The same step of the untouched base with SDPA. `unload` takes its LoRA off again."""

    def __init__(self, base: PreTrainedModel):
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=names)
        self.lora: Any = get_peft_model(base, config)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        self.base = base.train()
        self.optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, item: dict[str, torch.Tensor]) -> torch.Tensor:
        rows, ids, logits = (item[n].to(self.base.device) for n in ("label_rows", "teacher_ids", "teacher_logits"))
        found = self.base(item["input_ids"][None].to(self.base.device), use_cache=False, logits_to_keep=rows).logits[0]
        return _step(distillation_kl(found.gather(-1, ids), logits).mean(), self.optimizer)

    def unload(self) -> PreTrainedModel:
        self.base.gradient_checkpointing_disable()
        return self.lora.unload().eval().requires_grad_(False)


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def gradient_error(model: RTPurboForCausalLM, ids: torch.Tensor) -> float:
    """Worst relative error of the gradients of sink + window attention, on the first layer's own activations."""
    taken: list[AttentionInputs] = []

    def observe(inputs: AttentionInputs) -> None:
        if not taken:
            taken.append(inputs)

    with torch.no_grad():
        model(ids[None].to(model.device), observer=observe, use_cache=False, logits_to_keep=1)
    seen, plan = taken[0], taken[0].plan
    options: dict[str, Any] = {
        "heads": plan.local, "kv_heads": plan.local_kv, "window": model.config.sliding_window,
        "num_sinks": model.config.num_sink_tokens, "scale": seen.scale, "start": None, "softcap": None,
    }  # fmt: skip
    leaves = [x.detach().clone().requires_grad_() for x in (seen.query, seen.key, seen.value)]
    out = seen.query.new_zeros(1, ids.numel(), *seen.query.shape[1::2])
    sink_window_attention(*leaves, out=out, **options)
    generator = torch.Generator(out.device).manual_seed(2)
    upstream = torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
    ours = torch.autograd.grad(out, leaves, upstream)
    query, key, value = (x.detach() for x in leaves)
    expected = window_gradient_tiled(upstream, query, key, value, None, **options)[:3]
    return max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))


def stage2_rows(
    preset: str, *, shape: Shape = QWEN3_8B, layers: int = STAGE2_LAYERS, ratio: float = RATIO
) -> list[Row]:
    """`stage2_step_vs_dense_step` at each length of the preset, on `layers` layers of a shape; needs a CUDA device."""
    cut = replace(shape, layers=layers)
    documents = {n: labelled(ids, shape.vocabulary) for n, ids in _documents(LENGTHS[preset], shape.vocabulary).items()}
    base = cut.base()
    # before the base is wrapped, which changes its attention
    dense, peers = DenseStep(base), {}
    for length, item in tqdm(documents.items(), desc="dense step", unit="length"):
        torch.cuda.reset_peak_memory_stats()
        timing = measure(partial(dense, item), warmup=1, repeats=5, budget_ms=2500)
        peers[length] = timing, torch.cuda.max_memory_allocated() / 2**30
    model = RTPurboForCausalLM.from_base(dense.unload(), retrieval_heads=cut.retrieval_heads(ratio))
    initialise_indexers(model, method="random")
    rows: list[Row] = []
    errors = {length: gradient_error(model, item["input_ids"]) for length, item in documents.items()}
    with tempfile.TemporaryDirectory() as folder:
        step = Stage2Step(model, folder)
        for length, item in tqdm(documents.items(), desc="stage 2", unit="length"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            finite = math.isfinite(step(item).item())
            peak = torch.cuda.max_memory_allocated() / 2**30
            timing = measure(partial(step, item), warmup=0, repeats=5, budget_ms=2500)
            peer, peer_gib = peers[length]
            verdict = checked(errors[length] if finite else math.inf, STAGE2_TOLERANCE)
            good = verdict["check"] == "ok"
            extra: dict[str, Any] = {
                "geometry": str(cut),
                "layers": f"{layers} of {shape.layers}",
                "trained": f"LoRA, rank {LORA_RANK}, on the attention projections",
                "retrieval_heads": sum(map(len, model.config.retrieval_heads)),
                "label_rows": item["label_rows"].numel(),
                "low_ms": timing.low_ms,
                "high_ms": timing.high_ms,
                **verdict,
            }
            if good:
                extra |= {
                    "peer": "the same step of the base, SDPA",
                    "step_over_dense_step": timing.median_ms / peer.median_ms,
                    "gib": peak,
                    "peer_gib": peer_gib,
                    "peer_low_ms": peer.low_ms,
                    "peer_high_ms": peer.high_ms,
                }
            rows.append(Row("stage2_step_vs_dense_step", length, ratio, timing.median_ms, peer.median_ms, extra=extra))
            logger.info("stage 2 at %d tokens: check %s (%.1e)", length, verdict["check"], errors[length])
    return rows


CASES: dict[str, Callable[[str], list[Row]]] = {"stage1": stage1_rows, "stage2": stage2_rows}


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
            # trainers refer to themselves: without this the next case's peaks would hold the last one's model
            gc.collect()
            torch.cuda.empty_cache()
    write(rows, Path(output) / name, meta=environment() | {"preset": preset})
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    return table(rows, extra=COLUMNS)
