"""Decode attention of a layer: retrieval heads over their lists, local ones over sinks + window (PAPER section 5).

    out_h(m) = sum_{n in T_h(m)} softmax_n(scale * q_h(m) . k(n)) v(n)

`T_h(m)` is the selected set of a retrieval head (`score_select.py`), or, for a local head, the sinks and the
window: n <= m and (m - n < window or n < num_sinks), in logical positions. The stores are those of `append.py`: a
local head whose KV head lies in the full store reads its sinks and window there, the others read the ring. A full store
in 8 bits (`kv_quant.py`) is read as it is: a key's scale multiplies its score, a value's scale its weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .append import append_step, check_append
from .common import HAS_TRITON, masked_softmax, next_power_of_2, row_tiles, soft_cap, starts, tl, triton, use_triton
from .decode_ops import compiled_decode_step, set_eager_step
from .kv_quant import check_kv_scales
from .launches import launch_options
from .score_select import NewTokens, Selection, check_select, launch_select, select_top_p
from .workspace import DecodeWorkspace, head_table, num_processors, tile_rows


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


if HAS_TRITON:

    @triton.jit
    def _finish(
        b_max,
        b_sum,
        b_out,
        p_sink_logits,
        p_out,
        o_head,
        m_rows,
        o_target,
        o_dim,
        m_dim,
        HAS_SINK_LOGITS: tl.constexpr,
    ):
        """Divide by the mass (a learned sink logit adds to it) and write the rows; a row that saw nothing gives 0."""
        if HAS_SINK_LOGITS:
            b_logit = tl.load(p_sink_logits + o_head, mask=m_rows, other=0.0).to(tl.float32) * 1.4426950408889634
            b_new = tl.maximum(b_max, b_logit)
            b_keep = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_keep + tl.exp2(b_logit - b_new)
            b_out = b_out * b_keep[:, None]
        b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        m_out = m_rows[:, None] & m_dim[None, :]
        tl.store(p_out + o_target[:, None] + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)

    @triton.jit
    def _attend_tokens(
        p_key,
        p_value,
        p_key_scale,
        p_value_scale,
        p_list,
        b_query,
        b_q_pos,
        first_step,
        stop_step,
        item_tokens,
        listed_tokens,
        is_local,
        real,
        sinks,
        low,
        turn_pos,
        shift,
        turned_shift,
        sink_shift,
        reach,
        num_sinks,
        stride_kn,
        stride_vn,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        QUANTISED: tl.constexpr,
    ):
        """Running maximum, sum and output of a tile of query rows over a part of an item's tokens, from one store."""
        LOG2E: tl.constexpr = 1.4426950408889634
        o_n = tl.arange(0, BLOCK_N)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        b_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for i_step in tl.range(first_step, stop_step, num_stages=STAGES):
            o_token = i_step * BLOCK_N + o_n
            m_token = o_token < item_tokens
            b_block = tl.load(p_list + o_token // BLOCK, mask=o_token < listed_tokens, other=0)
            b_near = tl.where(o_token < sinks, o_token, low - sinks + o_token)
            b_pos = tl.where(is_local, b_near, b_block * BLOCK + o_token % BLOCK)
            # the window passes the end of the ring once at most
            b_shift = tl.where(b_pos < turn_pos, shift, turned_shift)
            b_slot = (b_pos + tl.where(b_pos < num_sinks, sink_shift, b_shift)).to(tl.int64)
            m_token = m_token & (b_pos < real)
            m_load = m_token[:, None] & m_dim[None, :]
            # [BLOCK_N, BLOCK_D]
            b_key = tl.load(p_key + b_slot[:, None] * stride_kn + o_dim[None, :], mask=m_load, other=0.0)
            # [BLOCK_M, BLOCK_N]
            if QUANTISED:
                b_key_scale = tl.load(p_key_scale + b_slot, mask=m_token, other=0.0).to(tl.float32)
                b_score = tl.dot(b_query, tl.trans(b_key.to(b_query.dtype)), input_precision="ieee")
                b_score *= b_key_scale[None, :] * scale
            else:
                b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                b_score = softcap * (1.0 - 2.0 / (tl.exp2(b_score * (2.0 * LOG2E) / softcap) + 1.0))
            b_score *= LOG2E
            b_distance = b_q_pos[:, None] - b_pos[None, :]
            m_near = (b_distance < reach) | (b_pos < num_sinks)[None, :]
            m_seen = (b_distance >= 0) & m_near & m_token[None, :]
            b_new = tl.maximum(b_max, tl.max(tl.where(m_seen, b_score, -1e30), 1))
            b_weight = tl.where(m_seen, tl.exp2(b_score - b_new[:, None]), 0.0)
            b_keep = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_keep + tl.sum(b_weight, 1)
            # [BLOCK_N, BLOCK_D]
            b_value = tl.load(p_value + b_slot[:, None] * stride_vn + o_dim[None, :], mask=m_load, other=0.0)
            b_out = b_out * b_keep[:, None]
            if QUANTISED:
                # 8-bit values are exact in the query's dtype; of the scales only the largest of the tile is left out
                b_value_scale = tl.load(p_value_scale + b_slot, mask=m_token, other=0.0).to(tl.float32)
                top_scale = tl.max(b_value_scale, 0)
                b_weight *= (b_value_scale / tl.maximum(top_scale, 1e-30))[None, :]
                b_tile = tl.dot(b_weight.to(b_query.dtype), b_value.to(b_query.dtype), input_precision="ieee")
                b_out += b_tile * top_scale
            else:
                b_out = tl.dot(b_weight.to(b_value.dtype), b_value, b_out, input_precision="ieee")
            b_max = b_new
        return b_max, b_sum, b_out

    @triton.jit
    def _decode_attention_kernel(
        p_query,
        p_full_key,
        p_full_value,
        p_full_key_scale,
        p_full_value_scale,
        p_window_key,
        p_window_value,
        p_indices,
        p_counts,
        p_tables,
        p_length,
        p_start,
        p_sink_logits,
        p_out,
        p_partial,
        p_stats,
        scale,
        softcap,
        num_local,
        num_retrieval,
        batch,
        q_len,
        num_shares,
        window,
        num_sinks,
        ring,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_fkb,
        stride_fkh,
        stride_fkn,
        stride_fvb,
        stride_fvh,
        stride_fvn,
        stride_scb,
        stride_sch,
        stride_wkb,
        stride_wkh,
        stride_wkn,
        stride_wvb,
        stride_wvh,
        stride_wvn,
        stride_ob,
        stride_om,
        stride_oh,
        stride_indices,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr,
        ITEMS: tl.constexpr,
        NUM_HEADS: tl.constexpr,
        LEAD: tl.constexpr,
        MERGE: tl.constexpr,
        SLICE: tl.constexpr,
        PARTIAL: tl.constexpr,
        COMBINE: tl.constexpr,
        PDL: tl.constexpr,
        HAS_START: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINK_LOGITS: tl.constexpr,
        STAGES: tl.constexpr,
        QUANTISED: tl.constexpr,
    ):
        """One flat row of work units (BLOCK_N keys each), cut into `num_shares` equal contiguous shares.

        Items: the (batch, KV head) pairs with local query heads, whose group is packed into the rows of a tile,
        then the (batch, retrieval head, query) rows. Two phases, a launch each. PARTIAL: a CTA takes a share, which
        may end one item and begin the next. COMBINE: the output rows of items that several shares have a part in
        are merged in the order of the shares.

        Tables (int32): local KV head [num_local], its store row [num_local], whether that is the ring [num_local],
        retrieval query head [num_retrieval], its row of the full store [num_retrieval]; for each query head
        whether it is local [NUM_HEADS], and its entry among the local KV heads or retrieval heads [NUM_HEADS].
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        length = tl.load(p_length).to(tl.int32)
        p_retrieval = p_tables + 3 * num_local
        p_is_local = p_retrieval + 2 * num_retrieval
        num_local_items = batch * num_local
        num_items = num_local_items + batch * num_retrieval * q_len

        # [ITEMS]: tokens and units of every item
        o_item = tl.arange(0, ITEMS)
        m_local = o_item < num_local_items
        b_begin = tl.zeros([ITEMS], dtype=tl.int32)
        if HAS_START:
            b_begin = tl.load(p_start + o_item // tl.maximum(num_local, 1), mask=m_local, other=0).to(tl.int32)
        b_real = length - b_begin
        b_low = tl.maximum(b_real - q_len + 1 - window, num_sinks)
        b_tokens = tl.maximum(tl.minimum(b_real, num_sinks), 0) + tl.maximum(b_real - b_low, 0)
        m_chosen = (o_item >= num_local_items) & (o_item < num_items)
        b_listed = tl.load(p_counts + o_item - num_local_items, mask=m_chosen, other=0) * BLOCK
        b_tokens = tl.where(m_local, b_tokens, b_listed)
        # LEAD empty units stand for the time to begin an item; with them an item without keys still writes its zeros
        b_units = tl.where(o_item < num_items, tl.cdiv(b_tokens, BLOCK_N) + LEAD, 0)
        b_ends = tl.cumsum(b_units, 0)
        num_units = tl.sum(b_units, 0)

        i_cta = tl.program_id(0)
        num_ctas = tl.minimum(num_shares, num_units)
        i_unit = (tl.cast(i_cta, tl.int64) * num_units // num_ctas).to(tl.int32)
        end_unit = (tl.cast(i_cta + 1, tl.int64) * num_units // num_ctas).to(tl.int32)
        end_unit = tl.where(i_cta < num_ctas, end_unit, i_unit)

        o_m = tl.arange(0, BLOCK_M)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        if not PARTIAL:
            end_unit = i_unit
        while i_unit < end_unit:
            i_item = tl.sum((b_ends <= i_unit).to(tl.int32), 0)
            item_units = tl.sum(tl.where(o_item == i_item, b_units, 0), 0)
            item_tokens = tl.sum(tl.where(o_item == i_item, b_tokens, 0), 0)
            item_first = tl.sum(tl.where(o_item == i_item, b_ends, 0), 0) - item_units
            stop_unit = tl.minimum(end_unit, item_first + item_units)
            is_local = i_item < num_local_items
            if is_local:
                i_batch = i_item // num_local
                i_entry = i_item % num_local
                i_head = tl.load(p_tables + i_entry) * GROUP
                i_store = tl.load(p_tables + num_local + i_entry)
                in_ring = tl.load(p_tables + 2 * num_local + i_entry) > 0
                o_head = i_head + o_m // q_len
                o_query = o_m % q_len
                m_rows = o_m < GROUP * q_len
                m_write = m_rows & (tl.load(p_is_local + o_head, mask=m_rows, other=0) > 0)
            else:
                i_row = i_item - num_local_items
                i_batch = i_row // q_len // num_retrieval
                i_entry = (i_row // q_len) % num_retrieval
                i_head = tl.load(p_retrieval + i_entry)
                i_store = tl.load(p_retrieval + num_retrieval + i_entry)
                in_ring = i_item < 0
                o_head = i_head + o_m * 0
                o_query = i_row % q_len + o_m * 0
                m_rows = o_m < 1
                m_write = m_rows
            begin = i_batch * 0
            if HAS_START:
                begin = tl.load(p_start + i_batch).to(tl.int32)
            i_far = i_batch.to(tl.int64)
            i_store = i_store.to(tl.int64)
            if QUANTISED:
                # the stores differ in type: each has a loop of its own below
                p_key_scale = p_full_key_scale + i_far * stride_scb + i_store * stride_sch
                p_value_scale = p_full_value_scale + i_far * stride_scb + i_store * stride_sch
                p_ring_key = p_window_key + i_far * stride_wkb + i_store * stride_wkh
                p_ring_value = p_window_value + i_far * stride_wvb + i_store * stride_wvh
                p_key = p_full_key + i_far * stride_fkb + i_store * stride_fkh
                p_value = p_full_value + i_far * stride_fvb + i_store * stride_fvh
            elif in_ring:
                p_key = p_window_key + i_far * stride_wkb + i_store * stride_wkh
                p_value = p_window_value + i_far * stride_wvb + i_store * stride_wvh
                stride_kn = tl.cast(stride_wkn, tl.int64)
                stride_vn = tl.cast(stride_wvn, tl.int64)
            else:
                p_key = p_full_key + i_far * stride_fkb + i_store * stride_fkh
                p_value = p_full_value + i_far * stride_fvb + i_store * stride_fvh
                stride_kn = tl.cast(stride_fkn, tl.int64)
                stride_vn = tl.cast(stride_fvn, tl.int64)
            p_list = p_indices + tl.maximum(i_item - num_local_items, 0).to(tl.int64) * stride_indices
            real = length - begin
            sinks = tl.minimum(real, num_sinks)
            low = tl.maximum(real - q_len + 1 - window, num_sinks)
            b_q_pos = real - q_len + o_query
            # from a position to its slot: one shift up to `turn_pos`, another from there on
            sink_shift = begin
            shift = begin
            turned_shift = begin
            turn_pos = num_sinks
            if in_ring:
                lap = (low - num_sinks) // ring
                sink_shift = begin * 0
                shift = -lap * ring
                turned_shift = shift - ring
                turn_pos = (lap + 1) * ring + num_sinks
            reach = tl.where(is_local, window, 1 << 30)
            listed_tokens = tl.where(is_local, 0, item_tokens)
            # [BLOCK_M, BLOCK_D]
            o_q = i_far * stride_qb + o_head[:, None] * stride_qh + o_query[:, None] * stride_qm + o_dim[None, :]
            b_query = tl.load(p_query + o_q, mask=m_rows[:, None] & m_dim[None, :], other=0.0)

            first_step = tl.maximum(i_unit - item_first - LEAD, 0)
            stop_step = stop_unit - item_first - LEAD
            if QUANTISED:
                if in_ring:
                    b_max, b_sum, b_out = _attend_tokens(
                        p_ring_key,
                        p_ring_value,
                        p_key_scale,
                        p_value_scale,
                        p_list,
                        b_query,
                        b_q_pos,
                        first_step,
                        stop_step,
                        item_tokens,
                        listed_tokens,
                        is_local,
                        real,
                        sinks,
                        low,
                        turn_pos,
                        shift,
                        turned_shift,
                        sink_shift,
                        reach,
                        num_sinks,
                        tl.cast(stride_wkn, tl.int64),
                        tl.cast(stride_wvn, tl.int64),
                        scale,
                        softcap,
                        HEAD_DIM,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK,
                        STAGES,
                        HAS_SOFTCAP,
                        False,
                    )
                else:
                    b_max, b_sum, b_out = _attend_tokens(
                        p_key,
                        p_value,
                        p_key_scale,
                        p_value_scale,
                        p_list,
                        b_query,
                        b_q_pos,
                        first_step,
                        stop_step,
                        item_tokens,
                        listed_tokens,
                        is_local,
                        real,
                        sinks,
                        low,
                        turn_pos,
                        shift,
                        turned_shift,
                        sink_shift,
                        reach,
                        num_sinks,
                        tl.cast(stride_fkn, tl.int64),
                        tl.cast(stride_fvn, tl.int64),
                        scale,
                        softcap,
                        HEAD_DIM,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK,
                        STAGES,
                        HAS_SOFTCAP,
                        True,
                    )
            else:
                b_max, b_sum, b_out = _attend_tokens(
                    p_key,
                    p_value,
                    p_full_key_scale,
                    p_full_value_scale,
                    p_list,
                    b_query,
                    b_q_pos,
                    first_step,
                    stop_step,
                    item_tokens,
                    listed_tokens,
                    is_local,
                    real,
                    sinks,
                    low,
                    turn_pos,
                    shift,
                    turned_shift,
                    sink_shift,
                    reach,
                    num_sinks,
                    stride_kn,
                    stride_vn,
                    scale,
                    softcap,
                    HEAD_DIM,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK,
                    STAGES,
                    HAS_SOFTCAP,
                    False,
                )

            if PARTIAL:
                whole = stop_unit - i_unit == item_units
                if whole:
                    o_target = i_far * stride_ob + o_query.to(tl.int64) * stride_om + o_head * stride_oh
                    _finish(
                        b_max,
                        b_sum,
                        b_out,
                        p_sink_logits,
                        p_out,
                        o_head,
                        m_write,
                        o_target,
                        o_dim,
                        m_dim,
                        HAS_SINK_LOGITS,
                    )
                else:
                    # a CTA's first place is for an item that began before it, its second for one that begins in it
                    i_slot = (i_cta * 2 + (i_unit == item_first).to(tl.int32)).to(tl.int64)
                    tl.store(p_stats + i_slot * (2 * BLOCK_M) + o_m, b_max, mask=m_rows)
                    tl.store(p_stats + i_slot * (2 * BLOCK_M) + BLOCK_M + o_m, b_sum, mask=m_rows)
                    o_part = (i_slot * BLOCK_M + o_m)[:, None] * HEAD_DIM + o_dim[None, :]
                    tl.store(p_partial + o_part, b_out, mask=m_rows[:, None] & m_dim[None, :])
            i_unit = stop_unit

        if COMBINE:
            SLICES: tl.constexpr = BLOCK_D // SLICE
            o_merge = tl.arange(0, MERGE)
            o_one = tl.arange(0, 1)
            num_heads = NUM_HEADS
            for i_work in tl.range(i_cta, batch * q_len * num_heads * SLICES, tl.num_programs(0)):
                i_head = i_work // SLICES % num_heads
                i_query = i_work // SLICES // num_heads % q_len
                i_batch = i_work // SLICES // num_heads // q_len
                i_entry = tl.load(p_is_local + num_heads + i_head)
                i_row = i_head % GROUP * q_len + i_query
                i_item = i_batch * num_local + i_entry
                if tl.load(p_is_local + i_head) == 0:
                    i_row = i_head * 0
                    i_item = num_local_items + (i_batch * num_retrieval + i_entry) * q_len + i_query
                item_units = tl.sum(tl.where(o_item == i_item, b_units, 0), 0)
                item_first = tl.sum(tl.where(o_item == i_item, b_ends, 0), 0) - item_units
                # the CTA whose share holds unit u is the last one that begins at u or before
                cta_first = ((tl.cast(item_first + 1, tl.int64) * num_ctas - 1) // num_units).to(tl.int32)
                last_unit = item_first + item_units
                cta_last = ((tl.cast(last_unit, tl.int64) * num_ctas - 1) // num_units).to(tl.int32)
                if cta_last > cta_first:
                    o_slice = i_work % SLICES * SLICE + tl.arange(0, SLICE)
                    m_slice = o_slice < HEAD_DIM
                    b_max = tl.full([1], -1e30, dtype=tl.float32)
                    b_sum = tl.zeros([1], dtype=tl.float32)
                    b_out = tl.zeros([1, SLICE], dtype=tl.float32)
                    for i_first in tl.range(cta_first, cta_last + 1, MERGE):
                        i_from = i_first + o_merge
                        m_from = i_from <= cta_last
                        i_slot = (i_from * 2 + (i_from == cta_first).to(tl.int32)).to(tl.int64)
                        p_stat = p_stats + i_slot * (2 * BLOCK_M) + i_row
                        b_part_max = tl.load(p_stat, mask=m_from, other=-1e30, cache_modifier=".cg")
                        b_part_sum = tl.load(p_stat + BLOCK_M, mask=m_from, other=0.0, cache_modifier=".cg")
                        # [MERGE, SLICE]
                        b_part = tl.load(
                            p_partial + (i_slot * BLOCK_M + i_row)[:, None] * HEAD_DIM + o_slice[None, :],
                            mask=m_from[:, None] & m_slice[None, :],
                            other=0.0,
                            cache_modifier=".cg",
                        )
                        b_new = tl.maximum(b_max, tl.max(b_part_max, 0))
                        b_keep = tl.exp2(b_max - b_new)
                        b_weight = tl.exp2(b_part_max - tl.max(b_new, 0))
                        b_sum = b_sum * b_keep + tl.sum(b_part_sum * b_weight, 0)
                        b_out = b_out * b_keep[:, None] + tl.sum(b_part * b_weight[:, None], 0)[None, :]
                        b_max = b_new
                    o_target = tl.cast(i_batch, tl.int64) * stride_ob + i_query * stride_om + i_head * stride_oh
                    _finish(
                        b_max,
                        b_sum,
                        b_out,
                        p_sink_logits,
                        p_out,
                        i_head + o_one,
                        o_one < 1,
                        o_target + o_one,
                        o_slice,
                        m_slice,
                        HAS_SINK_LOGITS,
                    )


# by capability: CTAs a multiprocessor holds, keys of a tile for 128 dimensions, warps, pipeline stages
_ATTEND_CONFIG = {"ctas": 2, "tile_keys": 32, "warps": 4, "stages": 5, "registers": 255, "lead": 2}


def _layer_tables(
    num_heads: int, retrieval_heads: tuple[int, ...], full_slot: tuple[int, ...], window_slot: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """How many KV heads have local query heads, and the kernel's tables (see `_decode_attention_kernel`)."""
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
) -> torch.Tensor:
    """Attention of every query head of one layer for a decode step, without a host synchronisation.

    Two launches: the shares of the work, and the merging of rows that were split. A barrier inside one launch was
    measured to take longer (H100: 33.7 us against 32.2 us for a step at 32K tokens).

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

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
    """
    _check_attend(query, full_key, window_key, selection, retrieval_heads, full_slot, window_slot, out)
    check_kv_scales(full_key, full_value, key_scale, value_scale)
    if not use_triton(backend, query):
        return decode_attention_reference(
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
        )
    batch, num_heads, q_len, head_dim = query.shape
    group = num_heads // len(full_slot)
    device = query.device
    num_local, tables = _layer_tables_cached(num_heads, retrieval_heads, full_slot, window_slot)
    num_items = batch * num_local + batch * len(retrieval_heads) * q_len
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
    ctas = _ATTEND_CONFIG["ctas"] if block_m == 16 else 1
    shares = min(ctas * num_processors(device), workspace.ctas)
    arguments = (
        query,
        full_key,
        full_value,
        full_key if key_scale is None else key_scale,
        full_value if value_scale is None else value_scale,
        window_key,
        window_value,
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
        "ITEMS": next_power_of_2(max(num_items, 2)),
        "NUM_HEADS": num_heads,
        "LEAD": _ATTEND_CONFIG["lead"],
        "MERGE": 128 if on_gpu else 4,
        "SLICE": min(32, block_d),
        "HAS_START": start is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SINK_LOGITS": sink_logits is not None,
        "STAGES": _ATTEND_CONFIG["stages"],
        "QUANTISED": key_scale is not None,
        "num_warps": _ATTEND_CONFIG["warps"] if block_m <= 32 else 8,
        "maxnreg": _ATTEND_CONFIG["registers"],
    }
    slices = batch * q_len * num_heads * (block_d // constants["SLICE"])
    for phase, grid in (("PARTIAL", shares), ("COMBINE", min(slices, 4 * num_processors(device)))):
        own = {"PARTIAL": phase == "PARTIAL", "COMBINE": phase == "COMBINE"}
        _decode_attention_kernel[(grid,)](*arguments, **constants, **own, **launch_options(device))
    return out


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
    """A layer's whole decode step: append, select, attend; four launches where the layer has retrieval heads.

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
    selection = None
    if retrieval_heads and top_p < 1.0 and use_triton(backend, query):
        if index_query is None or index_key_new is None:
            raise ValueError("a layer with retrieval heads needs index_query and index_key_new, got None")
        check_append(key, value, index_key_new, full_key, index_key, window_key, full_slot, window_slot, index_scale)
        check_kv_scales(full_key, full_value, key_scale, value_scale)
        check_select(index_query, index_key, index_heads, block_size)
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
            NewTokens(
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
            ),
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
    )


set_eager_step(decode_step)
