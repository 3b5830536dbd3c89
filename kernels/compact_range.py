"""The second phase of `score_select.py`: from a row's counts to its threshold, and the list of what reaches it."""

from __future__ import annotations

from .common import HAS_TRITON, tl, triton

if HAS_TRITON:

    @triton.jit
    def _popcount(b_word, POPC: tl.constexpr):
        """int32 number of set bits of uint32 words; POPC: the device has an instruction for it."""
        if POPC:
            return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [b_word], dtype=tl.int32, is_pure=True, pack=1)
        b_word = b_word - ((b_word >> 1) & 0x55555555)
        b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
        b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
        return ((b_word * 0x01010101) >> 24).to(tl.int32)

    @triton.jit
    def _codes(p_codes, p_tile_max, i_unit, first, stop, GROUP: tl.constexpr, APART: tl.constexpr, WORDS: tl.constexpr):
        """Codes `[WORDS, 32]` from `i_unit` on, 255 past the end, and the maxima of their groups, APART places each."""
        o_first = i_unit + tl.arange(0, WORDS) * 32
        o_each = o_first[:, None] + tl.arange(0, 32)[None, :]
        b_code = tl.load(p_codes + o_each, mask=o_each < stop, other=255)
        if GROUP >= 32:
            b_top = tl.load(p_tile_max + (o_first - first) // GROUP * APART, mask=o_first < stop, other=-65536)[:, None]
        else:
            b_top = tl.load(p_tile_max + (o_each - first) // GROUP * APART, mask=o_each < stop, other=-65536)
        return b_code, b_top

    @triton.jit
    def compact_range_by_assembly(
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
        stop,
        LISTING: tl.constexpr,
        CONSTRAINTS: tl.constexpr,
        THREADS: tl.constexpr,
        ZERO: tl.constexpr,
    ):
        """`compact_range` by `list_assembly`."""
        b_zero = tl.arange(0, THREADS) * 0
        tl.inline_asm_elementwise(
            LISTING,
            CONSTRAINTS,
            [
                p_codes.to(tl.pointer_type(tl.int32)) + b_zero,
                p_tile_max + b_zero,
                p_histogram + ZERO + b_zero,
                p_sums + b_zero,
                p_peak + b_zero,
                p_indices + b_zero,
                p_counts + b_zero,
                num_units + b_zero,
                wanted_units + b_zero,
                top_p.to(tl.int32, bitcast=True) + b_zero,
                i_split + b_zero,
                num_splits + b_zero,
                first + b_zero,
                stop + b_zero,
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def compact_range(
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
        stop,
        GROUP: tl.constexpr,
        APART: tl.constexpr,
        BINS: tl.constexpr,
        ZERO: tl.constexpr,
        STEPS: tl.constexpr,
        TILES: tl.constexpr,
        WORDS: tl.constexpr,
        SPLITS: tl.constexpr,
        POPC: tl.constexpr,
    ):
        """Find the row's threshold in its histogram, and list the selected of its units `first..stop`.

        Their groups begin at `first`, and `p_tile_max` at the maximum of the first of them.

        Selected units become bits, 32 to a word; words are counted and placed, and a bit's place in its word is the
        number of bits below it. What does not depend on the threshold is fetched before it is known.
        """
        o_split = tl.arange(0, SPLITS)
        o_far = tl.arange(0, BINS)
        b_peaks = tl.load(p_peak + o_split, mask=o_split < num_splits, other=-32768, cache_modifier=".cg")
        b_next, b_next_top = _codes(p_codes, p_tile_max, first, first, stop, GROUP, APART, WORDS)
        top = tl.max(b_peaks, 0)
        # bins in the order of falling scores: distance 0 holds the row's maximum
        i_bin = top - o_far + ZERO
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
        # how many units the earlier CTAs list
        b_to_lowest = tl.minimum(b_peaks - lowest, BINS - 2)
        m_earlier = (o_split < i_split) & (b_to_lowest >= 0)
        b_earlier = tl.load(p_sums + o_split * BINS + b_to_lowest, mask=m_earlier, other=0, cache_modifier=".cg")
        before = tl.sum(b_earlier, 0)
        o_tile = tl.arange(0, TILES)
        o_unit = tl.arange(0, GROUP)
        # of the units below the window, the first `under_skip` of the row stay out
        under_skip = num_units - inside - extra
        under = first - before
        offset = before
        if extra > 0:
            offset += tl.maximum(under - under_skip, 0)
            num_tiles = tl.cdiv(stop - first, GROUP)
            for i_tile in tl.range(0, num_tiles, TILES):
                m_tiles = i_tile + o_tile < num_tiles
                p_tops = p_tile_max + (i_tile + o_tile) * APART
                b_tile_max = tl.load(p_tops, mask=m_tiles, other=-65536, cache_modifier=".cg")
                i_unit = first + (i_tile + o_tile)[:, None] * GROUP + o_unit[None, :]
                m_unit = m_tiles[:, None] & (i_unit < stop)
                b_code = tl.load(p_codes + i_unit, mask=m_unit, other=255, cache_modifier=".cg").to(tl.int32)
                b_inside = tl.reshape((b_code <= (b_tile_max - lowest)[:, None]).to(tl.int32), [TILES * GROUP])
                b_seen = tl.reshape(m_unit.to(tl.int32), [TILES * GROUP])
                b_under = (1 - b_inside) * b_seen
                b_rank = under + tl.cumsum(b_under, 0)
                under += tl.sum(b_under, 0)
                b_taken = b_seen * tl.maximum(b_inside, (b_rank > under_skip).to(tl.int32))
                b_place = offset + tl.cumsum(b_taken, 0) - 1
                o_flat = first + i_tile * GROUP + tl.arange(0, TILES * GROUP)
                tl.store(p_indices + b_place, o_flat, mask=b_taken > 0)
                offset += tl.sum(b_taken, 0)
        else:
            o_word = tl.arange(0, WORDS)
            o_bit = tl.arange(0, 32)
            for i_unit in tl.range(first, stop, WORDS * 32):
                b_code = b_next.to(tl.int32)
                b_top = b_next_top
                b_next, b_next_top = _codes(p_codes, p_tile_max, i_unit + WORDS * 32, first, stop, GROUP, APART, WORDS)
                # a group is compared by its own maximum; no limit reaches the code past the end
                b_in = (b_code <= tl.minimum(b_top - lowest, BINS - 2)).to(tl.uint32)
                # the bits are disjoint: their sum is their union
                b_word = tl.sum(b_in << o_bit[None, :].to(tl.uint32), 1)
                b_size = _popcount(b_word, POPC)
                b_from = offset + tl.cumsum(b_size, 0) - b_size
                offset += tl.sum(b_size, 0)
                b_below = b_word[:, None] & ((1 << o_bit[None, :]) - 1).to(tl.uint32)
                b_place = b_from[:, None] + _popcount(b_below, POPC)
                o_each = i_unit + o_word[:, None] * 32 + o_bit[None, :]
                tl.store(p_indices + b_place, o_each, mask=b_in > 0)
