"""Prefill of retrieval heads on one block list for each tile of rows (`retrieval_prefill="sparse_tiled"`).

    out_h(m) = sum_{n in T_h(tile of m), n <= m} softmax_n(scale * q_h(m) . k(n)) v(n)

with `T_h(tile)` the real tokens of the blocks that `tile_blocks.py` lists from the index queries and keys: that file
states what a row may attend to and how it relates to the token-wise sets of `indexed.py`. With `top_p=1` it is dense
causal attention. Decode steps keep to the token-wise sets.

The prompt is worked off in pieces of whole tiles, so that the lists, and the masses that they are selected by, each
stay within `WORKSPACE_BYTES` at any length; a piece's longest lists start first. Nothing is copied from q, k and v,
nothing is read back to the host, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from .attention_inputs import check_attention_inputs
from .common import (
    HAS_TRITON,
    ceil_div,
    index_tensor,
    masked_softmax,
    row_tiles,
    soft_cap,
    starts,
    use_triton,
)
from .custom_op import define_op, needs_grad
from .sparse_gradient import Lists, as_lists, sparse_attention_with_gradient
from .sparse_prefill_hopper import attend_lists_hopper, hopper_fits
from .sparse_prefill_triton import attend_lists_portable
from .tile_blocks import BLOCK, FAR, TILE, empty_lists, mass_bytes, tile_blocks_reference, tile_range
from .tile_lists import ListOptions, TileLists

WORKSPACE_BYTES = 1 << 28

Observer = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None]


def sparse_prefill_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    index_heads: torch.Tensor,
    top_p: float,
    min_tokens: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    on_selection: Observer | None = None,
) -> torch.Tensor:
    """The contract of `sparse_prefill_attention`, in fp32; differentiable, the lists being constants."""
    batch, _, q_len, _ = query.shape
    device, end = query.device, q_start + q_len
    first_slot = starts(start, batch, device)
    with torch.no_grad():
        listed = tile_blocks_reference(
            index_query,
            index_key,
            index_heads=index_heads,
            top_p=top_p,
            min_tokens=min_tokens,
            num_sinks=num_sinks,
            q_start=q_start,
            start=start,
        )
    logits = None if sink_logits is None else sink_logits[heads]
    slots = torch.arange(end, device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * end):
        q_slots = torch.arange(q_start + rows.start, q_start + rows.stop, device=device)
        # [B, 1, rows, keys]
        valid = ((slots <= q_slots[:, None]) & (slots >= first_slot[:, None, None]))[:, None]
        tiles = q_slots.div(TILE, rounding_mode="floor") - tile_range(q_start, q_len)[0]
        chosen = listed[:, :, tiles].repeat_interleave(BLOCK, -1)[..., :end] & valid
        q, k = query[:, heads, rows].float(), key[:, kv_heads, :end].float()
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        if on_selection is not None:
            with torch.no_grad():
                on_selection(rows, chosen, valid, masked_softmax(scores, valid, sink_logits=logits))
        weights = masked_softmax(scores, chosen, sink_logits=logits)
        tile = torch.matmul(weights, value[:, kv_heads, :end].float())
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


def pieces(q_len: int, *, q_start: int, rows: int) -> Iterator[tuple[slice, list[slice]]]:
    """Query rows of one attention launch, and the parts of them that are selected for at a time, for `rows` heads.

    All end on tile bounds, the last excepted, and parts at slot FAR as well. Lists and masses each stay within
    `WORKSPACE_BYTES`, or are one tile's.
    """
    end = q_start + q_len
    for piece in _cut(slice(0, q_len), 4 * ceil_div(end, BLOCK) * rows, q_start=q_start):
        cuts = sorted({piece.start, min(max(FAR - q_start, piece.start), piece.stop), piece.stop})
        parts: list[slice] = []
        for low, high in pairwise(cuts):
            bytes_of_tile = mass_bytes(q_start + low, q_start + high) * rows
            parts += _cut(slice(low, high), bytes_of_tile, q_start=q_start)
        yield piece, parts


def _cut(rows: slice, bytes_of_tile: int, *, q_start: int) -> Iterator[slice]:
    """`rows` in runs of whole tiles that need `WORKSPACE_BYTES` at most."""
    tiles = max(1, WORKSPACE_BYTES // bytes_of_tile)
    begin = rows.start
    while begin < rows.stop:
        stop = min((tile_range(q_start + begin, 1)[0] + tiles) * TILE - q_start, rows.stop)
        yield slice(begin, stop)
        begin = stop


def piece_lists(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: torch.Tensor,
    q_start: int,
    start: torch.Tensor | None,
    fused: bool,
    **selection: float,
) -> Lists:
    """(rows, lists, counts) of the prompt, piece by piece; `fused`: by the Triton kernels.

    `selection`: `top_p`, `min_tokens` and `num_sinks`. Memory is bounded at any length.
    """
    options: dict = selection | {"index_heads": index_heads, "start": start}
    heads = (index_query.shape[0], index_query.shape[1])
    for piece, parts in pieces(index_query.shape[2], q_start=q_start, rows=heads[0] * heads[1]):
        begin = q_start + piece.start
        if not fused:
            chosen = tile_blocks_reference(index_query[:, :, piece], index_key, q_start=begin, **options)
            yield piece, *as_lists(chosen)
            continue
        first, tiles = tile_range(begin, piece.stop - piece.start)
        indices, counts = empty_lists(heads, tiles, q_start + piece.stop, index_query.device)
        for part in parts:
            at, count = tile_range(q_start + part.start, part.stop - part.start)
            places = slice(at - first, at - first + count)
            select_tile_blocks(
                index_query[:, :, part],
                index_key,
                q_start=q_start + part.start,
                indices=indices[:, :, places],
                counts=counts[:, :, places],
                **options,
            )
        yield piece, indices, counts


if HAS_TRITON:
    from .tile_blocks import select_tile_blocks

    def _run_sparse_prefill(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        heads: list[int],
        kv_heads: list[int],
        index_heads: list[int],
        top_p: float,
        min_tokens: int,
        num_sinks: int,
        scale: float,
        out: torch.Tensor,
        q_start: int,
        start: torch.Tensor | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        on_device, kv_on_device, index_on_device = (
            index_tensor(tuple(listed), query.device) for listed in (heads, kv_heads, index_heads)
        )
        lists = piece_lists(
            index_query,
            index_key,
            index_heads=index_on_device,
            top_p=top_p,
            min_tokens=min_tokens,
            num_sinks=num_sinks,
            q_start=q_start,
            start=start,
            fused=True,
        )
        for rows, indices, counts in lists:
            part = query[:, :, rows]
            listed = TileLists(indices, counts, TILE, BLOCK)
            options = ListOptions(scale, q_start + rows.start, start, softcap, sink_logits)
            attend = attend_lists_hopper if hopper_fits(part, key, value, listed) else attend_lists_portable
            with torch.cuda.device_of(query):
                attend(part, key, value, out[:, rows], on_device, kv_on_device, listed, options)

    _sparse_prefill_op = define_op(
        "sparse_prefill_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor index_query, Tensor index_key, int[] heads, "
        "int[] kv_heads, int[] index_heads, float top_p, SymInt min_tokens, SymInt num_sinks, float scale, "
        "Tensor(a!) out, SymInt q_start, Tensor? start, float? softcap, Tensor? sink_logits) -> ()",
        _run_sparse_prefill,
    )


def sparse_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: Sequence[int],
    kv_heads: Sequence[int],
    index_heads: Sequence[int],
    top_p: float,
    min_tokens: int = 0,
    num_sinks: int = 4,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
    on_selection: Observer | None = None,
) -> torch.Tensor:
    """Attention of the listed heads on their tiles' block lists, written to their places in `out`.

    Args:
        query: `[B, Hq, M, D]`, rotated; row m is slot `q_start + m`.
        key, value: `[B, Hkv, N, D]`, rotated; row n is slot n, and N >= q_start + M (chunked prefill: N > M).
        index_query: `[B, n, M, r]`, one head for each listed head. index_key: `[B, I, N, r]`, unit stride on r.
        heads, kv_heads, index_heads: `n` query heads and their rows of `key` and `index_key`, as ints.
        top_p: index mass that a tile's list must reach, in (0, 1]; 1 reads everything.
        min_tokens: floor on the slots of a list. num_sinks: first real tokens whose blocks are always listed.
        scale: softmax scale of the exact attention, > 0 (the index scores carry their own).
        out: `[B, M, Hq, D]`; the listed heads are written, others left alone. Rows on padding give 0.
        start: int `[B]`, slot of each row's first real token (left padding); None: no padding.
        softcap: scores become `softcap * tanh(score / softcap)`. sink_logits: `[Hq]`, learned sinks.
        backend: `"auto"` (Triton for half precision on CUDA), `"triton"` or `"reference"`.
        on_selection: called per tile of rows with (rows, selected mask, valid mask, exact weights without selection);
            for measurements only: the reference runs, and computes the dense weights as well.

    Gradients reach query, key, value and sink_logits, in memory linear in the length (`sparse_gradient.py`), but not
    the index: lists are constants.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, options out of range, or queries beyond the last key.
    """
    check_attention_inputs(query, key, value, heads, kv_heads, out, start, sink_logits)
    batch, _, q_len, _ = query.shape
    count, dim = len(heads), index_query.shape[-1]
    if index_query.shape != (batch, count, q_len, dim) or index_key.dim() != 4 or len(index_heads) != count:
        raise ValueError(
            f"expected index_query [B, n, M, r] = {(batch, count, q_len, dim)}, index_key [B, I, N, r] and {count} "
            f"index_heads, got {tuple(index_query.shape)}, {tuple(index_key.shape)} and {len(index_heads)}"
        )
    if index_key.shape[0] != batch or index_key.shape[2] < q_start + q_len or index_key.shape[3] != dim:
        raise ValueError(
            f"index_key must hold [B, I, N >= {q_start + q_len}, {dim}] for {batch} rows, got {tuple(index_key.shape)}"
        )
    if scale <= 0 or q_start < 0 or q_start + q_len > key.shape[2]:
        given = f"scale={scale}, q_start={q_start}, {q_len} queries and {key.shape[2]} keys"
        raise ValueError(f"expected scale > 0 and 0 <= q_start <= keys - queries, got {given}")
    if not 0 < top_p <= 1 or min_tokens < 0 or num_sinks < 0:
        given = f"{top_p}, {min_tokens} and {num_sinks}"
        raise ValueError(f"expected 0 < top_p <= 1, min_tokens >= 0 and num_sinks >= 0, got {given}")
    if query.numel() == 0 or count == 0:
        return out
    fused = on_selection is None and query.shape[3] <= 256 and use_triton(backend, query)
    if on_selection is None and needs_grad(query, key, value, sink_logits, out):
        selection = {"top_p": top_p, "min_tokens": min_tokens, "num_sinks": num_sinks, "q_start": q_start}
        where = {"heads": tuple(heads), "kv_heads": tuple(kv_heads), "scale": scale, "softcap": softcap}
        attend = partial(sparse_prefill_attention, index_heads=index_heads, backend=backend, **selection, **where)
        lists = partial(
            piece_lists, index_heads=index_tensor(tuple(index_heads), query.device), fused=fused, **selection
        )
        return sparse_attention_with_gradient(
            query, key, value, index_query, index_key, out=out, sink_logits=sink_logits, attend=attend, lists=lists,
            q_start=q_start, start=start, **where,
        )  # fmt: skip
    if fused:
        _sparse_prefill_op(
            query,
            key,
            value,
            index_query,
            index_key,
            list(heads),
            list(kv_heads),
            list(index_heads),
            top_p,
            min_tokens,
            num_sinks,
            scale,
            out,
            q_start,
            start,
            softcap,
            sink_logits,
        )
        return out
    return sparse_prefill_attention_reference(
        query,
        key,
        value,
        index_query,
        index_key,
        heads=index_tensor(tuple(heads), query.device),
        kv_heads=index_tensor(tuple(kv_heads), query.device),
        index_heads=index_tensor(tuple(index_heads), query.device),
        top_p=top_p,
        min_tokens=min_tokens,
        num_sinks=num_sinks,
        scale=scale,
        out=out,
        q_start=q_start,
        start=start,
        softcap=softcap,
        sink_logits=sink_logits,
        on_selection=on_selection,
    )
