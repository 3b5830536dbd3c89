"""Decode attention of a layer: retrieval heads over their lists, local ones over sinks + window (PAPER section 5).

    out_h(m) = sum_{n in T_h(m)} softmax_n(scale * q_h(m) . k(n)) v(n)

`T_h(m)` is the selected set of a retrieval head (`score_select.py`), or, for a local head, the sinks and the
window: n <= m and (m - n < window or n < num_sinks), in logical positions. The stores are those of `append.py`: a
local head whose KV head lies in the full store reads its sinks and window there, the others read the ring. A full store
in 8 bits (`kv_quant.py`) is read as it is: a key's scale multiplies its score, a value's scale its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from .append import append_step, check_append
from .common import HAS_TRITON, masked_softmax, next_power_of_2, row_tiles, soft_cap, starts, use_triton
from .decode_ops import compiled_decode_step, set_eager_step
from .kv_quant import check_kv_scales
from .launches import launch_options
from .score_select import NewTokens, Selection, check_select, launch_select, select_top_p
from .workspace import DecodeWorkspace, head_table, num_processors, tile_rows

if HAS_TRITON:
    from .decode_triton import _decode_attention_kernel


def _gather(
    store: torch.Tensor, rows: list[int], slots: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 `[B, n, L, D]`: `slots` (`[B, L]` or `[B, n, L]`) of the listed rows of a store `[B, H, C, D]`."""
    if slots.dim() == 2:
        slots = slots[:, None].expand(-1, len(rows), -1)
    b = torch.arange(store.shape[0], device=store.device)[:, None, None]
    picked = b, torch.tensor(rows, device=store.device)[None, :, None], slots
    states = store[picked].float()
    return states if scale is None else states * scale[picked].float()[..., None]


def _window_positions(
    end: int, q_len: int, window: int, num_sinks: int, first_slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical positions `[B, L]` that local rows of the step see, and which row sees which `[B, M, L]`."""
    device = first_slot.device
    q_pos = torch.arange(end - q_len, end, device=device) - first_slot[:, None]
    span = min(window + q_len - 1, end)
    sinks = torch.arange(min(num_sinks, end), device=device).expand(first_slot.numel(), -1)
    recent = q_pos[:, -1:] - span + 1 + torch.arange(span, device=device)
    position = torch.cat([sinks, recent], 1)
    # a recent position that is a sink was already listed
    listed = torch.cat([torch.ones_like(sinks, dtype=torch.bool), recent >= num_sinks], 1)
    distance = q_pos[:, :, None] - position[:, None]
    near = (distance < window) | (position < num_sinks)[:, None]
    return position, (distance >= 0) & near & listed[:, None]


def decode_attention_reference(
    query: torch.Tensor,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    selection: Selection | None,
    *,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    window: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `decode_attention`, in fp32; reads `length` and the counts on the host."""
    batch, num_heads, q_len, _ = query.shape
    group = num_heads // len(full_slot)
    end, device = int(length), query.device
    first_slot = starts(start, batch, device)
    chosen = set(retrieval_heads)

    position, seen = _window_positions(end, q_len, window, num_sinks, first_slot)
    # what no row sees may hold anything: read position 0 instead
    position = torch.where(seen.any(1), position, 0)
    ring = max(window_key.shape[2] - num_sinks, 1)
    in_ring = torch.where(position < num_sinks, position, num_sinks + (position - num_sinks) % ring)
    full, window_store = (full_key, full_value, key_scale, value_scale), (window_key, window_value, None, None)
    places = (
        (full, full_slot, (position + first_slot[:, None]).clamp(0, max(end - 1, 0))),
        (window_store, window_slot, in_ring.clamp(0, max(window_key.shape[2] - 1, 0))),
    )
    for (store_key, store_value, scale_key, scale_value), table, slots in places:
        kv_heads = [
            kv for kv, row in enumerate(table) if row >= 0 and any(kv * group + g not in chosen for g in range(group))
        ]
        if not kv_heads:
            continue
        rows = [table[kv] for kv in kv_heads]
        heads = [kv * group + g for kv in kv_heads for g in range(group)]
        local = [i for i, head in enumerate(heads) if head not in chosen]
        q = query[:, heads].float().reshape(batch, len(rows), group * q_len, -1)
        k = _gather(store_key, rows, slots, scale_key)
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        scores = scores.reshape(batch, len(heads), q_len, -1)
        logits = None if sink_logits is None else sink_logits[heads]
        weights = masked_softmax(scores, seen[:, None], sink_logits=logits)
        weights = weights.reshape(batch, len(rows), group * q_len, -1)
        tile = torch.matmul(weights, _gather(store_value, rows, slots, scale_value))
        tile = tile.reshape(batch, len(heads), q_len, -1)[:, local].transpose(1, 2)
        out[:, :, [heads[i] for i in local]] = tile.to(out.dtype)

    if retrieval_heads:
        if selection is None:
            raise ValueError(f"{len(retrieval_heads)} retrieval heads need a selection, got None")
        heads = list(retrieval_heads)
        full_rows = [full_slot[head // group] for head in heads]
        width = max(int(selection.counts.max()), 1)
        offsets = torch.arange(block_size, device=device)
        logits = None if sink_logits is None else sink_logits[heads]
        head_dim = query.shape[-1]
        for tile_rows in row_tiles(q_len, batch * len(heads) * width * block_size * head_dim, budget=1 << 27):
            blocks = selection.indices[:, :, tile_rows, :width].long()
            listed = torch.arange(width, device=device) < selection.counts[:, :, tile_rows, None]
            # [B, n, rows, L]
            slots = (blocks[..., None] * block_size + offsets).flatten(-2) + first_slot[:, None, None, None]
            q_slots = torch.arange(end - q_len, end, device=device)[tile_rows]
            mask = listed.repeat_interleave(block_size, -1) & (slots <= q_slots[:, None])
            slots = torch.where(mask, slots, 0)
            shape = (batch, len(heads), slots.shape[2], slots.shape[3], -1)
            k = _gather(full_key, full_rows, slots.flatten(2), key_scale).reshape(shape)
            v = _gather(full_value, full_rows, slots.flatten(2), value_scale).reshape(shape)
            q = query[:, heads, tile_rows].float()
            scores = soft_cap(torch.matmul(k, q[..., None])[..., 0] * scale, softcap)
            weights = masked_softmax(scores, mask, sink_logits=logits)
            tile = torch.matmul(weights[..., None, :], v)[..., 0, :]
            out[:, tile_rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


# query rows that one launch takes
MAX_QUERIES = 16
# measured on an H100: CTAs a multiprocessor holds, keys of a tile for 128 dimensions, warps, pipeline stages of the two
# passes (a list is one read more), registers of a thread (what is left holds the selection's CTAs, beside which local
# heads run), empty units of an item
_ATTEND_CONFIG = {"ctas": 2, "tile_keys": 32, "warps": 4, "stages": 3, "list_stages": 6, "registers": 152, "lead": 2}


def _layer_tables(
    num_heads: int, retrieval_heads: tuple[int, ...], full_slot: tuple[int, ...], window_slot: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """How many KV heads have local query heads, and the kernel's tables (see `decode_triton.py`)."""
    group = num_heads // len(full_slot)
    chosen = set(retrieval_heads)
    local = [kv for kv in range(len(full_slot)) if any(kv * group + g not in chosen for g in range(group))]
    tables = [
        *local,
        *(full_slot[kv] if full_slot[kv] >= 0 else window_slot[kv] for kv in local),
        *(int(full_slot[kv] < 0) for kv in local),
        *retrieval_heads,
        *(full_slot[head // group] for head in retrieval_heads),
        *(int(head not in chosen) for head in range(num_heads)),
        *(retrieval_heads.index(head) if head in chosen else local.index(head // group) for head in range(num_heads)),
    ]
    return len(local), tuple(tables)


_layer_tables_cached = lru_cache(maxsize=1024)(_layer_tables)


def _check_attend(
    query: torch.Tensor,
    full_key: torch.Tensor,
    window_key: torch.Tensor,
    selection: Selection | None,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    out: torch.Tensor,
) -> None:
    if query.dim() != 4 or query.shape[1] % len(full_slot) or len(full_slot) != len(window_slot):
        raise ValueError(
            f"query must be [B, Hq, M, D] with Hq a multiple of the KV heads, and full_slot and window_slot must name "
            f"each KV head; got {tuple(query.shape)}, {len(full_slot)} and {len(window_slot)} entries"
        )
    batch, num_heads, q_len, head_dim = query.shape
    if tuple(out.shape) != (batch, q_len, num_heads, head_dim):
        raise ValueError(f"out must be {(batch, q_len, num_heads, head_dim)}, got {tuple(out.shape)}")
    for name, store in (("full_key", full_key), ("window_key", window_key)):
        if store.dim() != 4 or store.shape[3] != head_dim:
            raise ValueError(f"{name} must be [B, heads, slots, {head_dim}], got {tuple(store.shape)}")
    if retrieval_heads and selection is None:
        raise ValueError(f"{len(retrieval_heads)} retrieval heads need a selection, got None")


def decode_attention(
    query: torch.Tensor,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    selection: Selection | None,
    *,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    window: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    backend: str = "auto",
    new_tokens: NewTokens | None = None,
) -> torch.Tensor:
    """Attention of every query head of one layer for a decode step, without a host synchronisation.

    Two launches for each `MAX_QUERIES` rows: the shares of the work, and the merging of rows that were split. A barrier
    inside one launch was measured to take longer (H100: 33.7 us against 32.2 us for a step at 32K tokens).

    Args:
        query: `[B, Hq, M, D]`, rotated; D 64, 80, 96, 128 or 256.
        full_key, full_value: `[B, F, C, D]`. window_key, window_value: `[B, W, S + R, D]`. Unit stride on D. This
            step's tokens are in them already.
        selection: of the retrieval heads, in their order; None when there are none.
        retrieval_heads: query heads that read their lists; the others are local.
        full_slot, window_slot: for each KV head its row of the full or of the window store, -1 where it has none.
        length: int32 device tensor `[1]`, slots in use. start: int `[B]` or None. Both as in `select_top_p`.
        window: keys that a local head sees, its own included. num_sinks: S.
        block_size: of the selection. scale: of q . k.
        out: `[B, M, Hq, D]`, written whole.
        softcap: of the scores, or None. sink_logits: `[Hq]`, learned logits in the denominator, or None.
        key_scale, value_scale: fp16 `[B, F, C]` when the full stores are int8 or fp8, else None.
        workspace, backend: as in `select_top_p`.
        new_tokens: what the launch right before this call, `launch_select`, appends in at most `MAX_QUERIES` rows; it
            may still run.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
    """
    _check_attend(query, full_key, window_key, selection, retrieval_heads, full_slot, window_slot, out)
    check_kv_scales(full_key, full_value, key_scale, value_scale)
    tensors = query, full_key, full_value, window_key, window_value, selection
    arguments: dict[str, Any] = {
        "retrieval_heads": retrieval_heads,
        "full_slot": full_slot,
        "window_slot": window_slot,
        "length": length,
        "start": start,
        "window": window,
        "num_sinks": num_sinks,
        "block_size": block_size,
        "scale": scale,
        "out": out,
        "softcap": softcap,
        "sink_logits": sink_logits,
        "key_scale": key_scale,
        "value_scale": value_scale,
    }
    if not use_triton(backend, query):
        return decode_attention_reference(*tensors, **arguments)
    if query.shape[2] <= MAX_QUERIES:
        return launch_attend(*tensors, **arguments, workspace=workspace, new_tokens=new_tokens)
    for rows, behind in _row_groups(query.shape[2]):
        # the kernel holds all rows of a KV group at once, and a list in the order of its own rows
        part = None if selection is None else Selection(*(each[:, :, rows].contiguous() for each in selection))
        own = {"out": out[:, rows], "length": length - behind}
        launch_attend(query[:, :, rows], *tensors[1:5], part, **(arguments | own), workspace=workspace)
    return out


def _row_groups(q_len: int) -> Iterator[tuple[slice, int]]:
    """Query rows that one launch takes, and how many tokens come after the last of them."""
    for first in range(0, q_len, MAX_QUERIES):
        stop = min(first + MAX_QUERIES, q_len)
        yield slice(first, stop), q_len - stop


def launch_attend(
    query: torch.Tensor,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    selection: Selection | None,
    *,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    window: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    workspace: DecodeWorkspace | None,
    new_tokens: NewTokens | None = None,
) -> torch.Tensor:
    """`decode_attention` in Triton. `new_tokens`: what the launch before this one, `launch_select`, appends."""
    batch, num_heads, q_len, head_dim = query.shape
    group = num_heads // len(full_slot)
    device = query.device
    num_local, tables = _layer_tables_cached(num_heads, retrieval_heads, full_slot, window_slot)
    listed = batch * len(retrieval_heads) * q_len
    num_items = batch * num_local + listed
    if workspace is None:
        workspace = DecodeWorkspace(
            batch=batch,
            retrieval_heads=len(retrieval_heads),
            queries=q_len,
            capacity=1,
            query_heads=num_heads,
            kv_heads=len(full_slot),
            head_dim=head_dim,
            block_size=block_size,
            device=device,
        )
    block_m = tile_rows(group, q_len)
    if num_items > workspace.items or block_m > workspace.tile_rows or head_dim > workspace.head_dim:
        raise ValueError(
            f"the workspace is for {workspace.items} items, {workspace.tile_rows} tile rows and head_dim "
            f"{workspace.head_dim}, this step has {num_items}, {block_m} and {head_dim}; make it with the step's "
            f"batch, heads and queries"
        )
    if query.stride(3) != 1:
        query = query.contiguous()
    if out.stride(3) != 1 or full_key.stride(3) != 1 or window_key.stride(3) != 1:
        raise ValueError("out and the stores need unit stride on their last axis")
    on_gpu = query.is_cuda
    block_d = next_power_of_2(head_dim)
    block_n = max(16, _ATTEND_CONFIG["tile_keys"] * 128 // max(block_d, 128)) if on_gpu else 16
    indices, counts = _no_selection(device) if selection is None else selection
    first_slot = length if start is None else start
    ctas = _ATTEND_CONFIG["ctas"] if block_m <= 16 else 1
    shares = min(ctas * num_processors(device), workspace.ctas)
    early = new_tokens is not None and _can_start_early(new_tokens, full_key, window_key, window, num_sinks)
    new_key, new_value = (new_tokens.key, new_tokens.value) if early else (query, query)
    arguments = (
        query,
        full_key,
        full_value,
        full_key if key_scale is None else key_scale,
        full_value if value_scale is None else value_scale,
        window_key,
        window_value,
        new_key,
        new_value,
        indices,
        counts,
        head_table(tables, device),
        length,
        first_slot,
        query if sink_logits is None else sink_logits,
        out,
        workspace.partial,
        workspace.stats,
        scale,
        1.0 if softcap is None else softcap,
        num_local,
        len(retrieval_heads),
        batch,
        q_len,
        shares,
        window,
        num_sinks,
        max(window_key.shape[2] - num_sinks, 1),
        *query.stride()[:3],
        *full_key.stride()[:3],
        *full_value.stride()[:3],
        *((0, 0) if key_scale is None else key_scale.stride()[:2]),
        *window_key.stride()[:3],
        *window_value.stride()[:3],
        *new_key.stride()[:3],
        *new_value.stride()[:3],
        *out.stride()[:3],
        indices.stride(2),
    )
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK": block_size,
        "LOCAL_ITEMS": next_power_of_2(max(batch * num_local, 2)),
        "LISTED_ITEMS": next_power_of_2(max(listed, 2)),
        "NUM_HEADS": num_heads,
        "LEAD": _ATTEND_CONFIG["lead"],
        "MERGE": 256 if on_gpu else 4,
        "SLICE": min(32, block_d),
        "EARLY": early,
        "HAS_START": start is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SINK_LOGITS": sink_logits is not None,
        "STAGES": _ATTEND_CONFIG["stages"],
        "LIST_STAGES": _ATTEND_CONFIG["list_stages"],
        "QUANTISED": key_scale is not None,
        "num_warps": _ATTEND_CONFIG["warps"] if block_m <= 32 else 8,
        "maxnreg": _ATTEND_CONFIG["registers"] if block_d <= 128 else 255,
    }
    slices = batch * q_len * num_heads * (block_d // constants["SLICE"])
    for phase, grid in (("PARTIAL", shares), ("COMBINE", min(slices, 4 * num_processors(device)))):
        own = {"PARTIAL": phase == "PARTIAL", "COMBINE": phase == "COMBINE"}
        _decode_attention_kernel[(grid,)](*arguments, **constants, **own, **launch_options(device))
    return out


def _can_start_early(
    new: NewTokens, full_key: torch.Tensor, window_key: torch.Tensor, window: int, num_sinks: int
) -> bool:
    """Whether local heads may run while the step's tokens are being appended.

    What they see is then neither quantised on the way, nor in a slot of the ring that a new token takes over.
    """
    same = new.key.dtype == full_key.dtype == window_key.dtype and new.key.stride(3) == new.value.stride(3) == 1
    ring = window_key.shape[2] - num_sinks
    return same and (window_key.shape[1] == 0 or ring >= window + new.key.shape[2] - 1)


@lru_cache(maxsize=16)
def _no_selection(device: torch.device) -> Selection:
    """The empty selection of a layer without retrieval heads."""
    empty = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    return Selection(empty, empty[..., 0])


def decode_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor | None,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    *,
    retrieval_heads: tuple[int, ...],
    index_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    index_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A layer's whole decode step: append, select, attend; four launches for a layer with retrieval heads, more from
    `MAX_QUERIES` query rows on.

    The same as `append_step`, `select_top_p` and `decode_attention` one after the other, whose arguments these are;
    `index_query`, `index_key_new` are None for a layer without retrieval heads. Returns `out`.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
    """
    if torch.compiler.is_compiling():
        return compiled_decode_step(
            query,
            key,
            value,
            index_query,
            index_key_new,
            full_key,
            full_value,
            index_key,
            window_key,
            window_value,
            retrieval_heads=retrieval_heads,
            index_heads=index_heads,
            full_slot=full_slot,
            window_slot=window_slot,
            length=length,
            start=start,
            top_p=top_p,
            min_tokens=min_tokens,
            block_size=block_size,
            window=window,
            num_sinks=num_sinks,
            scale=scale,
            out=out,
            softcap=softcap,
            sink_logits=sink_logits,
            index_scale=index_scale,
            key_scale=key_scale,
            value_scale=value_scale,
            workspace=workspace,
            backend=backend,
        )
    selection = new_tokens = None
    if retrieval_heads and top_p < 1.0 and query.shape[2] <= MAX_QUERIES and use_triton(backend, query):
        if index_query is None or index_key_new is None:
            raise ValueError("a layer with retrieval heads needs index_query and index_key_new, got None")
        check_append(key, value, index_key_new, full_key, index_key, window_key, full_slot, window_slot, index_scale)
        check_kv_scales(full_key, full_value, key_scale, value_scale)
        check_select(index_query, index_key, index_heads, block_size)
        _check_attend(query, full_key, window_key, None, (), full_slot, window_slot, out)
        new_tokens = NewTokens(
            key,
            value,
            index_key_new,
            full_key,
            full_value,
            window_key,
            window_value,
            full_slot + window_slot,
            num_sinks,
            key_scale,
            value_scale,
        )
        selection = launch_select(
            index_query,
            index_key,
            index_heads,
            length,
            start,
            top_p,
            min_tokens,
            block_size,
            index_scale,
            workspace,
            new_tokens,
        )
    else:
        append_step(
            key,
            value,
            index_key_new,
            full_key,
            full_value,
            index_key,
            window_key,
            window_value,
            full_slot=full_slot,
            window_slot=window_slot,
            length=length,
            start=start,
            num_sinks=num_sinks,
            index_scale=index_scale,
            key_scale=key_scale,
            value_scale=value_scale,
            backend=backend,
        )
        if retrieval_heads:
            selection = select_top_p(
                index_query,
                index_key,
                index_heads=index_heads,
                length=length,
                start=start,
                top_p=top_p,
                min_tokens=min_tokens,
                block_size=block_size,
                index_scale=index_scale,
                workspace=workspace,
                backend=backend,
            )
    return decode_attention(
        query,
        full_key,
        full_value,
        window_key,
        window_value,
        selection,
        retrieval_heads=retrieval_heads,
        full_slot=full_slot,
        window_slot=window_slot,
        length=length,
        start=start,
        window=window,
        num_sinks=num_sinks,
        block_size=block_size,
        scale=scale,
        out=out,
        softcap=softcap,
        sink_logits=sink_logits,
        key_scale=key_scale,
        value_scale=value_scale,
        workspace=workspace,
        backend=backend,
        new_tokens=new_tokens,
    )


set_eager_step(decode_step)
