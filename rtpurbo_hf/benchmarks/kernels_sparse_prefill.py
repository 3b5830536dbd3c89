"""Prefill of one attention layer with sparse retrieval heads against dense attention on all heads.

Cases: `prefill_sparse_vs_fa2` (FlashAttention-2) and `prefill_sparse_vs_best_dense` (the fastest dense path of this
machine, `dense_attention`). Both time local heads + selection + sparse retrieval heads of one layer.

The retrieval heads' q and k carry planted structure that the index shares, so that the kept mass can be measured
against the exact attention. The first INDEX_DIM coordinates of k are a latent u(n): normal, correlated within spans of
KEY_SPAN tokens. Those of q are sqrt(head_dim) * w_h(m): a direction of length sigma_h that changes every QUERY_SPAN
rows, with noise of its own in each row. All other coordinates are noise. The index holds u and w_h alone, so

    exact logit = w_h(m) . u(n) + noise of spread ~ NOISE,      index score = w_h(m) . u(n),

and, as in `kernels_decode`, sigma_h follows from the share of tokens that is to hold the mass TOP_P. Neither span is
a multiple of a tile or a block. How many *blocks* that takes is measured (`selected`), as are the exact mass that
they keep (`kept_mass`, `kept_mass_low`: mean and lowest head on sampled tiles) and the selection's time.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..kernels.common import index_tensor
from ..kernels.dense import choose_path, dense_attention
from ..kernels.sparse_prefill import piece_lists, sparse_prefill_attention, sparse_prefill_attention_reference
from ..kernels.tile_blocks import BLOCK, TILE
from .harness import Row, Timing, checked, matmul_rate, measure, relative_error
from .kernels_decode import INDEX_DIM, SELECTED, TOP_P, spreads
from .kernels_prefill import LONG, LONG_PEER_SECONDS, NUM_SINKS, OTHERS, PAPER, Geometry, Layer, fa2_time

logger = logging.getLogger(__name__)

TOLERANCE, RATIO = 5e-3, 0.15
KEY_SPAN, QUERY_SPAN = 96, 192
# parts of the variance that are each token's own, and the spread of what the index cannot see
KEY_OWN, QUERY_OWN, NOISE = 0.2, 0.1, 0.3


def spans(
    length: int, span: int, own: float, *, dim: int = INDEX_DIM, device: torch.device | str = "cuda"
) -> torch.Tensor:
    """fp32 normal `[length, dim]`, constant over spans but for the part `own` of the variance."""
    shared = torch.randn(-(-length // span), dim, device=device).repeat_interleave(span, 0)[:length]
    return math.sqrt(1 - own) * shared + math.sqrt(own) * torch.randn(length, dim, device=device)


@dataclass(frozen=True)
class SparseLayer:
    """A layer with planted structure, and its index: `[1, n, N, INDEX_DIM]` queries and keys."""

    layer: Layer
    index_query: torch.Tensor
    index_key: torch.Tensor

    @classmethod
    def make(cls, geometry: Geometry, length: int) -> SparseLayer:
        layer = Layer.make(geometry, length, RATIO)
        index_query, index_key, latents = [], [], {}
        for head, sigma in zip(layer.retrieval, spreads(len(layer.retrieval), SELECTED[length]), strict=True):
            kv_head = head // geometry.group
            if kv_head not in latents:
                latents[kv_head] = spans(length, KEY_SPAN, KEY_OWN).bfloat16()
                layer.key[0, kv_head, :, :INDEX_DIM] = latents[kv_head]
            direction = sigma * torch.nn.functional.normalize(spans(length, QUERY_SPAN, QUERY_OWN), dim=-1)
            layer.query[0, head] *= NOISE
            layer.query[0, head, :, :INDEX_DIM] = (direction / layer.scale).bfloat16()
            index_query.append(direction.bfloat16())
            index_key.append(latents[kv_head])
        return cls(layer, torch.stack(index_query)[None], torch.stack(index_key)[None])

    @property
    def index_heads(self) -> tuple[int, ...]:
        return tuple(range(len(self.layer.retrieval)))

    def run_sparse(self) -> None:
        layer = self.layer
        sparse_prefill_attention(
            layer.query,
            layer.key,
            layer.value,
            self.index_query,
            self.index_key,
            heads=layer.retrieval,
            kv_heads=layer.kv_rows(layer.retrieval),
            index_heads=self.index_heads,
            top_p=TOP_P,
            num_sinks=NUM_SINKS,
            scale=layer.scale,
            out=layer.out,
        )

    def run(self) -> None:
        self.layer.run_local()
        self.run_sparse()

    def select(self) -> list[torch.Tensor]:
        """The selection alone, as `sparse_prefill_attention` does it; the counts of each piece."""
        lists = piece_lists(
            self.index_query,
            self.index_key,
            index_heads=index_tensor(self.index_heads, self.index_query.device),
            q_start=0,
            start=None,
            fused=True,
            top_p=TOP_P,
            min_tokens=0,
            num_sinks=NUM_SINKS,
        )
        return [counts for _, _, counts in lists]

    def check(self) -> tuple[float, dict[str, float]]:
        """Worst error of a head on sampled tiles against the reference, and the exact mass that those tiles keep."""
        layer = self.layer
        worst, kept = 0.0, []
        device = layer.query.device

        def observe(rows, chosen, valid, weights) -> None:
            kept.append((weights * chosen).sum(-1)[0])

        tiles = layer.length // TILE
        for tile in sorted({0, tiles // 3, tiles - 1}):
            rows = slice(tile * TILE, (tile + 1) * TILE)
            expected = torch.empty_like(layer.out[:, rows], dtype=torch.float32)
            sparse_prefill_attention_reference(
                layer.query[:, :, rows],
                layer.key,
                layer.value,
                self.index_query[:, :, rows],
                self.index_key,
                heads=index_tensor(layer.retrieval, device),
                kv_heads=index_tensor(layer.kv_rows(layer.retrieval), device),
                index_heads=index_tensor(self.index_heads, device),
                top_p=TOP_P,
                min_tokens=0,
                num_sinks=NUM_SINKS,
                scale=layer.scale,
                out=expected,
                q_start=rows.start,
                on_selection=observe if tile else None,
            )
            for head in layer.retrieval:
                worst = max(worst, relative_error(layer.out[0, rows, head], expected[0, :, head]))
        mass = torch.cat(kept, -1)
        return worst, {"kept_mass": float(mass.mean()), "kept_mass_low": float(mass.mean(-1).min())}


def best_dense_time(geometry: Geometry, length: int) -> tuple[Timing, str]:
    """`dense_attention` on all heads; on the heads of one KV group and scaled where that would take long."""
    layer = Layer.make(geometry, length, RATIO)
    expected = 2 * length * length * geometry.head_dim * geometry.query_heads / 400e12
    count = geometry.query_heads if expected <= LONG_PEER_SECONDS else geometry.group
    heads = tuple(range(count))
    call = partial(
        dense_attention,
        layer.query,
        layer.key,
        layer.value,
        heads=heads,
        kv_heads=layer.kv_rows(heads),
        scale=layer.scale,
        out=layer.out,
    )
    timing = measure(call, warmup=1 if expected * count < geometry.query_heads else 0, repeats=5, budget_ms=1500)
    factor = geometry.query_heads / count
    note = f"dense_attention ({choose_path(layer.query, chunked=False, special=False)}), {count} heads"
    if count < geometry.query_heads:
        note += f" of {geometry.query_heads}, scaled"
    return Timing(factor * timing.median_ms, factor * timing.low_ms, factor * timing.high_ms), note


def bench_length(geometry: Geometry, length: int) -> list[Row]:
    """The rows of one geometry at one length."""
    sparse = SparseLayer.make(geometry, length)
    layer = sparse.layer
    sparse.run()
    error, kept = sparse.check()
    error = max(error, layer.error(layer.out, layer.local))
    if not bool(torch.isfinite(layer.out).all()):
        error = math.inf
    blocks = sum(int(count.sum()) for count in sparse.select())
    causal = len(layer.retrieval) * sum((tile + 1) * TILE // BLOCK for tile in range(-(-length // TILE)))
    timing = measure(sparse.run, warmup=2, repeats=10, budget_ms=1500)
    retrieval = measure(sparse.run_sparse, warmup=1, repeats=10, budget_ms=1000)
    select = measure(sparse.select, warmup=1, repeats=10, budget_ms=1000)
    dense = measure(layer.run, warmup=1 if length < 500_000 else 0, repeats=2, budget_ms=500)
    flops = layer.flops(local_only=True) + 4.0 * geometry.head_dim * blocks * BLOCK * TILE
    rate = flops / timing.median_ms * 1e3
    extra: dict[str, Any] = {
        "geometry": str(geometry),
        "batch": 1,
        "retrieval_heads": " ".join(map(str, layer.retrieval)),
        "selected": blocks / causal,
        "planted_tokens": SELECTED[length],
        **kept,
        "retrieval_ms": retrieval.median_ms,
        "select_ms": select.median_ms,
        "select_share": select.median_ms / timing.median_ms,
        "dense_retrieval_ms": dense.median_ms,
        "tflops": rate / 1e12,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
        **checked(error, TOLERANCE),
    }
    del sparse, layer
    torch.cuda.empty_cache()
    rows = []
    for case, peer_time in (
        ("prefill_sparse_vs_fa2", fa2_time),
        ("prefill_sparse_vs_best_dense", best_dense_time),
    ):
        peer, note = peer_time(geometry, length)
        spread = {"peer": note, "peer_low_ms": peer.low_ms, "peer_high_ms": peer.high_ms}
        roofline = rate / matmul_rate()
        rows.append(Row(case, length, RATIO, timing.median_ms, peer.median_ms, roofline, extra | spread))
        torch.cuda.empty_cache()
    return rows


def run(preset: str = "paper") -> list[Row]:
    """The rows of a preset: `"quick"` (32/4/128 at 32K), `"paper"` (all lengths) or `"full"` (and geometries).

    Raises:
        ValueError: unknown preset. RuntimeError: no CUDA device.
    """
    if preset not in ("quick", "paper", "full"):
        raise ValueError(f"preset must be 'quick', 'paper' or 'full', got {preset!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("the kernel benchmarks need a CUDA device")
    points = [(PAPER, length) for length in (LONG[:1] if preset == "quick" else LONG)]
    if preset == "full":
        points += [(geometry, length) for geometry in OTHERS for length in LONG[:3]]
    rows: list[Row] = []
    for geometry, length in tqdm(points, desc="sparse prefill", unit="length"):
        rows += bench_length(geometry, length)
        torch.cuda.empty_cache()
        logger.info("%s at %s done", geometry, length)
    return rows
