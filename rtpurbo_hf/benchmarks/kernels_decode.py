"""Decode of one attention layer against FlashAttention-2 split-KV: append + select + attend, in CUDA-graph replay.

The index keys carry planted structure: the scores of head h are normal with spread sigma_h, correlated within spans
of 16 tokens, so the share f of tokens that holds a mass p is known in closed form,

    f = 1 - Phi(sigma - Phi^-1(p)),

and sigma_h is chosen for the wanted share. Shares differ over the heads by a factor of 2700.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.append import quantize_index
from ..kernels.decode import decode_attention, decode_attention_reference, decode_step
from ..kernels.score_select import select_top_p
from ..kernels.selection import Selection, select_top_p_reference
from ..kernels.workspace import DecodeWorkspace
from .harness import Row, checked, copy_bandwidth, input_sets, measure, relative_error

LENGTHS = (32_768, 131_072, 262_144, 524_288, 1_048_576)
SELECTED = {32_768: 0.15, 131_072: 0.08, 262_144: 0.05, 524_288: 0.03, 1_048_576: 0.02}
# of the selected tokens of all heads, the part that each fifth of the heads has
SHARES = (0.0002, 0.02, 0.12, 0.32, 0.5398)
TOP_P, WINDOW, NUM_SINKS, INDEX_DIM, SPAN = 0.9, 8192, 4, 16, 16


@dataclass(frozen=True)
class Geometry:
    """Query heads, KV heads and head_dim of a layer, and its retrieval heads, unevenly over the KV heads."""

    query_heads: int
    kv_heads: int
    head_dim: int
    retrieval_heads: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.kv_heads}/{self.head_dim}"


PAPER = Geometry(32, 4, 128, (1, 2, 5, 12, 20))
OTHERS = (
    Geometry(32, 8, 128, (1, 2, 5, 12, 20)),
    Geometry(64, 8, 128, (1, 2, 3, 6, 12, 20, 21, 33, 40, 50)),
    Geometry(8, 4, 256, (1,)),
)


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer at one length; `key` and `value` are the dense cache that the peer reads."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    new_key: torch.Tensor
    new_value: torch.Tensor
    index_query: torch.Tensor
    new_index: torch.Tensor
    stores: tuple[torch.Tensor, ...]
    index_scale: torch.Tensor | None
    out: torch.Tensor


def spreads(count: int, mean: float) -> list[float]:
    """sigma of each of `count` heads, so that a mean share `mean` of the tokens holds the mass TOP_P."""
    parts = [SHARES[i * len(SHARES) // count] for i in range(count)]
    factor = mean * count / sum(parts)
    normal = NormalDist()
    return [normal.inv_cdf(TOP_P) + normal.inv_cdf(1 - min(max(part * factor, 1e-5), 0.6)) for part in parts]


def slots(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each KV head its row of the full store and of the window store, -1 where it has none."""
    group = geometry.query_heads // geometry.kv_heads
    full = sorted({head // group for head in geometry.retrieval_heads})
    rest = [head for head in range(geometry.kv_heads) if head not in full]
    return (
        tuple(full.index(head) if head in full else -1 for head in range(geometry.kv_heads)),
        tuple(rest.index(head) if head in rest else -1 for head in range(geometry.kv_heads)),
    )


def make_layer(geometry: Geometry, length: int, batch: int, *, int8: bool, seed: int) -> Layer:
    """One layer with `length` tokens in its cache, the step's own token the last of them."""
    torch.manual_seed(seed)
    heads, dim, count = geometry.query_heads, geometry.head_dim, len(geometry.retrieval_heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    key, value = (normal(batch, geometry.kv_heads, length, dim) for _ in range(2))
    full_slot, window_slot = slots(geometry)
    full = [head for head, row in enumerate(full_slot) if row >= 0]
    local = [head for head, row in enumerate(window_slot) if row >= 0]
    full_key, full_value = key[:, full].contiguous(), value[:, full].contiguous()
    ring = torch.arange(max(length - WINDOW, NUM_SINKS), length, device="cuda")
    window = []
    for tensor in (key, value):
        store = torch.zeros(batch, len(local), NUM_SINKS + WINDOW, dim, dtype=torch.bfloat16, device="cuda")
        store[:, :, :NUM_SINKS] = tensor[:, local, :NUM_SINKS]
        store[:, :, NUM_SINKS + (ring - NUM_SINKS) % WINDOW] = tensor[:, local][:, :, ring]
        window.append(store)
    spans = -(-length // SPAN)
    index = torch.randn(batch, count, spans, INDEX_DIM, device="cuda").repeat_interleave(SPAN, 2)[:, :, :length]
    index = (math.sqrt(0.5) * (index + torch.randn_like(index))).bfloat16()
    direction = torch.nn.functional.normalize(torch.randn(batch, count, 1, INDEX_DIM, device="cuda"), dim=-1)
    sigma = torch.tensor(spreads(count, SELECTED[length]), device="cuda")
    scale = None
    new_index = index[:, :, -1:].clone()
    if int8:
        index, scale = quantize_index(index, torch.bfloat16)
    return Layer(
        normal(batch, heads, 1, dim),
        key,
        value,
        key[:, :, -1:].clone(),
        value[:, :, -1:].clone(),
        (direction * sigma[:, None, None]).bfloat16(),
        new_index,
        (full_key, full_value, index, *window),
        scale,
        torch.full((batch, 1, heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda"),
    )


@dataclass(frozen=True)
class Step:
    """A decode step over a `Layer`, its two parts, and the peer."""

    geometry: Geometry
    layer: Layer
    length: torch.Tensor
    workspace: DecodeWorkspace

    def select(self, *, reference: bool = False) -> Selection:
        operation = (
            select_top_p_reference if reference else partial(select_top_p, workspace=self.workspace, backend="triton")
        )
        return operation(
            self.layer.index_query,
            self.layer.stores[2],
            index_heads=tuple(range(len(self.geometry.retrieval_heads))),
            length=self.length,
            start=None,
            top_p=TOP_P,
            min_tokens=0,
            block_size=1,
            index_scale=self.layer.index_scale,
        )

    def attend(self, selection: Selection, *, out: torch.Tensor, reference: bool = False) -> torch.Tensor:
        full_slot, window_slot = slots(self.geometry)
        full_key, full_value, _, window_key, window_value = self.layer.stores
        operation = (
            decode_attention_reference
            if reference
            else partial(decode_attention, workspace=self.workspace, backend="triton")
        )
        return operation(
            self.layer.query,
            full_key,
            full_value,
            window_key,
            window_value,
            selection,
            retrieval_heads=self.geometry.retrieval_heads,
            full_slot=full_slot,
            window_slot=window_slot,
            length=self.length,
            start=None,
            window=WINDOW,
            num_sinks=NUM_SINKS,
            block_size=1,
            scale=self.geometry.head_dim**-0.5,
            out=out,
        )

    def run(self) -> torch.Tensor:
        """The step as the model makes it."""
        layer, (full_slot, window_slot) = self.layer, slots(self.geometry)
        return decode_step(
            layer.query,
            layer.new_key,
            layer.new_value,
            layer.index_query,
            layer.new_index,
            *layer.stores,
            retrieval_heads=self.geometry.retrieval_heads,
            index_heads=tuple(range(len(self.geometry.retrieval_heads))),
            full_slot=full_slot,
            window_slot=window_slot,
            length=self.length,
            start=None,
            top_p=TOP_P,
            min_tokens=0,
            block_size=1,
            window=WINDOW,
            num_sinks=NUM_SINKS,
            scale=self.geometry.head_dim**-0.5,
            out=layer.out,
            index_scale=layer.index_scale,
            workspace=self.workspace,
            backend="triton",
        )

    def peer(self) -> torch.Tensor:
        """FlashAttention-2 with the query heads of a KV head packed as rows: its split-KV path reads K, V once."""
        query, geometry = self.layer.query, self.geometry
        packed = query.reshape(query.shape[0], geometry.kv_heads, -1, geometry.head_dim)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(packed, self.layer.key, self.layer.value)


def make_steps(geometry: Geometry, length: int, batch: int, *, int8: bool) -> list[Step]:
    """One step for each of the layers that are rotated, so that L2 holds none of them."""
    touched = batch * (touched_bytes(geometry, length, SELECTED[length], int8=int8))
    count = max(2, input_sets(touched))
    end = torch.tensor([length], dtype=torch.int32, device="cuda")
    workspace = DecodeWorkspace(
        batch=batch,
        retrieval_heads=len(geometry.retrieval_heads),
        queries=1,
        capacity=length,
        query_heads=geometry.query_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_size=1,
        device="cuda",
    )
    return [
        Step(geometry, make_layer(geometry, length, batch, int8=int8, seed=seed), end, workspace)
        for seed in range(count)
    ]


def index_bytes(geometry: Geometry, length: int, *, int8: bool) -> int:
    """Bytes of index keys that one sequence's step reads."""
    return len(geometry.retrieval_heads) * length * (INDEX_DIM + 2 if int8 else 2 * INDEX_DIM)


def touched_bytes(geometry: Geometry, length: int, selected: float, *, int8: bool) -> float:
    """Bytes that one sequence's step must read: index keys, selected K and V rows, windows and sinks."""
    row = 4 * geometry.head_dim
    group = geometry.query_heads // geometry.kv_heads
    local = sum(
        any(kv * group + g not in geometry.retrieval_heads for g in range(group)) for kv in range(geometry.kv_heads)
    )
    lists = len(geometry.retrieval_heads) * length * selected * row
    windows = local * min(length, WINDOW + NUM_SINKS) * row
    return index_bytes(geometry, length, int8=int8) + lists + windows


def check_step(step: Step) -> tuple[float, float, bool]:
    """Relative error of the step's output, the selected share, and whether the selection keeps its promises."""
    # what the step has to write itself: its output, and its own token in every store
    step.layer.out.fill_(float("nan"))
    full_key, full_value, index_key, window_key, window_value = step.layer.stores
    end = int(step.length)
    at = NUM_SINKS + (end - 1 - NUM_SINKS) % WINDOW
    for store in (full_key[:, :, end - 1], full_value[:, :, end - 1], index_key[:, :, end - 1]):
        store.zero_()
    for store in (window_key[:, :, at], window_value[:, :, at]):
        store.zero_()
    out = step.run()
    selection = step.select()
    counts = selection.counts.clone()
    expected = step.attend(selection, out=torch.empty_like(out, dtype=torch.float32), reference=True)
    written = torch.equal(full_key[:, :, end - 1].float().norm(dim=-1) > 0, full_key[:, :, 0].norm(dim=-1) > 0)
    error = relative_error(out, expected) if written else math.inf
    exact = step.select(reference=True)
    keys = step.layer.stores[2].float()
    if step.layer.index_scale is not None:
        keys = keys * step.layer.index_scale.float()[..., None]
    mass = torch.softmax(torch.matmul(step.layer.index_query.float(), keys.transpose(-1, -2)), -1)
    listed = torch.arange(selection.indices.shape[-1], device=counts.device) < counts[..., None]
    taken = torch.zeros_like(mass).scatter_add_(-1, selection.indices.long() * listed, listed.float())
    kept = (mass * (taken > 0)).sum(-1)
    # float32 sums over a million terms; twice the same token would show as 2
    good = bool((kept >= TOP_P - 1e-4).all()) and bool((taken[..., 1:] <= 1).all())
    good = good and bool((counts <= exact.counts * 1.35 + 8).all()) and bool((counts >= exact.counts - 8).all())
    return error, float(counts.float().mean()) / keys.shape[2], good


def bench_length(geometry: Geometry, length: int, batch: int, *, int8: bool) -> Iterator[Row]:
    """The rows of one geometry at one length."""
    steps = make_steps(geometry, length, batch, int8=int8)
    error, selected, good = check_step(steps[0])
    verdict = checked(error if good else math.inf, 5e-3)
    ours = measure([step.run for step in steps], graph=True).median_ms
    select = measure([step.select for step in steps], graph=True).median_ms
    peer = measure([step.peer for step in steps], graph=True).median_ms
    bandwidth = copy_bandwidth()
    ratio = len(geometry.retrieval_heads) / geometry.query_heads
    extra = {
        "geometry": str(geometry),
        "batch": batch,
        "peer": "FA2 split-KV (SDPA flash, q packed by KV head)",
        "selected": selected,
        "peer_bandwidth": peer and batch * geometry.kv_heads * length * geometry.head_dim * 4 / peer * 1e3,
        **verdict,
    }
    floor = batch * touched_bytes(geometry, length, selected, int8=int8) / bandwidth * 1e3
    name = "decode_vs_fa2_index8" if int8 else "decode_vs_fa2"
    yield Row(name, length, ratio, ours, peer, floor / ours, extra)
    floor = batch * index_bytes(geometry, length, int8=int8) / bandwidth * 1e3
    extra = {name: value for name, value in extra.items() if not name.startswith("peer")}
    name = "score_select_bandwidth_index8" if int8 else "score_select_bandwidth"
    yield Row(name, length, ratio, select, None, floor / select, extra)


def run(preset: str) -> list[Row]:
    """The decode rows of a preset: `"quick"` (32/4/128 at 32K), `"paper"` (all lengths) or `"full"` (and geometries).

    Raises:
        ValueError: unknown preset.
    """
    if preset not in ("quick", "paper", "full"):
        raise ValueError(f"preset must be 'quick', 'paper' or 'full', got {preset!r}")
    points = [(PAPER, length, 1) for length in (LENGTHS[:1] if preset == "quick" else LENGTHS)]
    if preset == "full":
        points += [(PAPER, length, batch) for batch in (4, 8) for length in LENGTHS[:3]]
        points += [(geometry, length, 1) for geometry in OTHERS for length in LENGTHS[:4]]
    rows: list[Row] = []
    for geometry, length, batch in points:
        for int8 in (False, True):
            rows.extend(bench_length(geometry, length, batch, int8=int8))
            torch.cuda.empty_cache()
    return rows
