"""The whole of `compact_range.py` in PTX (`ptx.py`)."""

from __future__ import annotations

from functools import lru_cache

from .count_assembly import NO_STEP
from .ptx import ALL_LANES, WHO, address, float_literal, numbered, running_sum

_INPUTS = {
    "codes": "l",
    "tops": "l",
    "histogram": "l",
    "sums": "l",
    "peaks": "l",
    "indices": "l",
    "counts": "l",
    "num_units": "r",
    "wanted": "r",
    "top_p": "r",
    "i_split": "r",
    "num_splits": "r",
    "first": "r",
    "stop": "r",
}
LIST_CONSTRAINTS = ",".join(["=r", *_INPUTS.values()])


@lru_cache(maxsize=32)
def list_assembly(threads: int, splits: int, bins: int, steps: int, zero: int, group: int) -> str:
    """Finds a row's threshold in its counts, and lists the selected of the units of one of its shares.

    Inputs, the same in all threads:
        codes: address of the row's codes, a byte each, a multiple of 16.
        tops: of the largest step of each `group` of the share's units.
        histogram: of the count of the row's step 0, of which there are `zero` before it.
        sums, peaks: of what `count_assembly` has left for each of the row's shares.
        indices, counts: of the row's list and of its length, which are written.
        num_units, wanted: how many units the row has, and how many it takes at least. top_p: the bits of p in fp32.
        i_split, num_splits: the share's number and how many there are, at most `splits`.
        first, stop: the share's units; first is a multiple of 32, and so is `group`.
    The output is 0.

    A step is 1/`steps` octave; the threshold is one of the `bins` - 1 steps from the row's largest down. If these hold
    too little, the latest of the units below them are listed too.
    """
    own, warps = bins // threads, threads // 32
    of_lane, of_thread = -(-splits // 32), -(-splits // threads)
    arrays = ("totals", "masses", "cuts", "numbers", "sizes")
    lines = [
        *(f".shared .align 4 .b32 {name}[{4 * warps if name == 'sizes' else warps}];" for name in arrays),
        "{",
        ".reg .pred use, few, fewer, part_or_fewer, reached, beyond;",
        ".reg .b32 mine, lane, warp, group_lane, at, value, other, top, far, sum, mass, inside, mass_before, below;",
        ".reg .b32 rest, total, cut, number, extra, skip, lowest, round, left, words, unit, highest, limit, packed;",
        ".reg .b32 high, mask, valid, size, before, offset, listed, buffer, bit, lower, under, drop, word, last_word;",
        ".reg .b32 name, any, code<8>, word_mask<4>, place<4>;",
        f".reg .b32 peak<{of_lane}>, earlier<{of_thread}>, count<{own}>, weight<{own}>;",
        ".reg .b64 there;",
        f".reg .pred is_earlier<{of_thread}>;",
        *WHO,
        f"setp.lt.u32 few, lane, {warps};",
        "setp.lt.u32 fewer, lane, warp;",
    ]
    # every warp finds the row's largest step for itself
    for i in range(of_lane):
        lines += [
            f"add.u32 value, lane, {32 * i};",
            "setp.lt.s32 use, value, $num_splits;",
            "mad.wide.u32 there, value, 4, $peaks;",
            f"mov.b32 peak{i}, {NO_STEP};",
            f"@use ld.global.cg.b32 peak{i}, [there];",
        ]
    # a thread looks after the share of its own number
    for i in range(of_thread):
        lines += [
            f"add.u32 value, mine, {threads * i};",
            f"setp.lt.s32 is_earlier{i}, value, $i_split;",
            "mad.wide.u32 there, value, 4, $peaks;",
            f"mov.b32 earlier{i}, {NO_STEP};",
            f"@is_earlier{i} ld.global.cg.b32 earlier{i}, [there];",
        ]
    lines += ["mov.b32 round, $first;", *_fetch_codes(threads, group)]
    lines += _find_cut(own, warps, of_lane, bins, steps, zero)
    lines += ["mov.b32 sum, 0;"]
    for i in range(of_thread):
        lines += [
            # how much of the list the earlier share has
            f"sub.s32 far, earlier{i}, lowest;",
            f"min.s32 far, far, {bins - 2};",
            f"setp.ge.and.s32 use, far, 0, is_earlier{i};",
            f"add.u32 value, mine, {threads * i};",
            f"mad.lo.u32 value, value, {bins}, far;",
            "mad.wide.u32 there, value, 4, $sums;",
            "mov.b32 other, 0;",
            "@use ld.global.cg.b32 other, [there];",
            "add.u32 sum, sum, other;",
        ]
    lines += [
        "shl.b32 bit, 1, lane;",
        "sub.u32 lower, bit, 1;",
        # two numbers of each warp: of its units how many are listed, and its part of what the earlier shares have
        f"sub.u32 value, lane, {warps};",
        f"setp.lt.u32 use, value, {warps};",
        "setp.lt.or.u32 part_or_fewer, lane, warp, use;",
        "mov.b32 listed, 0;",
        "mov.b32 buffer, 0;",
        "setp.ge.s32 use, round, $stop;",
        "@use bra DONE;",
        "ROUND:",
        *_mask_codes(bins),
        "popc.b32 size, mask;",
        "mov.b32 before, size;",
        *running_sum("before", "u32"),
        f"redux.sync.add.u32 sum, sum, {ALL_LANES};",
        "setp.eq.b32 use, lane, 31;",
        *address("sizes", "warp"),
        "add.u32 at, at, buffer;",
        "@use st.shared.b32 [at], before;",
        f"@use st.shared.b32 [at + {4 * warps}], sum;",
        "mov.b32 sum, 0;",
        "bar.sync 0;",
        *address("sizes", "lane"),
        "add.u32 at, at, buffer;",
        "mov.b32 other, 0;",
        f"setp.lt.u32 use, lane, {2 * warps};",
        "@use ld.shared.b32 other, [at];",
        "selp.b32 value, other, 0, part_or_fewer;",
        f"redux.sync.add.u32 value, value, {ALL_LANES};",
        f"redux.sync.add.u32 other, other, {ALL_LANES};",
        "add.u32 offset, listed, value;",
        "add.u32 offset, offset, before;",
        "sub.u32 offset, offset, size;",
        "add.u32 listed, listed, other;",
        f"xor.b32 buffer, buffer, {8 * warps};",
        "@!beyond bra TAKEN;",
        # the units below the window in this word and before it; the lowest of the word stay out
        "sub.s32 under, unit, offset;",
        "sub.s32 drop, skip, under;",
        "sub.s32 under, under, skip;",
        "max.s32 under, under, 0;",
        "add.u32 offset, offset, under;",
        "not.b32 any, mask;",
        "and.b32 any, any, valid;",
        "DROP:",
        "setp.le.s32 use, drop, 0;",
        "setp.eq.or.b32 use, any, 0, use;",
        "@use bra DROPPED;",
        "sub.u32 value, any, 1;",
        "and.b32 any, any, value;",
        "sub.s32 drop, drop, 1;",
        "bra DROP;",
        "DROPPED:",
        "or.b32 mask, mask, any;",
        "TAKEN:",
        "mov.b32 last_word, words;",
        "mul.lo.u32 name, warp, words;",
        "mad.lo.u32 name, name, 32, round;",
        "add.u32 name, name, lane;",
        f"add.u32 round, round, {32 * threads};",
        *_fetch_codes(threads, group),
        *_write_words(),
        "setp.lt.s32 use, round, $stop;",
        "@use bra ROUND;",
        "DONE:",
        "mov.b32 $out, 0;",
        "}",
    ]
    return numbered(lines, ["out", *_INPUTS])


def _fetch_codes(threads: int, group: int) -> list[str]:
    """The units from `round` on, `words` of 32 to a warp, one to a lane.

    Leaves its first `unit`, how many are `left`, their codes in `code0` to `code7`, and their group's `highest` step.
    """
    warps = threads // 32
    return [
        "sub.s32 value, $stop, round;",
        "add.s32 value, value, 31;",
        "shr.s32 value, value, 5;",
        f"min.s32 value, value, {threads};",
        f"add.s32 value, value, {warps - 1};",
        f"shr.s32 words, value, {warps.bit_length() - 1};",
        "mad.lo.s32 value, warp, words, lane;",
        "mad.lo.s32 unit, value, 32, round;",
        "sub.s32 left, $stop, unit;",
        "min.s32 left, left, 32;",
        "max.s32 left, left, 0;",
        "setp.lt.s32 use, lane, words;",
        "selp.b32 left, left, 0, use;",
        "setp.gt.s32 use, left, 0;",
        "mad.wide.u32 there, unit, 1, $codes;",
        "@use ld.global.cg.v4.b32 {code0, code1, code2, code3}, [there];",
        "@use ld.global.cg.v4.b32 {code4, code5, code6, code7}, [there + 16];",
        "sub.u32 value, unit, $first;",
        f"shr.u32 value, value, {group.bit_length() - 1};",
        "mad.wide.u32 there, value, 4, $tops;",
        f"mov.b32 highest, {NO_STEP};",
        "@use ld.global.cg.b32 highest, [there];",
    ]


def _find_cut(own: int, warps: int, of_lane: int, bins: int, steps: int, zero: int) -> list[str]:
    """From the `peak`s to the `lowest` step that is listed; writes the length of the row's list.

    Where no step is low enough, it is `beyond`, and the first `skip` of the units below the window stay out.

    A unit `far` steps below the largest weighs from 2^(-far / steps) up to one step more, in units of the lower edge of
    the largest step. Threads look after `own` of these steps each.
    """
    lines = []
    for i in range(own):
        lines += [
            f"mad.lo.u32 far, mine, {own}, {i};",
            "cvt.rn.f32.u32 value, far;",
            f"mul.f32 value, value, {float_literal(-1 / steps)};",
            f"ex2.approx.ftz.f32 weight{i}, value;",
        ]
    lines += [f"max.s32 peak0, peak0, peak{i};" for i in range(1, of_lane)]
    lines += [f"redux.sync.max.s32 top, peak0, {ALL_LANES};"]
    for i in range(own):
        lines += [
            f"mad.lo.u32 far, mine, {own}, {i};",
            "sub.s32 value, top, far;",
            f"setp.ge.s32 use, value, {-zero};",
            f"setp.lt.and.u32 use, far, {bins - 1}, use;",
            "mad.wide.s32 there, value, 4, $histogram;",
            f"mov.b32 count{i}, 0;",
            f"@use ld.global.cg.b32 count{i}, [there];",
        ]
    for i in range(own):
        lines += [f"cvt.rn.f32.u32 value, count{i};", f"mul.f32 weight{i}, value, weight{i};"]
        if i:
            lines += [f"add.u32 count{i}, count{i}, count{i - 1};", f"add.f32 weight{i}, weight{i}, weight{i - 1};"]
    # `sum` and `mass` become what precedes the thread, `inside` and `total` what all have
    lines += [
        f"mov.b32 sum, count{own - 1};",
        f"mov.b32 mass, weight{own - 1};",
        *running_sum("sum", "u32"),
        *running_sum("mass", "f32"),
        "setp.eq.b32 use, lane, 31;",
        *address("totals", "warp"),
        "@use st.shared.b32 [at], sum;",
        *address("masses", "warp"),
        "@use st.shared.b32 [at], mass;",
        f"sub.u32 sum, sum, count{own - 1};",
        f"shfl.sync.up.b32 other|use, mass, 1, 0, {ALL_LANES};",
        "selp.b32 mass, other, 0, use;",
        "bar.sync 0;",
        # a number of each warp in each group of lanes
        f"and.b32 group_lane, lane, {warps - 1};",
        *address("totals", "group_lane"),
        "ld.shared.b32 other, [at];",
        "selp.b32 inside, other, 0, few;",
        f"redux.sync.add.u32 inside, inside, {ALL_LANES};",
        "selp.b32 other, other, 0, fewer;",
        f"redux.sync.add.u32 other, other, {ALL_LANES};",
        "add.u32 sum, sum, other;",
        *address("masses", "group_lane"),
        "ld.shared.b32 total, [at];",
        "setp.lt.u32 use, group_lane, warp;",
        "selp.b32 mass_before, total, 0, use;",
    ]
    for i in range(warps.bit_length() - 1):
        for value in ("total", "mass_before"):
            lines += [
                f"shfl.sync.bfly.b32 other, {value}, {1 << i}, 31, {ALL_LANES};",
                f"add.f32 {value}, {value}, other;",
            ]
    lines += [
        "add.f32 mass, mass, mass_before;",
        # what lies below the window weighs at most as much as its lower edge
        "sub.s32 extra, $num_units, inside;",
        "cvt.rn.f32.s32 below, extra;",
        f"mul.f32 below, below, {float_literal(2.0 ** (-(bins - 2) / steps))};",
        "add.f32 rest, total, below;",
        "mul.f32 rest, rest, $top_p;",
        "setp.ge.f32 reached, total, rest;",
        f"mov.b32 cut, {bins};",
    ]
    for i in reversed(range(own)):
        lines += [
            f"add.f32 value, mass, weight{i};",
            "sub.f32 rest, total, value;",
            f"fma.rn.f32 rest, rest, {float_literal(2.0 ** (1 / steps))}, below;",
            "add.f32 rest, rest, value;",
            "mul.f32 rest, rest, $top_p;",
            "setp.ge.f32 use, value, rest;",
            f"add.u32 value, sum, count{i};",
            "setp.ge.and.s32 use, value, $wanted, use;",
            f"mad.lo.u32 far, mine, {own}, {i};",
            "@use mov.b32 cut, far;",
            "@use mov.b32 number, value;",
        ]
    return [
        *lines,
        f"redux.sync.min.u32 other, cut, {ALL_LANES};",
        *address("cuts", "warp"),
        "setp.eq.b32 use, lane, 0;",
        "@use st.shared.b32 [at], other;",
        # of the one lane whose it is; where there is none it is not looked at
        "setp.eq.b32 use, cut, other;",
        f"setp.lt.and.u32 use, cut, {bins}, use;",
        *address("numbers", "warp"),
        "@use st.shared.b32 [at], number;",
        "bar.sync 0;",
        *address("cuts", "group_lane"),
        "ld.shared.b32 cut, [at];",
        f"redux.sync.min.u32 cut, cut, {ALL_LANES};",
        f"setp.eq.b32 beyond, cut, {bins};",
        f"shr.u32 value, cut, {(32 * own).bit_length() - 1};",
        f"min.u32 value, value, {warps - 1};",
        *address("numbers", "value"),
        "ld.shared.b32 number, [at];",
        f"@beyond mov.b32 cut, {bins - 2};",
        "sub.s32 lowest, top, cut;",
        # only the floor on the count reaches below where p is reached
        "sub.s32 value, $wanted, inside;",
        "min.s32 value, extra, value;",
        "selp.b32 value, value, extra, reached;",
        "sub.s32 skip, extra, value;",
        "add.s32 value, inside, value;",
        "selp.b32 number, value, number, beyond;",
        "or.b32 value, $i_split, mine;",
        "setp.eq.b32 use, value, 0;",
        "@use st.global.b32 [$counts], number;",
    ]


def _mask_codes(bins: int) -> list[str]:
    """`mask`: a bit for each of the lane's units, whether it is listed; `valid`: whether it is there.

    A code, the distance to the group's highest step, is within the limit where the upper bit of its byte says so.
    """
    lines = [
        "sub.s32 limit, highest, lowest;",
        f"min.s32 limit, limit, {bins - 2};",
        f"mul.lo.u32 packed, limit, {0x01010101};",
        f"or.b32 high, packed, {0x80808080};",
        "mov.b32 mask, 0;",
    ]
    for i in reversed(range(8)):
        lines += [
            f"and.b32 value, code{i}, {0x7F7F7F7F};",
            "sub.u32 value, high, value;",
            # (limit and not code) or (limit as code and no borrow below)
            f"lop3.b32 value, packed, code{i}, value, {0xB2};",
            f"and.b32 value, value, {0x80808080};",
            # bits 7, 15, 23, 31 to 28, 29, 30, 31, and these into the mask
            f"mul.lo.u32 value, value, {0x00204081};",
            "shf.l.wrap.b32 mask, value, mask, 4;",
        ]
    return [
        *lines,
        "shl.b32 valid, 1, left;",
        "sub.u32 valid, valid, 1;",
        "setp.ge.s32 use, limit, 0;",
        "selp.b32 value, valid, 0, use;",
        "and.b32 mask, mask, value;",
    ]


def _write_words() -> list[str]:
    """Write what is listed of the warp's `last_word` words, the units of one by its lanes.

    Word i has the `mask` and the `offset` of lane i. `name` is the lane's unit in the first word.
    """
    words = range(4)
    lines = ["mov.b32 word, 0;", "WORDS:", "setp.ge.s32 use, word, last_word;", "@use bra WRITTEN;"]
    for i in words:
        lines += [f"add.u32 value, word, {i};", f"shfl.sync.idx.b32 word_mask{i}, mask, value, 31, {ALL_LANES};"]
    lines += [
        "or.b32 any, word_mask0, word_mask1;",
        "or.b32 any, any, word_mask2;",
        "or.b32 any, any, word_mask3;",
        "setp.eq.b32 use, any, 0;",
        "@use bra EMPTY;",
    ]
    for i in words:
        lines += [f"add.u32 value, word, {i};", f"shfl.sync.idx.b32 place{i}, offset, value, 31, {ALL_LANES};"]
    for i in words:
        lines += [
            f"and.b32 value, word_mask{i}, lower;",
            "popc.b32 value, value;",
            f"add.u32 value, value, place{i};",
            "mad.wide.u32 there, value, 4, $indices;",
            f"and.b32 value, word_mask{i}, bit;",
            "setp.ne.b32 use, value, 0;",
            f"add.u32 value, name, {32 * i};",
            "@use st.global.b32 [there], value;",
        ]
    return [*lines, "EMPTY:", "add.u32 name, name, 128;", "add.u32 word, word, 4;", "bra WORDS;", "WRITTEN:"]
