"""Pieces of the PTX in `count_assembly.py` and `list_assembly.py`: NVIDIA's assembly, where the compiler takes several
times the instructions.

With so few warps on a multiprocessor each instruction of a warp waits for the one before it: their number is the time.
The interpreter of Triton cannot run them; `tests/kernels/ptx_program.py` does. `$name` in the lines is an operand.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

import torch

ALL_LANES = 0xFFFFFFFF
# who a thread is
WHO = ["mov.u32 mine, %tid.x;", "and.b32 lane, mine, 31;", "shr.u32 warp, mine, 5;"]


@lru_cache(maxsize=64)
def sums_over_warps(device: torch.device) -> bool:
    """Whether `device` sums over a warp in one instruction: NVIDIA's from compute capability 8.0 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 8


def numbered(lines: list[str], operands: list[str]) -> str:
    """The lines as one text, with numbers for the names of operands."""
    numbers = {name: f"${i}" for i, name in enumerate(operands)}
    return re.sub(r"\$([a-z_]+\d*)", lambda found: numbers[found[1]], "\n".join(lines))


def float_literal(number: float) -> str:
    """An fp32 number as PTX writes it."""
    return "0f" + struct.pack(">f", number).hex().upper()


def address(array: str, index: str) -> list[str]:
    """`at` becomes where a number is in shared memory."""
    return [f"mov.u32 at, {array};", f"mad.lo.u32 at, {index}, 4, at;"]


def running_sum(value: str, kind: str) -> list[str]:
    """`value` becomes its sum over the lanes up to each; takes `other` and `use`."""
    lines = []
    for step in (1, 2, 4, 8, 16):
        lines += [f"shfl.sync.up.b32 other|use, {value}, {step}, 0, {ALL_LANES};"]
        lines += [f"@use add.{kind} {value}, {value}, other;"]
    return lines
