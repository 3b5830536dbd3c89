"""RMSNorm over the last dimension in one pass, rounded as the base models' own code rounds.

    n(x) = x / sqrt(mean(x^2) + eps)         in fp32
    "rounded"   y = round(w * round(n(x)))   Llama, Qwen and most others
    "plain"     y = round(w * n(x))          OLMo 2, GPT-OSS
    "offset"    y = round((1 + w) * n(x))    Gemma

The base's own code makes six passes over its input, four of them in fp32. Forward only.
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, ceil_div, next_power_of_2, tl, triton
from .launches import launch_options

FORMS = ("rounded", "plain", "offset")
# numbers that a program holds, and the longest row of one program
TILE, MAX_DIM = 2048, 1 << 15


def rms_norm_reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float, *, form: str) -> torch.Tensor:
    """The contract of `rms_norm`, operation by operation as the base models compute it."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rounded":
        return weight * wide.to(hidden.dtype)
    if form == "offset":
        return (wide * (1.0 + weight.float())).to(hidden.dtype)
    return (weight * wide).to(hidden.dtype)


if HAS_TRITON:
    from .launches import after_previous

    @triton.jit(do_not_specialize=["num_rows"])
    def _rms_norm_kernel(
        p_hidden,
        p_weight,
        p_out,
        num_rows,
        eps,
        DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        ROUNDED: tl.constexpr,
        OFFSET: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """A few short rows, or one long one."""
        o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        o_dim = tl.arange(0, BLOCK_D)
        m_tile = (o_row < num_rows)[:, None] & (o_dim < DIM)[None, :]
        o_tile = o_row.to(tl.int64)[:, None] * DIM + o_dim[None, :]
        after_previous(PDL)
        # [ROWS, BLOCK_D]
        b_x = tl.load(p_hidden + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
        b_x *= (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / DIM + eps))[:, None]
        if ROUNDED:
            b_x = b_x.to(p_out.dtype.element_ty).to(tl.float32)
        if OFFSET:
            b_weight += 1.0
        tl.store(p_out + o_tile, (b_x * b_weight[None, :]).to(p_out.dtype.element_ty), mask=m_tile)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, *, form: str) -> torch.Tensor:
    """RMSNorm of `hidden` `[..., D]` by `weight` `[D]` of one dtype, contiguous; Triton, no gradients.

    Args:
        form: one of `FORMS`, where the result is rounded and what the weight means.

    Raises:
        ValueError: another form, a weight that does not fit, or rows of more than `MAX_DIM` numbers.
    """
    dim = hidden.shape[-1]
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if weight.shape != (dim,) or weight.dtype != hidden.dtype or dim > MAX_DIM:
        raise ValueError(
            f"expected a weight [{dim}] of {hidden.dtype} and at most {MAX_DIM} numbers a row, got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    block = next_power_of_2(dim)
    num_rows = hidden.numel() // max(dim, 1)
    rows = min(max(TILE // block, 1), next_power_of_2(max(num_rows, 1)))
    if num_rows == 0:
        return out
    with torch.cuda.device_of(hidden):
        _rms_norm_kernel[(ceil_div(num_rows, rows),)](
            hidden,
            weight.contiguous(),
            out,
            num_rows,
            eps,
            DIM=dim,
            BLOCK_D=block,
            ROWS=rows,
            ROUNDED=form == "rounded",
            OFFSET=form == "offset",
            num_warps=max(1, min(rows * block // 512, 16)),
            **launch_options(hidden.device),
        )
    return out
