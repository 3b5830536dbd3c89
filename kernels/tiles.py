"""What the attention kernels for many rows share: loads, scores and online softmax of a tile, and their host side.

Kernels work in units of log2, as exp2 is one instruction: `log2_scales` gives them the softmax scale and the soft-cap
with log2(e) in them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .common import HAS_TRITON, tl, triton

LOG2E = math.log2(math.e)


class TileLaunch(NamedTuple):
    """Length of the tile that a program keeps and of the tiles that it streams, warps, stages.

    registers: at most so many a thread; None leaves it to the compiler.
    """

    fixed: int
    streamed: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def log2_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """The kernels' `scale` and `softcap`; with a cap, `scale` is the factor inside its tanh, doubled."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2 * scale / softcap * LOG2E, softcap * LOG2E


def precision(tensor: torch.Tensor) -> str:
    """`input_precision` of dot products: fp32 operands are multiplied as such."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def tma_ready(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read `[B, H, N, D]` as it lies: 16-byte base and strides."""
    size = tensor.element_size()
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:3])
    return aligned and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


if HAS_TRITON:

    @triton.jit
    def load_rows(p_base, o_row, stride, m_row, o_column, COLUMNS: tl.constexpr):
        """Rows of a matrix with unit column stride; zeros where `m_row` is off and beyond its columns."""
        p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
        return tl.load(p_tile, mask=m_row[:, None] & (o_column < COLUMNS)[None, :], other=0.0)

    @triton.jit
    def cap_scores(b_s, scale, softcap, SOFTCAP: tl.constexpr):
        """Products of query and key to scores, in units of log2."""
        if SOFTCAP:
            # softcap * tanh(x), with tanh(x) = 1 - 2 / (exp(2 x) + 1), safe at both ends
            return softcap - 2.0 * softcap / (tl.exp2(b_s * scale) + 1.0)
        return b_s * scale

    @triton.jit
    def begin_softmax(p_logits, head, BLOCK_M: tl.constexpr, HAS_LOGITS: tl.constexpr):
        """Maximum and sum `[BLOCK_M]` of rows that have seen no key yet."""
        if HAS_LOGITS:
            # the learned sink is a column of the denominator that has no value
            logit = tl.load(p_logits + head).to(tl.float32) * 1.4426950408889634
            b_max = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(logit, -1.0e30)
            b_sum = tl.exp2(logit - b_max)
        else:
            # finite, so that rows which have seen nothing yet never compute inf - inf
            b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)
        return b_max, b_sum

    @triton.jit
    def attend(
        b_q,
        b_k,
        b_v,
        b_mask,
        b_acc,
        b_max,
        b_sum,
        scale,
        softcap,
        MASKED: tl.constexpr,
        SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One key tile of the online softmax."""
        # [BLOCK_M, keys]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SOFTCAP:
            b_s = cap_scores(b_s, scale, softcap, SOFTCAP)
            if MASKED:
                b_s = tl.where(b_mask, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
        else:
            # the scale is folded into the exponent: one multiply-add for each score
            if MASKED:
                b_s = tl.where(b_mask, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        return b_acc, b_new, b_sum
