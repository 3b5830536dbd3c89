"""The assembly that counts scores, run on the CPU (`ptx_program.py`): the interpreter of Triton cannot run it."""

import pytest
import torch
from ptx_program import Program

from rtpurbo_hf.kernels.score_range import count_assembly
from rtpurbo_hf.kernels.workspace import HISTOGRAM_BINS, HISTOGRAM_SPAN

ELEMENTS = 4
# where the counts of all programs and the numbers of the warps are
COUNTS, TOPS = 1 << 34, 1 << 35


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("threads", [128, 256])
def test_counts_add_up_over_tiles(threads: int, tiles: int) -> None:
    generator = torch.Generator().manual_seed(threads + tiles)
    program = Program(count_assembly(threads, ELEMENTS, HISTOGRAM_BINS, HISTOGRAM_SPAN), threads)
    # other programs have counted before
    program.words = {COUNTS + 4 * place: place for place in range(HISTOGRAM_SPAN)}
    counts = torch.zeros(HISTOGRAM_SPAN, dtype=torch.int64)
    for tile in range(tiles):
        # more than one turn around the bins, the last places included
        places = torch.randint(HISTOGRAM_SPAN - 600, HISTOGRAM_SPAN, (threads, ELEMENTS), generator=generator)
        use = torch.rand(threads, ELEMENTS, generator=generator) < 0.9
        use[32] = False
        tops = torch.randint(1000, (threads // 32,), generator=generator)
        counts += torch.bincount(places[use], minlength=HISTOGRAM_SPAN)
        largest = int(counts.nonzero().max())
        call = (tile == 0) + 2 * (tile == tiles - 1)
        here = TOPS + 4 * tile * len(tops)
        operands = [
            [-7] * (2 * ELEMENTS)
            + places[thread].tolist()
            + use[thread].int().tolist()
            + [call] * ELEMENTS
            + [largest] * ELEMENTS
            + [COUNTS] * ELEMENTS
            + [int(tops[thread // 32])] * ELEMENTS
            + [here] * ELEMENTS
            for thread in range(threads)
        ]
        program.run(operands)
        stored = [program.words.get(here + 4 * warp) for warp in range(len(tops))]
        assert stored == [top if use[32 * warp, 0] else None for warp, top in enumerate(tops.tolist())]
    assert stored[1] is None
    added = torch.tensor([program.words[COUNTS + 4 * place] - place for place in range(HISTOGRAM_SPAN)])
    assert torch.equal(added, counts)

    bins = {bin: count for row in operands for bin, count in zip(row[ELEMENTS : 2 * ELEMENTS], row, strict=False)}
    bins.pop(-1)
    window = range(largest - HISTOGRAM_BINS + 1, largest + 1)
    assert bins == {place % HISTOGRAM_BINS: int(counts[place]) for place in window}
