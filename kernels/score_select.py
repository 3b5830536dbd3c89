"""Score and select at decode: the top-p set of each query row as an ascending list (PAPER sections 4 and 5).

    s(m, n) = iq(m) . ik(n)        the set: the fewest blocks whose softmax(s(m, .)) mass reaches p (`top_p.py`)

The list holds *logical* block numbers: block b is the logical positions b * block_size to (b + 1) * block_size - 1.
Not for prefill, where the rows are many and share tiles of keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .append import append_head, append_index
from .common import HAS_TRITON, starts, tl, triton, use_triton
from .kv_quant import kv_limit
from .launches import launch_options
from .top_p import index_scores_reference, top_p_set_reference
from .workspace import HISTOGRAM_BINS, HISTOGRAM_SPAN, DecodeWorkspace, head_table, num_processors


class NewTokens(NamedTuple):
    """What `append_step` takes, for the launch that appends and selects at once; `index_key` is `[B, I, M, r]`."""

    key: torch.Tensor
    value: torch.Tensor
    index_key: torch.Tensor
    full_key: torch.Tensor
    full_value: torch.Tensor
    window_key: torch.Tensor
    window_value: torch.Tensor
    tables: tuple[int, ...]
    num_sinks: int
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


class Selection(NamedTuple):
    """The selected blocks of every query row of a decode step.

    indices: int32 `[B, n, M, K]`, ascending logical block numbers; only the first `counts` of a row count.
    counts: int32 `[B, n, M]`.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def selection_mask(
    selection: Selection,
    *,
    num_slots: int,
    block_size: int,
    q_slots: torch.Tensor,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bool mask `[B, n, M, num_slots]` of the slots that a selection stands for (for tests and reports).

    Args:
        q_slots: int64 `[M]`, the slot of each query row: nothing after it is seen.
        start: `[B]` slot of the first real token; None: no padding.
    """
    indices, counts = selection
    batch, device = indices.shape[0], indices.device
    blocks = -(-num_slots // block_size)
    listed = torch.arange(indices.shape[-1], device=device) < counts[..., None]
    # entries past the count go to a column that is dropped
    column = torch.where(listed, indices.long(), blocks)
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=device).scatter_(-1, column, True)
    slots = torch.arange(num_slots, device=device)
    position = slots - starts(start, batch, device)[:, None]
    block = position.clamp_min(0).div(block_size, rounding_mode="floor")[:, None, None]
    picked = chosen.gather(-1, block.expand(*counts.shape, num_slots))
    return picked & (position >= 0)[:, None, None] & (slots <= q_slots[:, None])


def select_top_p_reference(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    index_scale: torch.Tensor | None = None,
) -> Selection:
    """The contract of `select_top_p`: the exact smallest set, in fp32; reads `length` on the host."""
    batch, _, q_len, _ = index_query.shape
    end, device = int(length), index_query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(end, device=device)
    keys = index_key[:, list(index_heads), :end].float()
    if index_scale is not None:
        keys = keys * index_scale[:, list(index_heads), :end, None].float()
    scores = index_scores_reference(index_query, keys)
    q_slots = torch.arange(end - q_len, end, device=device)
    # [B, 1, M, slots]
    valid = ((slots <= q_slots[:, None]) & (slots >= first_slot[:, None, None]))[:, None]
    chosen = top_p_set_reference(scores, valid, top_p=top_p, min_tokens=min_tokens, block_size=block_size, start=start)
    blocks = max(-(-end // block_size), 1)
    position = (slots - first_slot[:, None]).clamp_min(0)
    block = position.div(block_size, rounding_mode="floor")[:, None, None].expand_as(chosen)
    taken = torch.zeros(*chosen.shape[:-1], blocks, dtype=torch.uint8, device=device)
    taken.scatter_reduce_(-1, block, chosen.to(torch.uint8), "amax")
    rank = taken.cumsum(-1)
    counts = rank[..., -1].to(torch.int32)
    # blocks that are not taken all write to a last column that is dropped
    target = torch.where(taken.bool(), rank - 1, blocks)
    numbers = torch.arange(blocks, dtype=torch.int32, device=device).expand_as(target)
    indices = torch.zeros(*counts.shape, blocks + 1, dtype=torch.int32, device=device)
    return Selection(indices.scatter_(-1, target, numbers)[..., :blocks], counts)


@lru_cache(maxsize=8)
def _count_assembly(threads: int, elements: int, bins: int) -> str:
    """PTX that counts the `elements` bins each of `threads` threads holds, by atomics in shared memory.

    Inputs: the bins, then whether each counts. Outputs: the first `bins / threads` of each thread are the counts of
    bins thread, thread + threads, ..., the others 0; then the numbers of those bins, -1 for the others.
    """
    own = bins // threads
    lines = [
        "{",
        f".shared .align 4 .b32 counts[{bins}];",
        ".reg .pred use;",
        ".reg .b32 place, base, mine, value;",
        "mov.u32 mine, %tid.x;",
        "mov.u32 base, counts;",
        "shl.b32 place, mine, 2;",
        "add.u32 place, place, base;",
    ]
    lines += [f"st.shared.b32 [place + {4 * threads * i}], 0;" for i in range(own)]
    lines += ["bar.sync 0;"]
    for i in range(elements):
        lines += [
            f"setp.ne.s32 use, ${3 * elements + i}, 0;",
            f"shl.b32 value, ${2 * elements + i}, 2;",
            "add.u32 value, value, base;",
            "@use red.shared.add.u32 [value], 1;",
        ]
    lines += ["bar.sync 0;"]
    for i in range(elements):
        if i < own:
            lines += [f"ld.shared.b32 ${i}, [place + {4 * threads * i}];"]
            lines += [f"add.u32 ${elements + i}, mine, {threads * i};"]
        else:
            lines += [f"mov.b32 ${i}, 0;", f"mov.b32 ${elements + i}, -1;"]
    lines += ["bar.sync 0;", "}"]
    return "\n".join(lines)


@lru_cache(maxsize=8)
def _count_constraints(elements: int) -> str:
    return ",".join(["=&r"] * (2 * elements) + ["r"] * (2 * elements))


if HAS_TRITON:

    @triton.jit
    def _query_matrix(p_query, HEAD: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr):
        """fp32 `[LANES * PADDED, LANES]`: column t holds the query at rows t * PADDED..; one dot scores LANES keys."""
        o_k = tl.arange(0, LANES * PADDED)
        o_t = tl.arange(0, LANES)
        mine = ((o_k // PADDED)[:, None] == o_t[None, :]) & ((o_k % PADDED) < HEAD)[:, None]
        return tl.load(p_query + (o_k % PADDED)[:, None] + 0 * o_t[None, :], mask=mine, other=0.0).to(tl.float32)

    @triton.jit
    def _score_range(
        p_query,
        p_key,
        p_scale,
        p_codes,
        p_tile_max,
        p_histogram,
        p_sums,
        p_peak,
        num_seen,
        first,
        last,
        stride_kn,
        stride_sn,
        HEAD: tl.constexpr,
        PADDED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
        BINS: tl.constexpr,
        SPAN: tl.constexpr,
        STEPS: tl.constexpr,
        SPLIT_QUERY: tl.constexpr,
        INT8: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        STAGES: tl.constexpr,
        COUNTING: tl.constexpr,
        CONSTRAINTS: tl.constexpr,
        ELEMENTS: tl.constexpr,
    ):
        """Score tiles `first..last` of one query row; leave their codes, tile maxima and one histogram behind.

        Scores are counted in steps of 1/STEPS octave, floor(STEPS * log2(e) * s): absolute numbers, so that all
        CTAs share their bin edges. A CTA's histogram is circular, bin = step mod BINS, and holds the BINS - 1 steps
        from the largest seen (`peak`) down. It is added to the row's, where a step has its own place, and its
        running sums are kept: they tell how much of the list precedes each CTA. A code is the distance to the
        tile's maximum.
        """
        TILE: tl.constexpr = ROWS * LANES
        UNITS: tl.constexpr = TILE // BLOCK
        LOG2E: tl.constexpr = 1.4426950408889634
        FLOOR: tl.constexpr = -32768
        HALF: tl.constexpr = SPAN // 2
        o_row = tl.arange(0, ROWS)
        o_lane = tl.arange(0, LANES)
        o_k = tl.arange(0, LANES * PADDED)
        o_all = tl.arange(0, BINS)
        o_bin = o_all
        # [LANES * PADDED, LANES]
        b_query = _query_matrix(p_query, HEAD, PADDED, LANES)
        factor = LOG2E
        if INT8:
            # 14 bits of the query in two int8 parts: the products are exact
            step = tl.maximum(tl.max(tl.max(tl.abs(b_query), 1), 0), 1e-30) / 8128.0
            b_query = tl.floor(b_query / step + 0.5)
            b_upper = tl.floor((b_query + 64.0) / 128.0)
            b_high = b_upper.to(tl.int8)
            b_low = (b_query - 128.0 * b_upper).to(tl.int8)
            factor = factor * step
        else:
            b_high = b_query.to(p_key.dtype.element_ty)
            if SPLIT_QUERY:
                b_low = (b_query - b_high.to(tl.float32)).to(p_key.dtype.element_ty)
        if CONTIGUOUS:
            o_key = o_row[:, None] * (LANES * PADDED) + o_k[None, :]
        else:
            o_key = (o_row[:, None] * LANES + (o_k // PADDED)[None, :]) * stride_kn + (o_k % PADDED)[None, :]
        o_token = o_row[:, None] * LANES + o_lane[None, :]
        if COUNTING == "":
            b_histogram = tl.zeros([BINS], dtype=tl.int32)
        else:
            b_histogram = tl.zeros([ROWS, LANES], dtype=tl.int32)
            o_bin = tl.full([ROWS, LANES], -1, dtype=tl.int32)
        peak = tl.full((), FLOOR, tl.int32)
        if INT8:
            b_next = tl.load(
                p_scale + tl.cast(first * TILE, tl.int64) * stride_sn + o_token * stride_sn,
                mask=o_token < tl.where(first < last, num_seen - first * TILE, 0),
                other=0.0,
            )
        for i_tile in tl.range(first, last, num_stages=STAGES):
            left = num_seen - i_tile * TILE
            m_key = (o_row[:, None] * LANES + (o_k // PADDED)[None, :]) < left
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
            b_step = tl.minimum(tl.maximum(tl.floor(b_value), 1.0 - HALF), HALF - 1.0).to(tl.int32)
            b_step = tl.where(m_unit, b_step, FLOOR)
            if BLOCK == 1:
                tile_max = tl.max(tl.max(b_step, 1), 0)
            else:
                tile_max = tl.max(b_step, 0)
            b_code = tl.minimum(tile_max - b_step, BINS - 1)
            tl.store(p_codes + tl.cast(i_tile, tl.int64) * UNITS + o_unit, b_code.to(tl.uint8), mask=m_unit)
            tl.store(p_tile_max + i_tile, tile_max)
            new_peak = tl.maximum(peak, tile_max)
            # bins that the raised window takes over from steps that fell out of it
            b_histogram = tl.where(new_peak - ((new_peak - o_bin) & (BINS - 1)) > peak, 0, b_histogram)
            peak = new_peak
            m_count = m_unit & (b_step > peak - (BINS - 1))
            if COUNTING != "":
                b_new, o_bin = tl.inline_asm_elementwise(
                    COUNTING,
                    CONSTRAINTS,
                    [b_step & (BINS - 1), m_count.to(tl.int32)],
                    dtype=(tl.int32, tl.int32),
                    is_pure=False,
                    pack=ELEMENTS,
                )
                b_histogram += b_new
            elif BLOCK == 1:
                b_bin = tl.reshape(b_step & (BINS - 1), [TILE])
                b_histogram += tl.histogram(b_bin, BINS, mask=tl.reshape(m_count, [TILE]))
            else:
                b_histogram += tl.histogram(b_step & (BINS - 1), BINS, mask=m_count)
        b_place = peak - ((peak - o_bin) & (BINS - 1))
        m_place = (b_histogram > 0) & (b_place > peak - (BINS - 1))
        tl.atomic_add(p_histogram + HALF + b_place, b_histogram, mask=m_place, sem="relaxed")
        if COUNTING != "":
            # scattered over the tile: bring the bins into order through memory
            tl.store(p_sums + o_all, tl.zeros([BINS], dtype=tl.int32))
            tl.debug_barrier()
            tl.store(p_sums + o_bin, b_histogram, mask=o_bin >= 0)
            tl.debug_barrier()
            b_histogram = tl.load(p_sums + o_all)
            tl.debug_barrier()
        tl.store(p_sums + o_all, tl.cumsum(b_histogram, 0))
        tl.store(p_peak, peak)

    @triton.jit
    def _popcount(b_word):
        """int32 number of set bits of uint32 words."""
        b_word = b_word - ((b_word >> 1) & 0x55555555)
        b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
        b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
        return ((b_word * 0x01010101) >> 24).to(tl.int32)

    @triton.jit
    def _compact_range(
        p_codes,
        p_tile_max,
        p_histogram,
        p_sums,
        p_peak,
        p_indices,
        p_counts,
        num_units,
        wanted_units,
        top_p,
        i_split,
        num_splits,
        first,
        last,
        UNITS: tl.constexpr,
        BINS: tl.constexpr,
        SPAN: tl.constexpr,
        STEPS: tl.constexpr,
        TILES: tl.constexpr,
        WORDS: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """Find the row's threshold in its histogram, and list the selected units of tiles `first..last`.

        Selected units become bits, 32 to a word; words are counted and placed, then each emits its bits.
        """
        o_split = tl.arange(0, SPLITS)
        o_far = tl.arange(0, BINS)
        b_peaks = tl.load(p_peak + o_split, mask=o_split < num_splits, other=-32768, cache_modifier=".cg")
        top = tl.max(b_peaks, 0)
        # bins in the order of falling scores: distance 0 holds the row's maximum
        i_bin = top - o_far + SPAN // 2
        m_bin = (i_bin >= 0) & (o_far < BINS - 1)
        b_all = tl.load(p_histogram + i_bin, mask=m_bin, other=0, cache_modifier=".cg")
        b_count = tl.cumsum(b_all, 0)
        inside = tl.sum(b_all, 0)
        # a unit at distance d weighs from 2^(-d/STEPS) up to one step more, in units of the top bin's lower edge
        b_low = tl.exp2(-o_far.to(tl.float32) / STEPS) * b_all.to(tl.float32)
        b_selected = tl.cumsum(b_low, 0)
        # the units below the window weigh at most as much as its lower edge
        below = (num_units - inside).to(tl.float32) * tl.exp2(-(BINS - 2.0) / STEPS + 0.0 * top_p)
        step = tl.exp2(1.0 / STEPS + 0.0 * top_p)
        b_rest = (tl.sum(b_low, 0) - b_selected) * step + below
        m_mass = b_selected >= top_p * (b_selected + b_rest)
        m_enough = m_mass & (b_count >= wanted_units)
        cut = tl.min(tl.where(m_enough, o_far, BINS), 0)
        # units below the window of the histogram, latest first: only to reach the floor on the count
        extra = num_units * 0
        if cut == BINS:
            cut = BINS - 2
            extra = num_units - inside
            if tl.max(m_mass.to(tl.int32), 0) > 0:
                extra = tl.minimum(extra, wanted_units - inside)
        lowest = top - cut
        if i_split == 0:
            tl.store(p_counts, tl.sum(tl.where(o_far <= cut, b_all, 0), 0) + extra)
        # how many units each earlier CTA lists: a difference of its running sums, around the circle
        low_bin = lowest & (BINS - 1)
        b_peak_bin = b_peaks & (BINS - 1)
        m_earlier = (o_split < i_split) & (b_peaks >= lowest)
        p_sum = p_sums + o_split * BINS
        b_to_peak = tl.load(p_sum + b_peak_bin, mask=m_earlier, other=0, cache_modifier=".cg")
        b_to_low = tl.load(p_sum + low_bin - 1, mask=m_earlier & (o_split * 0 < low_bin), other=0, cache_modifier=".cg")
        b_turn = tl.load(p_sum + BINS - 1, mask=m_earlier & (b_peak_bin < low_bin), other=0, cache_modifier=".cg")
        before = tl.sum(b_to_peak - b_to_low + b_turn, 0)
        o_tile = tl.arange(0, TILES)
        o_unit = tl.arange(0, UNITS)
        # of the units below the window, the first `under_skip` of the row stay out
        under_skip = num_units - inside - extra
        under = first * UNITS - before
        offset = before
        if extra > 0:
            offset += tl.maximum(under - under_skip, 0)
            for i_tile in tl.range(first, last, TILES):
                m_tiles = i_tile + o_tile < last
                b_tile_max = tl.load(p_tile_max + i_tile + o_tile, mask=m_tiles, other=-65536, cache_modifier=".cg")
                i_unit = (i_tile + o_tile)[:, None] * UNITS + o_unit[None, :]
                m_unit = m_tiles[:, None] & (i_unit < num_units)
                b_code = tl.load(p_codes + i_unit, mask=m_unit, other=255, cache_modifier=".cg").to(tl.int32)
                b_inside = tl.reshape((b_code <= (b_tile_max - lowest)[:, None]).to(tl.int32), [TILES * UNITS])
                b_seen = tl.reshape(m_unit.to(tl.int32), [TILES * UNITS])
                b_under = (1 - b_inside) * b_seen
                b_rank = under + tl.cumsum(b_under, 0)
                under += tl.sum(b_under, 0)
                b_taken = b_seen * tl.maximum(b_inside, (b_rank > under_skip).to(tl.int32))
                b_place = offset + tl.cumsum(b_taken, 0) - 1
                o_flat = i_tile * UNITS + tl.arange(0, TILES * UNITS)
                tl.store(p_indices + b_place, o_flat, mask=b_taken > 0)
                offset += tl.sum(b_taken, 0)
        else:
            stop = tl.minimum(last * UNITS, num_units)
            o_word = tl.arange(0, WORDS)
            o_bit = tl.arange(0, 32)
            for i_unit in tl.range(first * UNITS, stop, WORDS * 32, num_stages=3):
                o_first = i_unit + o_word * 32
                # [WORDS, 32]
                o_each = o_first[:, None] + o_bit[None, :]
                # a tile is compared by its own maximum; past the end the code is 255, which no limit reaches
                b_each = tl.load(p_codes + o_each, mask=o_each < stop, other=255).to(tl.int32)
                if UNITS >= 32:
                    b_top = tl.load(p_tile_max + o_first // UNITS, mask=o_first < stop, other=-65536)[:, None]
                else:
                    b_top = tl.load(p_tile_max + o_each // UNITS, mask=o_each < stop, other=-65536)
                b_in = (b_each <= tl.minimum(b_top - lowest, BINS - 2)).to(tl.uint32)
                # the bits are disjoint: their sum is their union
                b_word = tl.sum(b_in << o_bit[None, :].to(tl.uint32), 1)
                b_size = _popcount(b_word)
                b_from = offset + tl.cumsum(b_size, 0) - b_size
                offset += tl.sum(b_size, 0)
                for i_nth in tl.range(0, tl.max(b_size, 0)):
                    b_lowest = b_word & (~b_word + 1)
                    tl.store(p_indices + b_from + i_nth, o_first + _popcount(b_lowest - 1), mask=i_nth < b_size)
                    b_word = b_word & (b_word - 1)

    @triton.jit
    def _score_select_kernel(
        p_query,
        p_key,
        p_scale,
        p_codes,
        p_tile_max,
        p_histogram,
        p_sums,
        p_peak,
        p_state,
        p_indices,
        p_counts,
        p_index_heads,
        p_length,
        p_start,
        p_new_key,
        p_new_value,
        p_new_index,
        p_full_key,
        p_full_value,
        p_key_scale,
        p_value_scale,
        p_window_key,
        p_window_value,
        p_tables,
        top_p,
        min_tokens,
        num_rows,
        num_kv_items,
        num_kv_heads,
        num_sinks,
        ring,
        num_heads,
        q_len,
        num_splits,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_sb,
        stride_sh,
        stride_sn,
        stride_codes,
        stride_tiles,
        stride_indices,
        stride_nkb,
        stride_nkh,
        stride_nkn,
        stride_nvb,
        stride_nvh,
        stride_nvn,
        stride_xb,
        stride_xh,
        stride_xn,
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
        HEAD: tl.constexpr,
        PADDED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
        BINS: tl.constexpr,
        SPAN: tl.constexpr,
        STEPS: tl.constexpr,
        TILES: tl.constexpr,
        WORDS: tl.constexpr,
        SPLITS: tl.constexpr,
        SPLIT_QUERY: tl.constexpr,
        INT8: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        HAS_START: tl.constexpr,
        SCORE: tl.constexpr,
        COMPACT: tl.constexpr,
        PDL: tl.constexpr,
        STAGES: tl.constexpr,
        COUNTING: tl.constexpr,
        CONSTRAINTS: tl.constexpr,
        ELEMENTS: tl.constexpr,
        APPEND: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        KV_LIMIT: tl.constexpr,
    ):
        """Two phases, a launch each. SCORE: CTA (query row, split) scores its share of the keys. COMPACT: it
        lists the selected units of that share, once the whole row is scored.

        With APPEND the step's tokens are written by SCORE: K and V by further CTAs, and the index keys by every CTA
        that will read them.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        TILE: tl.constexpr = ROWS * LANES
        UNITS: tl.constexpr = TILE // BLOCK
        i_row = tl.program_id(0) // num_splits
        i_split = tl.program_id(0) % num_splits
        if APPEND and i_row >= num_rows:
            if SCORE:
                num_writers = tl.num_programs(0) - num_rows * num_splits
                for i_item in tl.range(tl.program_id(0) - num_rows * num_splits, num_kv_items, num_writers):
                    append_head(
                        p_new_key,
                        p_new_value,
                        p_full_key,
                        p_full_value,
                        p_key_scale,
                        p_value_scale,
                        p_window_key,
                        p_window_value,
                        p_tables,
                        p_start,
                        i_item,
                        tl.load(p_length),
                        num_kv_heads,
                        q_len,
                        num_sinks,
                        ring,
                        stride_nkb,
                        stride_nkh,
                        stride_nkn,
                        stride_nvb,
                        stride_nvh,
                        stride_nvn,
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
                        HEAD_DIM,
                        BLOCK_D,
                        HAS_START,
                        KV_LIMIT,
                    )
            return
        i_query = i_row % q_len
        i_head = (i_row // q_len) % num_heads
        i_batch = (i_row // q_len // num_heads).to(tl.int64)
        begin = i_row * 0
        if HAS_START:
            begin = tl.load(p_start + i_batch).to(tl.int32)
        # keys up to the row's own, counted from the first real token
        num_seen = tl.maximum(tl.load(p_length).to(tl.int32) - begin - (q_len - 1 - i_query), 0)
        num_units = tl.cdiv(num_seen, BLOCK)
        num_tiles = tl.cdiv(num_seen, TILE)
        first = num_tiles * i_split // num_splits
        last = num_tiles * (i_split + 1) // num_splits
        i_long = i_row.to(tl.int64)
        p_codes += i_long * stride_codes
        p_tile_max += i_long * stride_tiles
        p_sums += i_long * num_splits * BINS
        p_peak += i_long * num_splits
        # two histograms a row, in turn: one is used while the other is cleared for the next call
        p_turn = p_state + i_row * 2 + 1
        turn = tl.load(p_turn) & 1
        p_cleared = p_histogram + (i_long * 2 + 1 - turn) * SPAN
        p_histogram += (i_long * 2 + turn) * SPAN
        if SCORE:
            for i_bin in tl.range(i_split * BINS, SPAN, num_splits * BINS):
                tl.store(p_cleared + i_bin + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int32))
            i_key = tl.load(p_index_heads + i_head).to(tl.int64)
            # the new tokens lie in the last two tiles
            if APPEND and last >= num_tiles - 1:
                for i_token in tl.range(0, q_len):
                    append_index(
                        p_new_index + i_batch * stride_xb + i_key * stride_xh + i_token * stride_xn,
                        p_key + i_batch * stride_kb + i_key * stride_kh,
                        p_scale + i_batch * stride_sb + i_key * stride_sh,
                        tl.load(p_length).to(tl.int64) - q_len + i_token,
                        stride_kn,
                        stride_sn,
                        HEAD,
                        PADDED,
                        INT8,
                    )
                tl.debug_barrier()
            _score_range(
                p_query + i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + i_query * stride_qm,
                p_key + i_batch * stride_kb + i_key * stride_kh + tl.cast(begin, tl.int64) * stride_kn,
                p_scale + i_batch * stride_sb + i_key * stride_sh + begin * stride_sn,
                p_codes,
                p_tile_max,
                p_histogram,
                p_sums + i_split * BINS,
                p_peak + i_split,
                num_seen,
                first,
                last,
                stride_kn,
                stride_sn,
                HEAD,
                PADDED,
                ROWS,
                LANES,
                BLOCK,
                BINS,
                SPAN,
                STEPS,
                SPLIT_QUERY,
                INT8,
                CONTIGUOUS,
                STAGES,
                COUNTING,
                CONSTRAINTS,
                ELEMENTS,
            )
        if COMPACT:
            # the last block may be short: count it as such, so that the floor holds whichever blocks are taken
            tail = num_seen - (num_units - 1) * BLOCK
            wanted = tl.minimum(tl.cdiv(min_tokens + BLOCK - tail, BLOCK), num_units)
            _compact_range(
                p_codes,
                p_tile_max,
                p_histogram,
                p_sums,
                p_peak,
                p_indices + i_long * stride_indices,
                p_counts + i_row,
                num_units,
                wanted,
                top_p,
                i_split,
                num_splits,
                first,
                last,
                UNITS,
                BINS,
                SPAN,
                STEPS,
                TILES,
                WORDS,
                SPLITS,
            )
            # the last CTA to come here turns: the others have read the turn by then
            if tl.atomic_add(p_state + i_row * 2, 1, sem="acq_rel") == num_splits - 1:
                tl.store(p_state + i_row * 2, 0)
                tl.store(p_turn, 1 - turn)

    @triton.jit
    def _select_all_kernel(
        p_indices,
        p_counts,
        p_length,
        p_start,
        num_rows_per_batch,
        q_len,
        num_splits,
        stride_indices,
        BLOCK: tl.constexpr,
        HAS_START: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """top_p = 1: every block that the row sees."""
        i_row = tl.program_id(0) // num_splits
        i_split = tl.program_id(0) % num_splits
        begin = i_row * 0
        if HAS_START:
            begin = tl.load(p_start + i_row // num_rows_per_batch).to(tl.int32)
        num_seen = tl.maximum(tl.load(p_length).to(tl.int32) - begin - (q_len - 1 - i_row % q_len), 0)
        num_units = tl.cdiv(num_seen, BLOCK)
        for i_first in tl.range(i_split * WIDTH, num_units, num_splits * WIDTH):
            o_unit = i_first + tl.arange(0, WIDTH)
            tl.store(p_indices + i_row.to(tl.int64) * stride_indices + o_unit, o_unit, mask=o_unit < num_units)
        if i_split == 0:
            tl.store(p_counts + i_row, num_units)


# measured on an H100: CTAs a multiprocessor holds, keys of a tile for one dimension, units listed at a time (and from
# _LONG slots on), warps, pipeline stages
_SCORE_CONFIG = {
    "ctas": 2,
    "tile_keys": 1024,
    "list_units": 4096,
    "long_list_units": 8192,
    "warps": 4,
    "stages": 3,
    "registers": 255,
    "writers": 8,
    "assembly": True,
}
_LANES = 16
_LONG = 262_144
_STEPS = 8


def check_select(
    index_query: torch.Tensor, index_key: torch.Tensor, index_heads: tuple[int, ...], block_size: int
) -> None:
    if index_query.dim() != 4 or index_query.shape[1] != len(index_heads):
        raise ValueError(
            f"index_query must be [B, {len(index_heads)}, M, r] for {len(index_heads)} index_heads, "
            f"got {tuple(index_query.shape)}"
        )
    if index_key.dim() != 4 or index_key.shape[3] != index_query.shape[3]:
        raise ValueError(
            f"index_key must be [B, I, C, {index_query.shape[3]}] as index_query is {tuple(index_query.shape)}, "
            f"got {tuple(index_key.shape)}"
        )
    if block_size not in (1, 16, 32, 64):
        raise ValueError(f"block_size must be 1, 16, 32 or 64, got {block_size}")


def select_top_p(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    index_scale: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    backend: str = "auto",
) -> Selection:
    """The top-p set of every query row of a decode step, without a host synchronisation.

    Args:
        index_query: `[B, n, M, r]`, one head for each listed retrieval head; M <= 16, r from 4 to 64.
        index_key: `[B, I, C, r]`, slot-ordered, or int8 with `index_scale`.
        index_heads: for each of the n heads its row of `index_key`.
        length: int32 device tensor `[1]`: slots in use, this step's M tokens included; row m sits in slot
            `length - M + m` and sees the slots up to its own.
        start: int `[B]`, slot of each row's first real token; None: no padding.
        top_p: mass to reach, in (0, 1]; 1 selects everything. min_tokens: floor on the number of tokens.
        block_size: 1, 16, 32 or 64 tokens, aligned to logical positions.
        index_scale: `[B, I, C]`, the scale of each int8 key.
        workspace: its buffers hold the result; None allocates.
        backend: "auto" (Triton for half precision on CUDA), "triton" or "reference".

    Returns:
        A `Selection`; `indices` is `[B, n, M, K]`. The reference gives the smallest set. Triton reckons masses by
        bins of 1/8 octave, from the safe side: the mass is never under p nor the count under the floor, and the set
        lies within the smallest set for the mass p' = 1.19 p / (1 + 0.19 p) (0.914 for 0.9), whole bins taken.
        Tokens more than 31 octaves (2e9 times) below the best one count as ties, and so do scores beyond +-177.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
    """
    check_select(index_query, index_key, index_heads, block_size)
    if not use_triton(backend, index_query):
        return select_top_p_reference(
            index_query,
            index_key,
            index_heads=index_heads,
            length=length,
            start=start,
            top_p=top_p,
            min_tokens=min_tokens,
            block_size=block_size,
            index_scale=index_scale,
        )
    return launch_select(
        index_query, index_key, index_heads, length, start, top_p, min_tokens, block_size, index_scale, workspace
    )


def launch_select(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    index_heads: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    index_scale: torch.Tensor | None,
    workspace: DecodeWorkspace | None,
    new_tokens: NewTokens | None = None,
) -> Selection:
    batch, heads, q_len, head = index_query.shape
    capacity, device = index_key.shape[2], index_query.device
    rows = batch * heads * q_len
    blocks = -(-capacity // block_size)
    if workspace is None:
        workspace = DecodeWorkspace(
            batch=batch,
            retrieval_heads=heads,
            queries=q_len,
            capacity=capacity,
            query_heads=1,
            kv_heads=1,
            head_dim=1,
            block_size=block_size,
            device=device,
        )
    if rows > workspace.rows or rows * blocks > workspace.indices.numel():
        raise ValueError(
            f"the workspace holds {workspace.rows} rows and {workspace.indices.numel()} blocks, this step has {rows} "
            f"rows of {blocks} blocks; make it with the step's batch, heads, queries, capacity and block_size"
        )
    selection = Selection(
        workspace.indices[: rows * blocks].view(batch, heads, q_len, blocks),
        workspace.counts[:rows].view(batch, heads, q_len),
    )
    if index_query.stride(3) != 1:
        index_query = index_query.contiguous()
    on_gpu = index_query.is_cuda
    padded = max(triton.next_power_of_2(head), 4)
    tile_rows = max(_SCORE_CONFIG["tile_keys"] // padded, 1) if on_gpu else 8
    tile_rows = max(tile_rows, -(-block_size // _LANES), 64 // _LANES)
    tile = tile_rows * _LANES
    slots = _SCORE_CONFIG["ctas"] * num_processors(device)
    writers = 0
    if new_tokens is not None:
        kv_items = batch * new_tokens.key.shape[1] * q_len
        writers = min(kv_items, _SCORE_CONFIG["writers"])
    splits = max(1, min((slots - writers) // rows, -(-capacity // tile)))
    first_slot = length if start is None else start
    if top_p >= 1.0:
        _select_all_kernel[(rows * splits,)](
            selection.indices,
            selection.counts,
            length,
            first_slot,
            heads * q_len,
            q_len,
            splits,
            blocks,
            BLOCK=block_size,
            HAS_START=start is not None,
            WIDTH=1024 if on_gpu else 64,
        )
        return selection
    units = tile // block_size
    list_units = _SCORE_CONFIG["list_units" if capacity < _LONG else "long_list_units"] if on_gpu else 64
    threads = 32 * _SCORE_CONFIG["warps"]
    elements = max(tile // threads, 1)
    # counting by hand needs each score in one thread only: the layout of a dot with 16 rows a warp has that
    assembly = (
        _SCORE_CONFIG["assembly"]
        and on_gpu
        and block_size == 1
        and elements <= 16
        and tile_rows >= 16 * _SCORE_CONFIG["warps"]
    )
    scale = index_key if index_scale is None else index_scale
    # without an append the rest of the arguments is never read
    key = value = new_index = full_key = full_value = window_key = window_value = index_key
    tables, kv_items, kv_heads, num_sinks = index_heads, 0, 1, 0
    key_scale = value_scale = None
    if new_tokens is not None:
        key, value, new_index, full_key, full_value, window_key, window_value, tables, num_sinks = new_tokens[:9]
        key_scale, value_scale = new_tokens.key_scale, new_tokens.value_scale
        kv_heads = key.shape[1]
        kv_items = batch * kv_heads * q_len
    arguments = (
        index_query,
        index_key,
        scale,
        workspace.codes,
        workspace.tile_max,
        workspace.histogram,
        workspace.sums,
        workspace.peak,
        workspace.state,
        selection.indices,
        selection.counts,
        head_table(index_heads, device),
        length,
        first_slot,
        key,
        value,
        new_index,
        full_key,
        full_value,
        full_key if key_scale is None else key_scale,
        full_value if value_scale is None else value_scale,
        window_key,
        window_value,
        head_table(tables, device),
        float(top_p),
        min_tokens,
        rows,
        kv_items,
        kv_heads,
        num_sinks,
        max(window_key.shape[2] - num_sinks, 1),
        heads,
        q_len,
        splits,
        index_query.stride(0),
        index_query.stride(1),
        index_query.stride(2),
        index_key.stride(0),
        index_key.stride(1),
        index_key.stride(2),
        scale.stride(0),
        scale.stride(1),
        scale.stride(2),
        blocks,
        workspace.tiles,
        blocks,
        *key.stride()[:3],
        *value.stride()[:3],
        *new_index.stride()[:3],
        *full_key.stride()[:3],
        *full_value.stride()[:3],
        *((0, 0) if key_scale is None else key_scale.stride()[:2]),
        *window_key.stride()[:3],
        *window_value.stride()[:3],
    )
    constants = {
        "HEAD": head,
        "PADDED": padded,
        "ROWS": tile_rows,
        "LANES": _LANES,
        "BLOCK": block_size,
        "BINS": HISTOGRAM_BINS,
        "SPAN": HISTOGRAM_SPAN,
        "STEPS": _STEPS,
        "TILES": max(1, list_units // (2 * units)),
        "WORDS": list_units // 32,
        "SPLITS": triton.next_power_of_2(splits),
        "SPLIT_QUERY": index_query.dtype == torch.float32 and index_key.dtype != torch.float32,
        "INT8": index_scale is not None,
        "CONTIGUOUS": index_key.stride(2) == head == padded,
        "HAS_START": start is not None,
        "STAGES": _SCORE_CONFIG["stages"],
        "COUNTING": _count_assembly(threads, elements, HISTOGRAM_BINS) if assembly else "",
        "CONSTRAINTS": _count_constraints(elements) if assembly else "",
        "ELEMENTS": elements,
        "APPEND": new_tokens is not None,
        "HEAD_DIM": key.shape[3],
        "BLOCK_D": triton.next_power_of_2(key.shape[3]),
        "KV_LIMIT": 0.0 if key_scale is None else kv_limit(full_key),
        "num_warps": _SCORE_CONFIG["warps"],
        "maxnreg": _SCORE_CONFIG["registers"],
    }
    for phase, ctas in (("SCORE", rows * splits + writers), ("COMPACT", rows * splits)):
        own = {"SCORE": phase == "SCORE", "COMPACT": phase == "COMPACT"}
        _score_select_kernel[(ctas,)](*arguments, **constants, **own, **launch_options(device))
    return selection
