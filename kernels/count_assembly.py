"""The counting of `score_range.py` in PTX (`ptx.py`)."""

from __future__ import annotations

from functools import lru_cache

import torch

from .ptx import ALL_LANES, WHO, address, numbered, running_sum, sums_over_warps

# below every step
NO_STEP = -32768
_INPUTS = {
    "place": "r",
    "counts": "r",
    "call": "r",
    "top": "r",
    "tops": "l",
    "all": "l",
    "sums": "l",
    "peak": "l",
}


@lru_cache(maxsize=64)
def counts_by_assembly(device: torch.device) -> bool:
    """Whether `device` runs `count_assembly`: not where the compiler makes two copies of a loop of products.

    Triton 3.8 and later do for capability 10.0, and one of them would declare the shared memory again.
    """
    return sums_over_warps(device) and torch.cuda.get_device_capability(device)[0] in (8, 9)


@lru_cache(maxsize=8)
def count_constraints(elements: int) -> str:
    return ",".join(["=&r"] * elements + [kind for kind in _INPUTS.values() for _ in range(elements)])


@lru_cache(maxsize=8)
def count_assembly(threads: int, elements: int, bins: int, places: int, zero: int) -> str:
    """Counts how often each of `places` steps occurs, over all calls of a program, in shared memory.

    Inputs, for the `elements` values of each of `threads` threads:
        place: a step, and `zero` more. counts: whether it counts.
        call: 1 in the first call, 2 in the last, 3 if it is both.
        top: the largest step of the warp. tops: address of where the first warp's is to be stored.
        all: address of the counts of all programs, to which the last call adds.
        sums: of where the last call stores `bins` running sums, from the largest step of all calls down.
        peak: of where it stores that step.
    The outputs are 0.

    The shared memory is declared outside of a scope: a compiler that copied the call would not get two of them unseen.
    It comes before the compiler's own, which is to begin at a multiple of 1 KiB: it is one of that size.
    """
    own, warps = bins // threads, threads // 32
    # behind the counts: the largest step, and a number of each warp
    size = -(-(places + 1 + warps) // 256) * 256
    largest, totals = 4 * places, 4 * places + 4
    lines = [
        f".shared .align 16 .b32 counts[{size}];",
        "{",
        ".reg .pred use;",
        ".reg .b32 mine, lane, warp, base, at, value, other, sum, top;",
        ".reg .b64 there;",
        f".reg .b32 held<{own}>;",
        *WHO,
        "mov.u32 base, counts;",
        "and.b32 value, $call0, 1;",
        "setp.eq.b32 use, value, 0;",
        "@use bra COUNT;",
        *address("counts", "mine"),
        *(f"st.shared.b32 [at + {4 * threads * i}], 0;" for i in range(places // threads)),
        "setp.eq.b32 use, mine, 0;",
        f"@use st.shared.b32 [counts + {largest}], {NO_STEP};",
        "bar.sync 0;",
        "COUNT:",
        # the first lane of a warp stores its largest, unless the warp's first value does not count
        "setp.eq.b32 use, lane, 0;",
        "setp.ne.and.b32 use, $counts0, 0, use;",
        "mad.wide.u32 there, warp, 4, $tops0;",
        "@use st.global.b32 [there], $top0;",
        f"@use red.shared.max.s32 [counts + {largest}], $top0;",
    ]
    for i in range(elements):
        lines += [
            f"setp.ne.b32 use, $counts{i}, 0;",
            f"mad.lo.u32 at, $place{i}, 4, base;",
            "@use red.shared.add.u32 [at], 1;",
            f"mov.b32 $out{i}, 0;",
        ]
    lines += [
        "and.b32 value, $call0, 2;",
        "setp.eq.b32 use, value, 0;",
        "@use bra DONE;",
        "bar.sync 0;",
        f"ld.shared.b32 top, [counts + {largest}];",
    ]
    # a thread's own steps follow one another, from the largest down
    for i in range(own):
        lines += [
            f"mad.lo.s32 value, mine, {-own}, top;",
            f"add.s32 value, value, {zero - i};",
            "setp.ge.s32 use, value, 0;",
            "mad.lo.u32 at, value, 4, base;",
            f"mov.b32 held{i}, 0;",
            f"@use ld.shared.b32 held{i}, [at];",
            *([f"add.u32 held{i}, held{i}, held{i - 1};"] if i else []),
        ]
    lines += [
        f"mov.b32 sum, held{own - 1};",
        *running_sum("sum", "u32"),
        "setp.eq.b32 use, lane, 31;",
        *address("counts", "warp"),
        f"@use st.shared.b32 [at + {totals}], sum;",
        f"sub.u32 sum, sum, held{own - 1};",
        "setp.eq.b32 use, mine, 0;",
        "@use st.global.b32 [$peak0], top;",
        *address("counts", "mine"),
        "mad.wide.u32 there, mine, 4, $all0;",
    ]
    for i in range(places // threads):
        lines += [
            f"ld.shared.b32 value, [at + {4 * threads * i}];",
            "setp.ne.b32 use, value, 0;",
            f"@use red.global.add.u32 [there + {4 * threads * i}], value;",
        ]
    lines += [
        "bar.sync 0;",
        # what the warps before have
        "setp.lt.u32 use, lane, warp;",
        *address("counts", "lane"),
        "mov.b32 other, 0;",
        f"@use ld.shared.b32 other, [at + {totals}];",
        f"redux.sync.add.u32 other, other, {ALL_LANES};",
        "add.u32 sum, sum, other;",
        f"mad.wide.u32 there, mine, {4 * own}, $sums0;",
    ]
    for i in range(own):
        lines += [f"add.u32 value, sum, held{i};", f"st.global.b32 [there + {4 * i}], value;"]
    operands = [f"{name}{i}" for name in ("out", *_INPUTS) for i in range(elements)]
    return numbered([*lines, "DONE:", "}"], operands)
