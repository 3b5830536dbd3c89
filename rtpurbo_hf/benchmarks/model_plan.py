"""What `rtpurbo bench model` measures: the shapes of the models, their retrieval heads, lengths and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .kernels_decode import SELECTED

RATIO, TOP_P, WINDOW, NUM_SINKS = 0.15, 0.9, 8192, 4
PRESETS = ("quick", "paper")
PARTS = ("context", "decode", "prefill")
BATCHES = {"quick": (1,), "paper": (1, 4)}
DECODE_LENGTHS = {"quick": (8192, 32_768), "paper": (8192, 32_768, 131_072, 262_144)}
PREFILL_LENGTHS = {"quick": (16_384,), "paper": (32_768, 131_072, 262_144)}


@dataclass(frozen=True)
class Shape:
    """A base architecture: `layers` of the `whole` model's are built, where one card does not hold all its weights."""

    name: str
    model_type: str
    whole: int
    layers: int
    options: tuple[tuple[str, Any], ...]

    def config(self, layers: int | None = None) -> PreTrainedConfig:
        """The base's config, with `layers` layers (default: those that are built)."""
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.layers if layers is None else layers,
            head_dim=128,
            vocab_size=151_936,
            max_position_embeddings=1 << 21,
            tie_word_embeddings=False,
            **dict(self.options),
        )

    def check_config(self, layers: int) -> PreTrainedConfig:
        """A config of `layers` layers without experts: a router's near ties would look like errors of attention."""
        config = self.config(layers)
        if hasattr(config, "mlp_only_layers"):
            config.mlp_only_layers = list(range(layers))
        return config


SHAPES = {
    "qwen3-8b": Shape(
        "qwen3-8b", "qwen3", 36, 36,
        (("hidden_size", 4096), ("intermediate_size", 12_288), ("num_attention_heads", 32),
         ("num_key_value_heads", 8)),
    ),
    "qwen3-30b-a3b": Shape(
        "qwen3-30b-a3b", "qwen3_moe", 48, 12,
        (("hidden_size", 2048), ("intermediate_size", 6144), ("num_attention_heads", 32), ("num_key_value_heads", 4),
         ("num_experts", 128), ("num_experts_per_tok", 8), ("moe_intermediate_size", 768)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One run: its `parts`, `prefill` and `decode` lengths, and the `batches` of the decode steps."""

    shape: Shape
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    batches: tuple[int, ...]
    parts: tuple[str, ...] = PARTS


def make_plan(
    preset: str,
    *,
    shape: str = "qwen3-8b",
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    layers: int | None = None,
    only: Sequence[str] | None = None,
) -> Plan:
    """The run that the arguments ask for; `lengths` replaces the preset's, for prefill and decode alike.

    Raises:
        ValueError: unknown preset, shape or part, a length that the planted index has no figure for, an empty batch.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {tuple(SHAPES)}, got {shape!r}")
    for length in lengths or ():
        if length < WINDOW:
            raise ValueError(f"lengths start at the window, {WINDOW}; got {length}")
    unknown = [part for part in only or () if part not in PARTS]
    if unknown:
        raise ValueError(f"the parts are {PARTS}, got {unknown[0]!r}")
    batches = BATCHES[preset] if batches is None else batches
    if not batches or min(batches) < 1:
        raise ValueError(f"batches must be one or more positive numbers, got {tuple(batches)}")
    chosen = SHAPES[shape]
    if layers is not None:
        if not 1 <= layers <= chosen.whole:
            raise ValueError(f"layers must lie in 1..{chosen.whole} for {shape}, got {layers}")
        chosen = replace(chosen, layers=layers)
    return Plan(
        chosen,
        tuple(lengths or PREFILL_LENGTHS[preset]),
        tuple(lengths or DECODE_LENGTHS[preset]),
        tuple(batches),
        tuple(part for part in PARTS if part in (only or PARTS)),
    )


def draw_retrieval_heads(layers: int, heads: int, kv_heads: int, *, ratio: float, seed: int = 0) -> list[list[int]]:
    """Retrieval heads per layer: `ratio` of all, drawn so that layers and KV heads get uneven parts."""
    generator = torch.Generator().manual_seed(seed)
    by_layer = torch.randn(layers, 1, generator=generator)
    by_kv = torch.randn(layers, kv_heads, generator=generator).repeat_interleave(heads // kv_heads, 1)
    weights = torch.exp(by_layer + by_kv).flatten()
    drawn = torch.multinomial(weights, max(1, round(ratio * layers * heads)), generator=generator)
    chosen: list[list[int]] = [[] for _ in range(layers)]
    for head in sorted(drawn.tolist()):
        chosen[head // heads].append(head % heads)
    return chosen


def selected_share(length: int) -> float:
    """The share of the tokens that a retrieval head selects at this length, on average, as planted."""
    known = {8192: 0.25, **SELECTED}
    return known[max(at for at in known if at <= length)]
