"""The first phase of `score_select.py`: score a share of one row's keys, and count the scores."""

from __future__ import annotations

from .common import HAS_TRITON, tl, triton

if HAS_TRITON:
    from .append import quantize_index_row

    @triton.jit
    def _new_score(p_query, p_new, p_key, p_scale, HEAD: tl.constexpr, PADDED: tl.constexpr, INT8: tl.constexpr):
        """The score of a token whose index key is not in the store yet, rounded as the store would."""
        o_dim = tl.arange(0, PADDED)
        b_query = tl.load(p_query + o_dim, mask=o_dim < HEAD, other=0.0)
        b_new = tl.load(p_new + o_dim, mask=o_dim < HEAD, other=0.0)
        if INT8:
            b_new, scale = quantize_index_row(b_new, p_scale.dtype.element_ty)
            b_new *= scale.to(tl.float32)
        else:
            b_new = b_new.to(p_key.dtype.element_ty).to(tl.float32)
        return tl.sum(b_query.to(tl.float32) * b_new, 0)

    @triton.jit
    def load_query(p_query, num_dims, PADDED: tl.constexpr, LANES: tl.constexpr):
        """`num_dims` of a query: `[PADDED]`; and `[LANES * PADDED, LANES]`, in column t from row t * PADDED on.

        One product with the matrix scores LANES keys.
        """
        o_k = tl.arange(0, LANES * PADDED)
        o_t = tl.arange(0, LANES)
        o_dim = tl.arange(0, PADDED)
        mine = ((o_k // PADDED)[:, None] == o_t[None, :]) & ((o_k % PADDED) < num_dims)[:, None]
        b_matrix = tl.load(p_query + (o_k % PADDED)[:, None] + 0 * o_t[None, :], mask=mine, other=0.0)
        return tl.load(p_query + o_dim, mask=o_dim < num_dims, other=0.0), b_matrix

    @triton.jit
    def score_range(
        b_line,
        b_matrix,
        p_query,
        p_key,
        p_scale,
        p_codes,
        p_tile_max,
        p_histogram,
        p_sums,
        p_peak,
        p_new,
        num_new,
        num_seen,
        first_key,
        last_key,
        stride_kn,
        stride_sn,
        stride_xn,
        HEAD: tl.constexpr,
        PADDED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
        BINS: tl.constexpr,
        SPAN: tl.constexpr,
        ZERO: tl.constexpr,
        STEPS: tl.constexpr,
        SPLIT_QUERY: tl.constexpr,
        INT8: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        STAGES: tl.constexpr,
        COUNTING: tl.constexpr,
        CONSTRAINTS: tl.constexpr,
        ELEMENTS: tl.constexpr,
        APPEND: tl.constexpr,
        MIN_TILE: tl.constexpr,
        GROUP: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """Score keys `first_key..last_key` of one query row; leave their codes, tile maxima and one histogram behind.

        Its tiles begin at `first_key`; the last one may be short. `p_tile_max` has one place for each MIN_TILE keys.

        Scores are counted in steps of 1/STEPS octave, floor(STEPS * log2(e) * s): absolute numbers, so that all
        CTAs share their bin edges. A CTA's counts are added to the row's, where a step has its own place. Its running
        sums are kept, over the BINS - 1 steps from its largest (`peak`) down: they tell how much of the list precedes
        each CTA. A code is the distance to the maximum of its GROUP. WHOLE codes are written at a time, and past the
        last key some that no one reads.

        With APPEND the last `num_new` of the keys come from `p_new`: the store may not hold them yet.
        """
        # a store of whole codes must not reach into the next share
        tl.static_assert(MIN_TILE % (WHOLE * BLOCK) == 0)
        TILE: tl.constexpr = ROWS * LANES
        UNITS: tl.constexpr = TILE // BLOCK
        LOG2E: tl.constexpr = 1.4426950408889634
        FLOOR: tl.constexpr = -32768
        GROUPS: tl.constexpr = UNITS // GROUP
        APART: tl.constexpr = GROUP * BLOCK // MIN_TILE
        o_group = tl.arange(0, GROUPS)
        o_row = tl.arange(0, ROWS)
        o_lane = tl.arange(0, LANES)
        o_k = tl.arange(0, LANES * PADDED)
        o_bin = tl.arange(0, BINS)
        # [LANES * PADDED, LANES]
        b_query = b_matrix.to(tl.float32)
        factor = LOG2E
        if INT8:
            # 14 bits of the query in two int8 parts: the products are exact
            largest = tl.maximum(tl.max(tl.abs(b_line.to(tl.float32)), 0), 1e-30)
            b_query = tl.floor(b_query * (8128.0 / largest) + 0.5)
            b_upper = tl.floor((b_query + 64.0) * (1.0 / 128.0))
            b_high = b_upper.to(tl.int8)
            b_low = (b_query - 128.0 * b_upper).to(tl.int8)
            factor = factor * (largest * (1.0 / 8128.0))
        else:
            b_high = b_query.to(p_key.dtype.element_ty)
            if SPLIT_QUERY:
                b_low = (b_query - b_high.to(tl.float32)).to(p_key.dtype.element_ty)
        if CONTIGUOUS:
            o_key = o_row[:, None] * (LANES * PADDED) + o_k[None, :]
        else:
            o_key = (o_row[:, None] * LANES + (o_k // PADDED)[None, :]) * stride_kn + (o_k % PADDED)[None, :]
        o_token = o_row[:, None] * LANES + o_lane[None, :]
        # in a circle, bin = step mod BINS
        b_histogram = tl.zeros([BINS], dtype=tl.int32)
        b_peak = tl.full([GROUPS], FLOOR, tl.int32)
        num_keys = tl.minimum(last_key, num_seen) - first_key
        num_stored = num_keys
        if APPEND:
            # a slot that is being written may hold anything, which zeros of the query's matrix need not cancel
            num_stored = tl.minimum(last_key, num_seen - num_new) - first_key
        p_key += tl.cast(first_key, tl.int64) * stride_kn
        p_codes += first_key // BLOCK
        p_tile_max += first_key // MIN_TILE
        if INT8:
            p_scale += tl.cast(first_key, tl.int64) * stride_sn
            b_next = tl.load(p_scale + o_token * stride_sn, mask=o_token < num_keys, other=0.0)
        num_tiles = tl.cdiv(num_keys, TILE)
        for i_tile in tl.range(0, num_tiles, num_stages=STAGES):
            left = num_keys - i_tile * TILE
            m_key = (o_row[:, None] * LANES + (o_k // PADDED)[None, :]) < num_stored - i_tile * TILE
            if HEAD != PADDED:
                m_key = m_key & ((o_k % PADDED) < HEAD)[None, :]
            # [ROWS, LANES * PADDED]
            p_tile = p_key + tl.cast(i_tile * TILE, tl.int64) * stride_kn
            b_key = tl.load(p_tile + o_key, mask=m_key, other=0)
            # [ROWS, LANES]
            if INT8:
                b_score = (tl.dot(b_key, b_high) * 128 + tl.dot(b_key, b_low)).to(tl.float32)
                b_scale = b_next
                # scales are few and no operand of a dot: they are fetched one tile ahead by hand
                b_next = tl.load(
                    p_scale + tl.cast((i_tile + 1) * TILE, tl.int64) * stride_sn + o_token * stride_sn,
                    mask=o_token < left - TILE,
                    other=0.0,
                )
                b_score *= b_scale.to(tl.float32)
            else:
                b_score = tl.dot(b_key, b_high, input_precision="ieee")
                if SPLIT_QUERY:
                    b_score = tl.dot(b_key, b_low, b_score, input_precision="ieee")
            b_score *= factor
            # where the new keys begin in this tile, which may lie past the end of the share
            first_new = num_seen - num_new - first_key - i_tile * TILE
            if APPEND and first_new < TILE:
                for i_new in tl.range(0, num_new):
                    new_score = _new_score(p_query, p_new + i_new * stride_xn, p_key, p_scale, HEAD, PADDED, INT8)
                    b_score = tl.where(o_token == first_new + i_new, new_score * LOG2E, b_score)
            if BLOCK == 1:
                b_value = b_score * STEPS
                m_unit = o_token < left
                o_unit = o_token
            else:
                b_score = tl.where(o_token < left, b_score, -1e30)
                b_block = tl.reshape(b_score, [UNITS, BLOCK])
                b_top = tl.max(b_block, 1)
                b_value = (b_top + tl.log2(tl.sum(tl.exp2(b_block - b_top[:, None]), 1))) * STEPS
                o_unit = tl.arange(0, UNITS)
                m_unit = o_unit * BLOCK < left
            b_step = tl.minimum(tl.maximum(tl.floor(b_value), 1.0 - ZERO), SPAN - ZERO - 1.0).to(tl.int32)
            b_step = tl.where(m_unit, b_step, FLOOR)
            b_units = tl.reshape(b_step, [GROUPS, GROUP])
            b_top = tl.max(b_units, 1)
            b_code = tl.reshape(tl.minimum(b_top[:, None] - b_units, BINS - 1), b_step.shape)
            m_code = o_unit // WHOLE * WHOLE * BLOCK < left
            tl.store(p_codes + tl.cast(i_tile, tl.int64) * UNITS + o_unit, b_code.to(tl.uint8), mask=m_code)
            if COUNTING != "":
                b_tops = tl.reshape(tl.broadcast_to(b_top[:, None], [GROUPS, GROUP]), b_step.shape)
                call = (i_tile == 0).to(tl.int32) + (i_tile == num_tiles - 1).to(tl.int32) * 2
                b_zero = o_token * 0
                tl.inline_asm_elementwise(
                    COUNTING,
                    CONSTRAINTS,
                    [
                        b_step + ZERO,
                        m_unit.to(tl.int32),
                        b_zero + call,
                        b_tops,
                        p_tile_max + i_tile * GROUPS + b_zero,
                        p_histogram + b_zero,
                        p_sums + b_zero,
                        p_peak + b_zero,
                    ],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=ELEMENTS,
                )
            else:
                p_tops = p_tile_max + (i_tile * GROUPS + o_group) * APART
                tl.store(p_tops, b_top, mask=o_group * (GROUP * BLOCK) < left)
                peak = tl.max(b_peak, 0)
                b_peak = tl.maximum(b_peak, b_top)
                new_peak = tl.max(b_peak, 0)
                # bins that the raised window takes over from steps that fell out of it
                b_histogram = tl.where(new_peak - ((new_peak - o_bin) & (BINS - 1)) > peak, 0, b_histogram)
                m_count = m_unit & (b_step > new_peak - (BINS - 1))
                b_bin = tl.reshape(b_step & (BINS - 1), [UNITS])
                b_histogram += tl.histogram(b_bin, BINS, mask=tl.reshape(m_count, [UNITS]))
        if COUNTING == "":
            peak = tl.max(b_peak, 0)
            b_place = peak - ((peak - o_bin) & (BINS - 1))
            m_place = (b_histogram > 0) & (b_place > peak - (BINS - 1))
            tl.atomic_add(p_histogram + ZERO + b_place, b_histogram, mask=m_place, sem="relaxed")
            # from the circle into the order of falling steps, through memory
            tl.store(p_sums + o_bin, b_histogram)
            tl.debug_barrier()
            b_ordered = tl.load(p_sums + ((peak - o_bin) & (BINS - 1)), mask=o_bin < BINS - 1, other=0)
            tl.debug_barrier()
            tl.store(p_sums + o_bin, tl.cumsum(b_ordered, 0))
            tl.store(p_peak, peak)
        elif num_tiles == 0:
            tl.store(p_peak, FLOOR)
