"""Prefill of one attention layer: local heads by the sink + window kernel, retrieval heads dense, against the peers.

Cases: `prefill_vs_fa2_stock` and `prefill_vs_fa2_fa3` (all heads of a layer against FlashAttention-2 on all heads,
without and with a FlashAttention 3 or 4 package), and `sink_window_vs_flex` (the local heads against compiled
FlexAttention). Every output is compared with the fp32 rule on sampled rows of every head, in the same run.
FLOPs are `4 * head_dim` for each (query, key) pair that is attended to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from ..kernels.dense import choose_path, dense_attention, flash_function
from ..kernels.sink_window import sink_window_attention
from .harness import Row, Timing, checked, matmul_rate, measure, relative_error

logger = logging.getLogger(__name__)

WINDOW, NUM_SINKS, BLOCK = 8192, 4, 128
TOLERANCE = 5e-3
# a peer call that would take longer runs on one KV group and is scaled, if that was found linear
LONG_PEER_SECONDS = 4.0
LINEARITY_LENGTH, LINEARITY_TOLERANCE = 262_144, 0.05


@dataclass(frozen=True)
class Geometry:
    """Query heads, KV heads and head_dim of a layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.kv_heads}/{self.head_dim}"

    def retrieval(self, ratio: float) -> tuple[int, ...]:
        """Retrieval heads, unevenly over the KV groups: the first group holds half of them, and so on."""
        left = max(1, round(ratio * self.query_heads))
        heads: list[int] = []
        for kv_head in range(self.kv_heads):
            take = min(self.group, math.ceil(left / 2) if kv_head + 1 < self.kv_heads else left)
            heads += [kv_head * self.group + place * self.group // take for place in range(take)]
            left -= take
            if left == 0:
                break
        return tuple(heads)


PAPER = Geometry(32, 4, 128)
OTHERS = (Geometry(32, 8, 128), Geometry(64, 8, 128), Geometry(8, 4, 256))
LONG = (32_768, 131_072, 262_144, 524_288, 1_048_576)


@dataclass(frozen=True)
class Layer:
    """Random q, k, v `[1, H, N, D]` as projections leave them, the head partition, and room for the output."""

    geometry: Geometry
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    retrieval: tuple[int, ...]

    @classmethod
    def make(cls, geometry: Geometry, length: int, ratio: float) -> Layer:
        torch.manual_seed(length)

        def tensor(heads: int) -> torch.Tensor:
            return torch.randn(1, length, heads, geometry.head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

        query, key, value = (tensor(n) for n in (geometry.query_heads, geometry.kv_heads, geometry.kv_heads))
        out = torch.full_like(query.transpose(1, 2), math.nan)
        return cls(geometry, query, key, value, out, geometry.retrieval(ratio))

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(head for head in range(self.geometry.query_heads) if head not in self.retrieval)

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def scale(self) -> float:
        return self.geometry.head_dim**-0.5

    def kv_rows(self, heads: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(head // self.geometry.group for head in heads)

    def run_local(self) -> None:
        sink_window_attention(
            self.query,
            self.key,
            self.value,
            heads=self.local,
            kv_heads=self.kv_rows(self.local),
            window=WINDOW,
            num_sinks=NUM_SINKS,
            scale=self.scale,
            out=self.out,
        )

    def run(self) -> None:
        self.run_local()
        dense_attention(
            self.query,
            self.key,
            self.value,
            heads=self.retrieval,
            kv_heads=self.kv_rows(self.retrieval),
            scale=self.scale,
            out=self.out,
        )

    def flops(self, *, local_only: bool = False) -> float:
        length, window = self.length, min(WINDOW, self.length)
        local = length * window - window * (window - 1) // 2 + (length - window) * NUM_SINKS
        pairs = len(self.local) * local
        if not local_only:
            pairs += len(self.retrieval) * length * (length + 1) // 2
        return 4.0 * self.geometry.head_dim * pairs

    def error(self, out: torch.Tensor, heads: tuple[int, ...]) -> float:
        """Worst relative error over `heads` of `out` `[1, N, len(heads) or Hq, D]` on sampled rows."""
        length = self.length
        near = (0, 1, 4, 63, 128, WINDOW - 1, WINDOW, WINDOW + 129)
        far = (length // 2 + 17, length - 129, length - 1)
        rows = torch.tensor(sorted({row for row in near + far if row < length}), device="cuda")
        n = torch.arange(length, device="cuda")
        causal = n <= rows[:, None]
        window = causal & ((rows[:, None] - n < WINDOW) | (n < NUM_SINKS))
        worst = 0.0
        for place, head in enumerate(heads):
            kv_head = head // self.geometry.group
            scores = self.query[0, head, rows].float() @ self.key[0, kv_head].float().T * self.scale
            mask = causal if head in self.retrieval else window
            expected = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ self.value[0, kv_head].float()
            found = out[0, rows, head if out.shape[2] == self.geometry.query_heads else place]
            worst = max(worst, relative_error(found, expected))
        return worst


@contextmanager
def without_flash() -> Iterator[None]:
    """As on a machine with no FlashAttention 3 or 4 package."""
    with mock.patch(f"{dense_attention.__module__}.flash_function", return_value=None):
        yield


def fa2(layer: Layer, heads: int) -> None:
    """FlashAttention-2 through torch on the first `heads` query heads."""
    kv_heads = heads // layer.geometry.group
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(
            layer.query[:, :heads], layer.key[:, :kv_heads], layer.value[:, :kv_heads], is_causal=True, enable_gqa=True
        )


@cache
def fa2_linearity(geometry: Geometry) -> float:
    """Time of all heads over (KV groups x time of one group) at 256K: 1 where FA2 is linear in the heads."""
    layer = Layer.make(geometry, LINEARITY_LENGTH, 0.15)
    one, whole = (
        measure(partial(fa2, layer, heads), warmup=1, repeats=2).median_ms
        for heads in (geometry.group, geometry.query_heads)
    )
    return whole / (geometry.kv_heads * one)


@cache
def fa2_time(geometry: Geometry, length: int) -> tuple[Timing, str]:
    """FlashAttention-2 on all heads, and how it was measured."""
    expected = 2 * length * length * geometry.head_dim * geometry.query_heads / 330e12
    heads, note = geometry.query_heads, "FA2 (SDPA), all heads"
    if expected > LONG_PEER_SECONDS:
        linearity = fa2_linearity(geometry)
        if abs(linearity - 1) <= LINEARITY_TOLERANCE:
            heads = geometry.group
            note = (
                f"FA2 (SDPA), measured on {heads} of {geometry.query_heads} heads and scaled: at 256K all heads took "
                f"{linearity:.3f} times the scaled time"
            )
    layer = Layer.make(geometry, length, 0.15)
    short = expected * heads / geometry.query_heads < 1
    timing = measure(partial(fa2, layer, heads), warmup=1 if short else 0, repeats=7 if short else 2, budget_ms=1500)
    factor = geometry.query_heads / heads
    return Timing(factor * timing.median_ms, factor * timing.low_ms, factor * timing.high_ms), note


def layer_row(case: str, geometry: Geometry, length: int, ratio: float) -> Row:
    """Time a whole layer; which dense path it takes depends on what is installed (or hidden by `without_flash`)."""
    layer = Layer.make(geometry, length, ratio)
    layer.run()
    error = layer.error(layer.out, tuple(range(geometry.query_heads)))
    if not bool(torch.isfinite(layer.out).all()):
        error = math.inf
    timing = measure(layer.run, warmup=1 if length < 500_000 else 0, repeats=10, budget_ms=1500)
    path = choose_path(layer.query, chunked=False, special=False)
    peer, note = fa2_time(geometry, length)
    return _row(case, geometry, length, ratio, timing, peer, note, error, layer.flops(), {"dense_path": path})


def flex_block_mask(length: int) -> BlockMask:
    """The sink + window mask by blocks of 128, written down directly (the general constructor visits every pair)."""
    blocks = math.ceil(length / BLOCK)
    row = torch.arange(blocks, device="cuda", dtype=torch.int32)[:, None]
    reach = WINDOW // BLOCK
    # block row i: whole blocks i - reach + 1 .. i - 1; cut ones: the diagonal, i - reach, and the sinks' block 0
    first_full = (row - reach + 1).clamp_min(0)
    full_count = row - first_full
    place = torch.arange(reach, device="cuda", dtype=torch.int32)
    full = (first_full + place).clamp_max(blocks - 1)
    edge = row - reach
    cut_count = 1 + (edge >= 0).int() + (edge > 0).int()
    cut = torch.cat([row, edge.clamp_min(0), torch.zeros_like(row)], 1)
    shape = (1, 1, blocks, blocks)
    cut_index = torch.zeros(shape, device="cuda", dtype=torch.int32)
    cut_index[0, 0, :, :3] = cut[:, : min(3, blocks)]
    full_index = torch.zeros(shape, device="cuda", dtype=torch.int32)
    full_index[0, 0, :, :reach] = full[:, : min(reach, blocks)]

    def rule(batch, head, m, n):
        return (n <= m) & ((m - n < WINDOW) | (n < NUM_SINKS))

    return BlockMask.from_kv_blocks(
        cut_count.view(1, 1, -1),
        cut_index,
        full_count.view(1, 1, -1),
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def flex_row(geometry: Geometry, length: int, ratio: float) -> Row:
    """The local heads alone. FlexAttention gets its heads gathered beforehand, K and V repeated: not timed."""
    layer = Layer.make(geometry, length, ratio)
    layer.run_local()
    error = layer.error(layer.out, layer.local)
    timing = measure(layer.run_local, warmup=2, repeats=20, budget_ms=600)
    rows = torch.tensor(layer.kv_rows(layer.local), device="cuda")
    query = layer.query[:, list(layer.local)].contiguous()
    key, value = layer.key[:, rows].contiguous(), layer.value[:, rows].contiguous()
    mask = flex_block_mask(length)

    def flex() -> torch.Tensor:
        return compiled_flex()(query, key, value, block_mask=mask, scale=layer.scale)

    peer_error = layer.error(flex().transpose(1, 2), layer.local)
    peer = measure(flex, warmup=2, repeats=20, budget_ms=600)
    note = "FlexAttention, compiled, the same heads and mask"
    extra = {"peer_checked_error": peer_error, "local_heads": len(layer.local)}
    flops, worst = layer.flops(local_only=True), max(error, peer_error)
    return _row("sink_window_vs_flex", geometry, length, ratio, timing, peer, note, worst, flops, extra)


def _row(
    case: str,
    geometry: Geometry,
    length: int,
    ratio: float,
    timing: Timing,
    peer: Timing,
    note: str,
    error: float,
    flops: float,
    extra: dict[str, Any],
) -> Row:
    rate = flops / timing.median_ms * 1e3
    return Row(
        case,
        length,
        ratio,
        timing.median_ms,
        peer.median_ms,
        rate / matmul_rate(),
        {
            "geometry": str(geometry),
            "batch": 1,
            "retrieval_heads": " ".join(map(str, geometry.retrieval(ratio))),
            "tflops": rate / 1e12,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "peer_low_ms": peer.low_ms,
            "peer_high_ms": peer.high_ms,
            "peer": note,
            **extra,
            **checked(error, TOLERANCE),
        },
    )


def plan(preset: str) -> list[tuple[Geometry, int, float]]:
    """(geometry, length, ratio) of every comparison: `paper` is the issue's table, `full` every combination.

    Raises:
        ValueError: unknown preset.
    """
    if preset == "paper":
        return [(PAPER, length, 0.15) for length in LONG]
    if preset == "quick":
        return [(PAPER, 8192, 0.15), (PAPER, 32_768, 0.15), (OTHERS[2], 16_384, 0.15)]
    if preset == "full":
        base = [(PAPER, length, ratio) for ratio in (0.10, 0.15, 0.30) for length in (8192, *LONG)]
        return base + [(geometry, length, 0.15) for geometry in OTHERS for length in (8192, *LONG)]
    raise ValueError(f"preset must be 'paper', 'quick' or 'full', got {preset!r}")


def run(preset: str = "paper") -> list[Row]:
    """Measure every case of the preset; needs a CUDA device.

    Raises:
        RuntimeError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the kernel benchmarks need a CUDA device")
    rows = []
    for geometry, length, ratio in tqdm(plan(preset), desc="prefill", unit="length"):
        with without_flash():
            rows.append(layer_row("prefill_vs_fa2_stock", geometry, length, ratio))
        if flash_function() is not None:
            rows.append(layer_row("prefill_vs_fa2_fa3", geometry, length, ratio))
        torch.cuda.empty_cache()
        rows.append(flex_row(geometry, length, ratio))
        torch.cuda.empty_cache()
        logger.info("%s at %s done", geometry, length)
    return rows
