"""The kernel of `decode.py`, which has the contract and the wrapper.

Two passes, each over one flat row of work units (BLOCK_N keys) that is cut into equal contiguous shares, one a CTA: the
local heads over sinks + window, then the retrieval heads over their lists. What a share does not finish, a second
launch merges. Local heads need nothing of the selection. Where the launch before this one appends and selects (EARLY),
they run beside it: they take the step's own tokens from where they came, and no slot that is being written is theirs.
"""

from __future__ import annotations

from .common import HAS_TRITON, tl, triton

if HAS_TRITON:
    from .launches import after_previous

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
    def _share(i_cta, num_shares, num_units):
        """The units of a CTA: `num_shares` equal parts, the first ones longer by one unit where it does not divide."""
        size = num_units // num_shares
        longer = num_units % num_shares
        begin = i_cta * size + tl.minimum(i_cta, longer)
        return begin, begin + size + (i_cta < longer).to(tl.int32)

    @triton.jit
    def _owner(i_unit, num_shares, num_units):
        """The CTA whose share holds a unit."""
        size = num_units // num_shares
        longer = num_units % num_shares
        split = longer * (size + 1)
        return tl.where(i_unit < split, i_unit // (size + 1), longer + (i_unit - split) // tl.maximum(size, 1))

    @triton.jit
    def _item_of(i_unit, b_ends, b_units, b_tokens, ITEMS: tl.constexpr):
        """The item that a unit belongs to, its units, its tokens, and its first unit."""
        o_item = tl.arange(0, ITEMS)
        i_item = tl.sum((b_ends <= i_unit).to(tl.int32), 0)
        item_units = tl.sum(tl.where(o_item == i_item, b_units, 0), 0)
        item_tokens = tl.sum(tl.where(o_item == i_item, b_tokens, 0), 0)
        item_first = tl.sum(tl.where(o_item == i_item, b_ends, 0), 0) - item_units
        return i_item, item_units, item_tokens, item_first

    @triton.jit
    def _local_units(
        p_start,
        length,
        num_local,
        batch,
        q_len,
        window,
        num_sinks,
        ITEMS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        LEAD: tl.constexpr,
        HAS_START: tl.constexpr,
    ):
        """Tokens and units `[ITEMS]` of the (batch, KV head) pairs with local query heads.

        LEAD empty units stand for the time to begin an item; with them an item without keys still writes its zeros.
        """
        o_item = tl.arange(0, ITEMS)
        m_item = o_item < batch * num_local
        b_begin = tl.zeros([ITEMS], dtype=tl.int32)
        if HAS_START:
            p_begin = p_start + o_item // tl.maximum(num_local, 1)
            b_begin = tl.load(p_begin, mask=m_item, other=0, cache_modifier=".cg").to(tl.int32)
        b_real = length - b_begin
        b_low = tl.maximum(b_real - q_len + 1 - window, num_sinks)
        b_tokens = tl.maximum(tl.minimum(b_real, num_sinks), 0) + tl.maximum(b_real - b_low, 0)
        return b_tokens, tl.where(m_item, tl.cdiv(b_tokens, BLOCK_N) + LEAD, 0)

    @triton.jit
    def _listed_units(
        p_counts, num_rows, ITEMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, LEAD: tl.constexpr
    ):
        """Tokens and units `[ITEMS]` of the (batch, retrieval head, query) rows, as their lists are long."""
        o_item = tl.arange(0, ITEMS)
        m_item = o_item < num_rows
        b_tokens = tl.load(p_counts + o_item, mask=m_item, other=0, cache_modifier=".cg") * BLOCK
        return b_tokens, tl.where(m_item, tl.cdiv(b_tokens, BLOCK_N) + LEAD, 0)

    @triton.jit
    def _absorb(
        b_query,
        b_key,
        b_value,
        b_key_scale,
        b_value_scale,
        m_seen,
        b_max,
        b_sum,
        b_out,
        scale,
        softcap,
        HAS_SOFTCAP: tl.constexpr,
        QUANTISED: tl.constexpr,
    ):
        """The running maximum, sum and output after one more tile of keys and values `[N, BLOCK_D]`."""
        LOG2E: tl.constexpr = 1.4426950408889634
        # [BLOCK_M, N]
        if QUANTISED:
            b_score = tl.dot(b_query, tl.trans(b_key.to(b_query.dtype)), input_precision="ieee")
            b_score *= b_key_scale[None, :] * scale
        else:
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            b_score = softcap * (1.0 - 2.0 / (tl.exp2(b_score * (2.0 * LOG2E) / softcap) + 1.0))
        b_score *= LOG2E
        b_top = tl.maximum(b_max, tl.max(tl.where(m_seen, b_score, -1e30), 1))
        b_weight = tl.where(m_seen, tl.exp2(b_score - b_top[:, None]), 0.0)
        b_keep = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_keep + tl.sum(b_weight, 1)
        b_out = b_out * b_keep[:, None]
        if QUANTISED:
            # 8-bit values are exact in the query's dtype; of the scales only the largest of the tile is left out
            top_scale = tl.max(b_value_scale, 0)
            b_weight *= (b_value_scale / tl.maximum(top_scale, 1e-30))[None, :]
            b_tile = tl.dot(b_weight.to(b_query.dtype), b_value.to(b_query.dtype), input_precision="ieee")
            b_out += b_tile * top_scale
        else:
            b_out = tl.dot(b_weight.to(b_value.dtype), b_value, b_out, input_precision="ieee")
        return b_top, b_sum, b_out

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
        real,
        begin,
        q_len,
        window,
        num_sinks,
        ring,
        in_ring,
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
        LOCAL: tl.constexpr,
        FRESH: tl.constexpr,
    ):
        """Running maximum, sum and output of a tile of query rows over a part of an item's tokens, from one store.

        The tokens are those of the list, or with LOCAL the sinks and the window; with FRESH without the step's own.
        """
        o_n = tl.arange(0, BLOCK_N)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        b_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        stored = real
        if FRESH:
            stored = real - q_len
        if LOCAL:
            sinks = tl.minimum(real, num_sinks)
            low = tl.maximum(real - q_len + 1 - window, num_sinks)
            # from a position to its slot: one shift up to `turn_pos`, another from there on; the window passes the end
            # of the ring once at most
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
        for i_step in tl.range(first_step, stop_step, num_stages=STAGES):
            o_token = i_step * BLOCK_N + o_n
            m_token = o_token < item_tokens
            if LOCAL:
                b_pos = tl.where(o_token < sinks, o_token, low - sinks + o_token)
                b_shift = tl.where(b_pos < turn_pos, shift, turned_shift)
                b_slot = b_pos + tl.where(b_pos < num_sinks, sink_shift, b_shift)
            else:
                b_block = tl.load(p_list + o_token // BLOCK, mask=m_token, other=0)
                b_pos = b_block * BLOCK + o_token % BLOCK
                b_slot = b_pos + begin
            b_slot = b_slot.to(tl.int64)
            # a list of single tokens holds none that its row does not see: positions are then no part of the mask,
            # which would take them through shared memory to where the scores are
            CHECKED: tl.constexpr = LOCAL or BLOCK > 1
            if CHECKED:
                m_token = m_token & (b_pos < stored)
            m_load = m_token[:, None] & m_dim[None, :]
            # [BLOCK_N, BLOCK_D]
            b_key = tl.load(p_key + b_slot[:, None] * stride_kn + o_dim[None, :], mask=m_load, other=0.0)
            b_value = tl.load(p_value + b_slot[:, None] * stride_vn + o_dim[None, :], mask=m_load, other=0.0)
            b_key_scale = scale
            b_value_scale = scale
            if QUANTISED:
                b_key_scale = tl.load(p_key_scale + b_slot, mask=m_token, other=0.0).to(tl.float32)
                b_value_scale = tl.load(p_value_scale + b_slot, mask=m_token, other=0.0).to(tl.float32)
            m_seen = m_token[None, :]
            if CHECKED:
                b_distance = b_q_pos[:, None] - b_pos[None, :]
                m_seen = (b_distance >= 0) & m_seen
            if LOCAL:
                m_seen = m_seen & ((b_distance < window) | (b_pos < num_sinks)[None, :])
            b_max, b_sum, b_out = _absorb(
                b_query, b_key, b_value, b_key_scale, b_value_scale, m_seen, b_max, b_sum, b_out, scale, softcap,
                HAS_SOFTCAP, QUANTISED,
            )  # fmt: skip
        return b_max, b_sum, b_out

    @triton.jit
    def _attend_new_tokens(
        p_key,
        p_value,
        b_query,
        b_q_pos,
        b_max,
        b_sum,
        b_out,
        real,
        q_len,
        window,
        num_sinks,
        stride_kn,
        stride_vn,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):
        """The step's own tokens, at most 16, from where they came, for a tile of local rows."""
        o_n = tl.arange(0, 16)
        o_dim = tl.arange(0, BLOCK_D)
        b_pos = real - q_len + o_n
        m_token = (o_n < q_len) & (b_pos >= 0)
        m_load = m_token[:, None] & (o_dim < HEAD_DIM)[None, :]
        p_key += o_n[:, None] * stride_kn + o_dim[None, :]
        p_value += o_n[:, None] * stride_vn + o_dim[None, :]
        b_key = tl.load(p_key, mask=m_load, other=0.0, cache_modifier=".cg")
        b_value = tl.load(p_value, mask=m_load, other=0.0, cache_modifier=".cg")
        b_distance = b_q_pos[:, None] - b_pos[None, :]
        m_near = (b_distance < window) | (b_pos < num_sinks)[None, :]
        m_seen = (b_distance >= 0) & m_near & m_token[None, :]
        return _absorb(
            b_query, b_key, b_value, scale, scale, m_seen, b_max, b_sum, b_out, scale, softcap, HAS_SOFTCAP, False
        )  # fmt: skip

    @triton.jit
    def _leave(
        b_max,
        b_sum,
        b_out,
        p_sink_logits,
        p_out,
        p_partial,
        p_stats,
        o_head,
        m_rows,
        m_write,
        o_target,
        i_slot,
        whole,
        HEAD_DIM: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        HAS_SINK_LOGITS: tl.constexpr,
    ):
        """Write the rows of an item that was done whole; else keep them for the merging, in place `i_slot`."""
        o_m = tl.arange(0, BLOCK_M)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        if whole:
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
            i_far = i_slot.to(tl.int64)
            tl.store(p_stats + i_far * (2 * BLOCK_M) + o_m, b_max, mask=m_rows)
            tl.store(p_stats + i_far * (2 * BLOCK_M) + BLOCK_M + o_m, b_sum, mask=m_rows)
            o_part = (i_far * BLOCK_M + o_m)[:, None] * HEAD_DIM + o_dim[None, :]
            tl.store(p_partial + o_part, b_out, mask=m_rows[:, None] & m_dim[None, :])

    @triton.jit
    def _decode_attention_kernel(
        p_query,
        p_full_key,
        p_full_value,
        p_full_key_scale,
        p_full_value_scale,
        p_window_key,
        p_window_value,
        p_new_key,
        p_new_value,
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
        stride_nkb,
        stride_nkh,
        stride_nkn,
        stride_nvb,
        stride_nvh,
        stride_nvn,
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
        LOCAL_ITEMS: tl.constexpr,
        LISTED_ITEMS: tl.constexpr,
        NUM_HEADS: tl.constexpr,
        LEAD: tl.constexpr,
        MERGE: tl.constexpr,
        SLICE: tl.constexpr,
        PARTIAL: tl.constexpr,
        COMBINE: tl.constexpr,
        EARLY: tl.constexpr,
        PDL: tl.constexpr,
        HAS_START: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_SINK_LOGITS: tl.constexpr,
        STAGES: tl.constexpr,
        LIST_STAGES: tl.constexpr,
        QUANTISED: tl.constexpr,
    ):
        """PARTIAL: both passes. COMBINE: the rows of items that several shares have a part in, in the shares' order.

        Tables (int32): local KV head [num_local], its store row [num_local], whether that is the ring [num_local],
        retrieval query head [num_retrieval], its row of the full store [num_retrieval]; for each query head
        whether it is local [NUM_HEADS], and its entry among the local KV heads or retrieval heads [NUM_HEADS].
        A CTA has four places for what it does not finish: in each pass one for an item that began before its share,
        and one for an item that begins in it.
        """
        if PARTIAL and not EARLY:
            after_previous(PDL)
        # what is read before a wait comes from L2: no cache nearer may still hold what it was
        length = tl.load(p_length, cache_modifier=".cg").to(tl.int32)
        p_retrieval = p_tables + 3 * num_local
        p_is_local = p_retrieval + 2 * num_retrieval
        i_cta = tl.program_id(0)
        o_local = tl.arange(0, LOCAL_ITEMS)
        o_listed = tl.arange(0, LISTED_ITEMS)
        o_m = tl.arange(0, BLOCK_M)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        b_tokens, b_units = _local_units(
            p_start, length, num_local, batch, q_len, window, num_sinks, LOCAL_ITEMS, BLOCK_N, LEAD, HAS_START
        )
        num_local_units = tl.sum(b_units, 0)
        b_ends = tl.cumsum(b_units, 0)
        if PARTIAL:
            i_unit, end_unit = _share(i_cta, num_shares, num_local_units)
            while i_unit < end_unit:
                i_item, item_units, item_tokens, item_first = _item_of(i_unit, b_ends, b_units, b_tokens, LOCAL_ITEMS)
                stop_unit = tl.minimum(end_unit, item_first + item_units)
                i_entry = i_item % num_local
                i_far = (i_item // num_local).to(tl.int64)
                i_kv = tl.load(p_tables + i_entry)
                i_store = tl.load(p_tables + num_local + i_entry).to(tl.int64)
                in_ring = tl.load(p_tables + 2 * num_local + i_entry) > 0
                o_head = i_kv * GROUP + o_m // q_len
                o_query = o_m % q_len
                m_rows = o_m < GROUP * q_len
                m_write = m_rows & (tl.load(p_is_local + o_head, mask=m_rows, other=0) > 0)
                begin = i_item * 0
                if HAS_START:
                    begin = tl.load(p_start + i_far, cache_modifier=".cg").to(tl.int32)
                real = length - begin
                # [BLOCK_M, BLOCK_D]
                o_q = i_far * stride_qb + o_head[:, None] * stride_qh + o_query[:, None] * stride_qm + o_dim[None, :]
                m_query = m_rows[:, None] & m_dim[None, :]
                b_query = tl.load(p_query + o_q, mask=m_query, other=0.0, cache_modifier=".cg")
                b_q_pos = real - q_len + o_query
                first_step = tl.maximum(i_unit - item_first - LEAD, 0)
                stop_step = stop_unit - item_first - LEAD
                p_key = p_window_key + i_far * stride_wkb + i_store * stride_wkh
                p_value = p_window_value + i_far * stride_wvb + i_store * stride_wvh
                stride_kn = tl.cast(stride_wkn, tl.int64)
                stride_vn = tl.cast(stride_wvn, tl.int64)
                p_key_scale = p_full_key_scale + i_far * stride_scb + i_store * stride_sch
                p_value_scale = p_full_value_scale + i_far * stride_scb + i_store * stride_sch
                if QUANTISED:
                    # the stores differ in type: each has a loop of its own
                    if in_ring:
                        b_max, b_sum, b_out = _attend_tokens(
                            p_key, p_value, p_key_scale, p_value_scale, p_indices,
                            b_query, b_q_pos, first_step, stop_step, item_tokens, real, begin,
                            q_len, window, num_sinks, ring, in_ring,
                            stride_kn, stride_vn, scale, softcap,
                            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK, STAGES, HAS_SOFTCAP, False, True, EARLY,
                        )  # fmt: skip
                    else:
                        b_max, b_sum, b_out = _attend_tokens(
                            p_full_key + i_far * stride_fkb + i_store * stride_fkh,
                            p_full_value + i_far * stride_fvb + i_store * stride_fvh,
                            p_key_scale, p_value_scale, p_indices,
                            b_query, b_q_pos, first_step, stop_step, item_tokens, real, begin,
                            q_len, window, num_sinks, ring, in_ring,
                            tl.cast(stride_fkn, tl.int64), tl.cast(stride_fvn, tl.int64), scale, softcap,
                            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK, STAGES, HAS_SOFTCAP, True, True, EARLY,
                        )  # fmt: skip
                else:
                    if not in_ring:
                        p_key = p_full_key + i_far * stride_fkb + i_store * stride_fkh
                        p_value = p_full_value + i_far * stride_fvb + i_store * stride_fvh
                        stride_kn = tl.cast(stride_fkn, tl.int64)
                        stride_vn = tl.cast(stride_fvn, tl.int64)
                    b_max, b_sum, b_out = _attend_tokens(
                        p_key, p_value, p_key_scale, p_value_scale, p_indices,
                        b_query, b_q_pos, first_step, stop_step, item_tokens, real, begin,
                        q_len, window, num_sinks, ring, in_ring,
                        stride_kn, stride_vn, scale, softcap,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK, STAGES, HAS_SOFTCAP, False, True, EARLY,
                    )  # fmt: skip
                if EARLY and stop_unit == item_first + item_units:
                    b_max, b_sum, b_out = _attend_new_tokens(
                        p_new_key + i_far * stride_nkb + i_kv * stride_nkh,
                        p_new_value + i_far * stride_nvb + i_kv * stride_nvh,
                        b_query, b_q_pos, b_max, b_sum, b_out, real, q_len, window, num_sinks, stride_nkn, stride_nvn,
                        scale, softcap, HEAD_DIM, BLOCK_D, HAS_SOFTCAP,
                    )  # fmt: skip
                o_target = i_far * stride_ob + o_query.to(tl.int64) * stride_om + o_head * stride_oh
                _leave(
                    b_max, b_sum, b_out, p_sink_logits, p_out, p_partial, p_stats, o_head, m_rows, m_write, o_target,
                    i_cta * 4 + (i_unit == item_first).to(tl.int32), stop_unit - i_unit == item_units,
                    HEAD_DIM, BLOCK_M, BLOCK_D, HAS_SINK_LOGITS,
                )  # fmt: skip
                i_unit = stop_unit
        # before the wait: a lookup by row would be one more way to memory after it
        b_entry = o_listed // q_len % tl.maximum(num_retrieval, 1)
        m_listed = o_listed < batch * num_retrieval * q_len
        b_heads = tl.load(p_retrieval + b_entry, mask=m_listed, other=0)
        b_stores = tl.load(p_retrieval + num_retrieval + b_entry, mask=m_listed, other=0)
        if PARTIAL and EARLY:
            after_previous(PDL)

        b_list_tokens, b_list_units = _listed_units(
            p_counts, batch * num_retrieval * q_len, LISTED_ITEMS, BLOCK, BLOCK_N, LEAD
        )
        num_list_units = tl.sum(b_list_units, 0)
        b_list_ends = tl.cumsum(b_list_units, 0)
        if PARTIAL:
            i_unit, end_unit = _share(i_cta, num_shares, num_list_units)
            while i_unit < end_unit:
                i_item, item_units, item_tokens, item_first = _item_of(
                    i_unit, b_list_ends, b_list_units, b_list_tokens, LISTED_ITEMS
                )
                stop_unit = tl.minimum(end_unit, item_first + item_units)
                i_far = (i_item // q_len // num_retrieval).to(tl.int64)
                i_head = tl.sum(tl.where(o_listed == i_item, b_heads, 0), 0)
                i_store = tl.sum(tl.where(o_listed == i_item, b_stores, 0), 0).to(tl.int64)
                o_head = i_head + o_m * 0
                o_query = i_item % q_len + o_m * 0
                m_rows = o_m < 1
                begin = i_item * 0
                if HAS_START:
                    begin = tl.load(p_start + i_far).to(tl.int32)
                real = length - begin
                o_q = i_far * stride_qb + o_head[:, None] * stride_qh + o_query[:, None] * stride_qm + o_dim[None, :]
                b_query = tl.load(p_query + o_q, mask=m_rows[:, None] & m_dim[None, :], other=0.0)
                b_max, b_sum, b_out = _attend_tokens(
                    p_full_key + i_far * stride_fkb + i_store * stride_fkh,
                    p_full_value + i_far * stride_fvb + i_store * stride_fvh,
                    p_full_key_scale + i_far * stride_scb + i_store * stride_sch,
                    p_full_value_scale + i_far * stride_scb + i_store * stride_sch,
                    p_indices + i_item.to(tl.int64) * stride_indices,
                    b_query, real - q_len + o_query,
                    tl.maximum(i_unit - item_first - LEAD, 0), stop_unit - item_first - LEAD, item_tokens, real, begin,
                    q_len, window, num_sinks, ring, False,
                    tl.cast(stride_fkn, tl.int64), tl.cast(stride_fvn, tl.int64), scale, softcap,
                    HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK, LIST_STAGES, HAS_SOFTCAP, QUANTISED, False, False,
                )  # fmt: skip
                o_target = i_far * stride_ob + o_query.to(tl.int64) * stride_om + o_head * stride_oh
                _leave(
                    b_max, b_sum, b_out, p_sink_logits, p_out, p_partial, p_stats, o_head, m_rows, m_rows, o_target,
                    i_cta * 4 + 2 + (i_unit == item_first).to(tl.int32), stop_unit - i_unit == item_units,
                    HEAD_DIM, BLOCK_M, BLOCK_D, HAS_SINK_LOGITS,
                )  # fmt: skip
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
                if tl.load(p_is_local + i_head) > 0:
                    i_item = i_batch * num_local + i_entry
                    i_row = i_head % GROUP * q_len + i_query
                    last_unit = tl.sum(tl.where(o_local == i_item, b_ends, 0), 0) - 1
                    item_first = last_unit + 1 - tl.sum(tl.where(o_local == i_item, b_units, 0), 0)
                    num_units = num_local_units
                    place = i_head * 0
                else:
                    i_item = (i_batch * num_retrieval + i_entry) * q_len + i_query
                    i_row = i_head * 0
                    last_unit = tl.sum(tl.where(o_listed == i_item, b_list_ends, 0), 0) - 1
                    item_first = last_unit + 1 - tl.sum(tl.where(o_listed == i_item, b_list_units, 0), 0)
                    num_units = num_list_units
                    place = i_head * 0 + 2
                cta_first = _owner(item_first, num_shares, num_units)
                cta_last = _owner(last_unit, num_shares, num_units)
                # PARTIAL waits for what all of the above comes from before it lets this launch begin
                after_previous(PDL)
                if cta_last > cta_first:
                    o_slice = i_work % SLICES * SLICE + tl.arange(0, SLICE)
                    m_slice = o_slice < HEAD_DIM
                    b_max = tl.full([1], -1e30, dtype=tl.float32)
                    b_sum = tl.zeros([1], dtype=tl.float32)
                    b_out = tl.zeros([1, SLICE], dtype=tl.float32)
                    for i_first in tl.range(cta_first, cta_last + 1, MERGE):
                        i_from = i_first + o_merge
                        m_from = i_from <= cta_last
                        i_slot = (i_from * 4 + place + (i_from == cta_first).to(tl.int32)).to(tl.int64)
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
