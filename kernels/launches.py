"""How kernels that follow one another are launched: on Hopper and later, the next one may start up meanwhile.

A kernel with `PDL` set waits for the end of the one before it (`gdc_wait`) before it touches what that one may use, and
lets the one after it start up at once (`gdc_launch_dependents`); what overlaps is the launch itself (programmatic
dependent launch). Only kernels with `PDL` set let another start early, and none of them writes a length, a start or a
head table: those can be read before the wait.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=64)
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the launch of a kernel with the `PDL` constant."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
