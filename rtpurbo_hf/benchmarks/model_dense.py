"""The dense peers of `rtpurbo bench model`: prefill with SDPA, and the best decode step that transformers can make.

Two decode steps compete, each captured in a CUDA graph, and the faster one is the peer: the `StaticCache` of
transformers with SDPA, whose mask spans the whole allocation, and FlashAttention-2 split-KV over exactly the tokens in
use, with the query heads of a KV head packed as rows.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from ..modeling.families_rtpurbo import CACHE_ARGUMENT
from .harness import capture, measure

logger = logging.getLogger(__name__)
PACKED = "rtpurbo_bench_packed"
TILE = 32_768
# StaticCache with a mask repeats K and V for every query head: seconds a step beyond this
STATIC_LIMIT = 131_072


class TiledMLP(nn.Module):
    """An MLP that a long prefill runs tile by tile, so that 256K tokens fit: same numbers, for both sides."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] <= TILE:
            return self.mlp(hidden)
        out = torch.empty_like(hidden)
        for first in range(0, hidden.shape[1], TILE):
            out[:, first : first + TILE] = self.mlp(hidden[:, first : first + TILE])
        return out


class LastSlotLayer(DynamicLayer):
    """A full static layer whose last slot takes the step's token: attention needs no mask."""

    def fill(self, batch: int, heads: int, length: int, head_dim: int) -> None:
        self.keys = torch.randn(batch, heads, length, head_dim, dtype=torch.bfloat16, device="cuda")
        self.values = torch.randn_like(self.keys)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values


def packed_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """One step's attention over all of `key`: `[B, Hq, 1, D]` in, `[B, 1, Hq, D]` out."""
    batch, heads, _, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return out.reshape(batch, 1, heads, dim), None


def no_mask(*args, **kwargs) -> None:
    return None


def register() -> None:
    """Make the packed attention known to transformers."""
    AttentionInterface.register(PACKED, packed_flash)
    AttentionMaskInterface.register(PACKED, no_mask)


def prefill_ms(base, ids: torch.Tensor) -> tuple[float, int]:
    """Milliseconds to the first token with a cache, and the peak of the allocated bytes."""
    torch.cuda.reset_peak_memory_stats()

    def run() -> int:
        return int(base(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)[0])

    timing = measure(run, warmup=0, repeats=1)
    return timing.median_ms, torch.cuda.max_memory_allocated()


def decode_ms(base, length: int, batch: int) -> tuple[float, str]:
    """The faster of the dense decode steps at `length` tokens, and its name."""
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    positions = torch.full((batch, 1), length - 1, dtype=torch.long, device="cuda")
    best = _packed_step(base, ids, positions, length)
    torch.cuda.empty_cache()
    if batch == 1 and length <= STATIC_LIMIT:
        try:
            best = min(best, _static_step(base, ids, positions, length))
        except RuntimeError as error:
            logger.warning("StaticCache with SDPA fails at %d tokens: %s", length, error)
        torch.cuda.empty_cache()
    return best


def _timed(name: str, base, ids: torch.Tensor, positions: torch.Tensor, cache: Cache) -> tuple[float, str]:
    """Milliseconds of the step, and its name, which says how it ran."""

    def step() -> torch.Tensor:
        return base(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache}).logits

    try:
        graph = capture([step])
    except RuntimeError as error:
        logger.warning("%s cannot be captured, it is timed eagerly: %s", name, error)
        return measure(step).median_ms, f"{name}, eager"
    return measure(graph.replay).median_ms, f"{name}, CUDA graph"


def _packed_step(base, ids: torch.Tensor, positions: torch.Tensor, length: int) -> tuple[float, str]:
    text = base.config
    layers: list[Any] = []
    for _ in range(text.num_hidden_layers):
        layer = LastSlotLayer()
        layer.fill(ids.shape[0], text.num_key_value_heads, length, text.head_dim)
        layers.append(layer)
    base.set_attn_implementation(PACKED)
    try:
        return _timed("packed FA2 split-KV", base, ids, positions, Cache(layers=layers))
    finally:
        base.set_attn_implementation("sdpa")


def _static_step(base, ids: torch.Tensor, positions: torch.Tensor, length: int) -> tuple[float, str]:
    cache = StaticCache(config=base.config, max_cache_len=length + 64)
    base(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache})
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(length - 1)
    return _timed("StaticCache + SDPA", base, ids, positions, cache)
