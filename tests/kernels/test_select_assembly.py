"""The assembly of score and select, run on the CPU (`ptx_program.py`): the interpreter of Triton cannot run it."""

from itertools import pairwise

import pytest
import torch
from ptx_program import WORD, Program, as_bits

from rtpurbo_hf.kernels.count_assembly import NO_STEP, count_assembly
from rtpurbo_hf.kernels.list_assembly import list_assembly
from rtpurbo_hf.kernels.score_select import _STEPS
from rtpurbo_hf.kernels.workspace import HISTOGRAM_BINS, HISTOGRAM_SPAN, HISTOGRAM_ZERO

ELEMENTS, GROUP = 4, 128
COUNTS, TOPS, SUMS, PEAKS, CODES, LIST, LENGTH = (place << 32 for place in range(1, 8))


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("threads", [128, 256])
def test_counts_add_up_over_tiles(threads: int, tiles: int) -> None:
    generator = torch.Generator().manual_seed(threads + tiles)
    text = count_assembly(threads, ELEMENTS, HISTOGRAM_BINS, HISTOGRAM_SPAN, HISTOGRAM_ZERO)
    program = Program(text, threads)
    # other programs have counted before
    program.words = {COUNTS + 4 * place: place for place in range(HISTOGRAM_SPAN)}
    counts = torch.zeros(HISTOGRAM_SPAN, dtype=torch.int64)
    for tile in range(tiles):
        # more than one turn around the bins, the last places included
        places = torch.randint(HISTOGRAM_SPAN - 600, HISTOGRAM_SPAN, (threads, ELEMENTS), generator=generator)
        use = torch.rand(threads, ELEMENTS, generator=generator) < 0.9
        # a warp past the end counts nothing; of any other at least the first value counts
        use[::32, 0] = True
        use[32:64] = False
        tops = torch.where(use, places, 0).view(threads // 32, -1).amax(1) - HISTOGRAM_ZERO
        counts += torch.bincount(places[use], minlength=HISTOGRAM_SPAN)
        largest = int(counts.nonzero().max())
        call = (tile == 0) + 2 * (tile == tiles - 1)
        here = TOPS + 4 * tile * len(tops)
        uniform = [call], [here], [COUNTS], [SUMS], [PEAKS]
        program.run(
            [
                [-7] * ELEMENTS
                + places[thread].tolist()
                + use[thread].int().tolist()
                + uniform[0] * ELEMENTS
                + [int(tops[thread // 32])] * ELEMENTS
                + [value for each in uniform[1:] for value in each * ELEMENTS]
                for thread in range(threads)
            ]
        )
        stored = [program.words.get(here + 4 * warp) for warp in range(len(tops))]
        assert stored == [top if use[32 * warp, 0] else None for warp, top in enumerate(tops.tolist())]
    added = torch.tensor([program.words[COUNTS + 4 * place] - place for place in range(HISTOGRAM_SPAN)])
    assert torch.equal(added, counts)
    assert program.words[PEAKS] == largest - HISTOGRAM_ZERO
    sums = [program.words[SUMS + 4 * far] for far in range(HISTOGRAM_BINS)]
    assert sums == counts[: largest + 1].flip(0)[:HISTOGRAM_BINS].cumsum(0).tolist()


def _row(num_units: int, kind: str) -> torch.Tensor:
    """The steps of a row's units."""
    generator = torch.Generator().manual_seed(num_units)
    scores = {
        "sparse": torch.randn(num_units, generator=generator) * 40,
        "dense": torch.randn(num_units, generator=generator) * 4,
        # a few lie so far above the rest that the window of the histogram holds nothing else
        "beyond": torch.where(torch.arange(num_units) % 97 == 5, 300.0, -torch.rand(num_units, generator=generator)),
        # the same with one of them: where p is near 1, the rest weighs too much to be left out
        "one": torch.where(torch.arange(num_units) == num_units // 3, 300.0, 0.0),
        "equal": torch.zeros(num_units),
    }[kind]
    return scores.floor().int()


def _expected(steps: torch.Tensor, top_p: float, wanted: int) -> list[int]:
    """What the contract of `select_top_p` says of bins: the fewest steps, then the latest of what lies below."""
    top = int(steps.max())
    for lowest in range(top, top - HISTOGRAM_BINS + 1, -1):
        inside = steps >= lowest
        mass = float(torch.exp2((steps[inside] - top).double() / _STEPS).sum())
        window = (steps < lowest) & (steps > top - HISTOGRAM_BINS + 1)
        rest = float(torch.exp2((steps[window] - top).double() / _STEPS).sum()) * 2 ** (1 / _STEPS)
        under = int((steps <= top - HISTOGRAM_BINS + 1).sum()) * 2 ** (-(HISTOGRAM_BINS - 2) / _STEPS)
        if mass >= top_p * (mass + rest + under) and int(inside.sum()) >= wanted:
            return inside.nonzero().flatten().tolist()
    inside = steps > top - HISTOGRAM_BINS + 1
    below = (~inside).nonzero().flatten().tolist()
    more = wanted - int(inside.sum()) if mass >= top_p * (mass + under) else len(below)
    return sorted(inside.nonzero().flatten().tolist() + below[len(below) - more :])


@pytest.mark.parametrize(
    ("threads", "num_units", "shares", "kind", "top_p", "wanted"),
    [
        (128, 900, 3, "dense", 0.9, 0),
        (128, 6000, 1, "dense", 0.9, 0),
        (256, 20000, 2, "sparse", 0.9, 0),
        (256, 1500, 40, "sparse", 0.5, 0),
        (128, 700, 150, "dense", 0.9, 0),
        (256, 3000, 5, "sparse", 0.9, 1234),
        (256, 3000, 4, "beyond", 0.9, 500),
        (128, 12000, 2, "beyond", 0.9, 12000),
        (256, 12000, 3, "one", 0.9, 7),
        (256, 12000, 3, "one", 0.999999, 7),
        (128, 300, 2, "equal", 0.9, 0),
        (128, 1, 2, "equal", 0.9, 1),
        (128, 0, 2, "equal", 0.9, 0),
    ],
)
def test_lists_what_reaches_the_threshold(
    threads: int, num_units: int, shares: int, kind: str, top_p: float, wanted: int
) -> None:
    steps = _row(num_units, kind)
    groups = -(-num_units // GROUP)
    bounds = [min(GROUP * (groups * i // shares), num_units) for i in range(shares + 1)]
    padded = torch.cat([steps, torch.full((GROUP,), NO_STEP, dtype=torch.int32)])
    tops = [int(padded[first : first + GROUP].max()) for first in range(0, num_units, GROUP)]
    codes = [min(tops[unit // GROUP] - step, 255) for unit, step in enumerate(steps.tolist())]
    words = {TOPS + 4 * group: top & WORD for group, top in enumerate(tops)}
    # what lies past the end is no code
    codes += [0] * 64
    words |= {CODES + i: int.from_bytes(bytes(codes[i : i + 4]), "little") for i in range(0, len(codes) - 3, 4)}
    for step in range(-HISTOGRAM_ZERO, HISTOGRAM_SPAN - HISTOGRAM_ZERO):
        words[COUNTS + 4 * step] = 0
    for step in steps.tolist():
        words[COUNTS + 4 * step] += 1
    for share, (first, stop) in enumerate(pairwise(bounds)):
        own = steps[first:stop]
        peak = int(own.max()) if len(own) else NO_STEP
        words[PEAKS + 4 * share] = peak & WORD
        for far in range(HISTOGRAM_BINS if len(own) else 0):
            words[SUMS + 4 * (share * HISTOGRAM_BINS + far)] = int((own >= peak - far).sum())
    text = list_assembly(threads, shares, HISTOGRAM_BINS, _STEPS, HISTOGRAM_ZERO, GROUP)
    expected = _expected(steps, top_p, wanted) if num_units else []
    for share in sorted({0, shares // 3, shares - 1}):
        first, stop = bounds[share : share + 2]
        # nothing is read that has not been written; of a row without units only what no one looks at
        program = Program(text, threads, None if num_units else lambda _: 77)
        program.words = dict(words)
        addresses = [CODES, TOPS + 4 * (first // GROUP), COUNTS, SUMS, PEAKS, LIST, LENGTH]
        numbers = [num_units, wanted, as_bits(top_p), share, shares, first, stop]
        program.run([[-7, *addresses, *numbers] for _ in range(threads)])
        before = sum(unit < first for unit in expected)
        mine = [unit for unit in expected if first <= unit < stop]
        written = {place: unit for place, unit in program.words.items() if LIST <= place < LENGTH}
        assert written == {LIST + 4 * (before + i): unit for i, unit in enumerate(mine)}
        assert program.words.get(LENGTH) == (len(expected) if share == 0 else None)
