"""Kernels of two phases with a barrier between: one cooperative launch on a GPU, two launches elsewhere."""

from __future__ import annotations

from typing import Any

from .common import HAS_TRITON, tl, triton

wait_for_all: Any = None

if HAS_TRITON:

    @triton.jit
    def wait_for_all(p_arrived, p_generation, count):
        """Barrier of `count` CTAs, which must all be resident. Both words start at 0; the barrier is reusable."""
        generation = tl.atomic_add(p_generation, 0, sem="acquire")
        tl.debug_barrier()
        if tl.atomic_add(p_arrived, 1, sem="acq_rel") == count - 1:
            tl.atomic_xchg(p_arrived, 0, sem="relaxed")
            tl.atomic_add(p_generation, 1, sem="release")
        else:
            # plain reads do not hold up the arrivals; the last, atomic one acquires
            while tl.load(p_generation, volatile=True) == generation:
                pass
            tl.atomic_add(p_generation, 0, sem="acquire")
        tl.debug_barrier()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    phases: tuple[str, str],
    *,
    on_gpu: bool,
    alone: bool = False,
) -> None:
    """Run both phases of `kernel`; the interpreter runs CTAs one after the other and cannot wait inside one.

    A cooperative launch fails, instead of hanging, when the grid does not fit on the GPU at once. `alone`: each CTA
    waits for itself only, so the grid may be of any size.
    """
    first, second = phases
    if on_gpu:
        kernel[grid](*arguments, **constants, **{first: True, second: True}, launch_cooperative_grid=not alone)
        return
    kernel[grid](*arguments, **constants, **{first: True, second: False})
    kernel[grid](*arguments, **constants, **{first: False, second: True})
