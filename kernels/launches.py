"""How kernels that follow one another are launched: on Hopper and later, the next one may start up meanwhile.

A kernel with `PDL` set waits until the one before it has ended and its writes are seen (`gdc_wait`), and lets the one
after it start up at once (`gdc_launch_dependents`); what overlaps is the launch itself (programmatic dependent launch).
Head tables are copied, not written by a kernel, and may be read before the wait. So may whatever the kernel before had
waited for when it let this one start, and nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .common import HAS_TRITON, tl, triton

if HAS_TRITON:

    @triton.jit
    def after_previous(PDL: tl.constexpr):
        """Wait for the end of the launch before this one, and let the one after it start up."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


@lru_cache(maxsize=64)
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the launch of a kernel with the `PDL` constant."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
