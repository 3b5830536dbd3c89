"""The product inside a gated MLP in one pass, rounded as the base models' own code rounds.

    y = round(round(silu(gate)) * up)        silu(x) = x / (1 + exp(-x)), in fp32

Two passes and a tensor less than activation and product one after the other. Forward only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .common import HAS_TRITON, ceil_div, tl, triton
from .launches import launch_options

# numbers of a program
TILE = 4096


def silu_product_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The contract of `silu_product`, as the base models compute it."""
    return F.silu(gate) * up


if HAS_TRITON:
    from .launches import after_previous

    # specialised by the divisibility of `size`: else the mask would forbid wide loads
    @triton.jit
    def _silu_product_kernel(p_gate, p_up, p_out, size, TILE: tl.constexpr, PDL: tl.constexpr):
        o_tile = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        m_tile = o_tile < size
        after_previous(PDL)
        # [TILE]
        b_gate = tl.load(p_gate + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_up = tl.load(p_up + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        dtype: tl.constexpr = p_out.dtype.element_ty
        b_gate = (b_gate / (1.0 + tl.exp(-b_gate))).to(dtype).to(tl.float32)
        tl.store(p_out + o_tile, (b_gate * b_up).to(dtype), mask=m_tile)


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for two tensors of one shape and dtype; Triton, no gradients.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be of one shape and dtype, got {gate.dtype} {tuple(gate.shape)} and {up.dtype} "
            f"{tuple(up.shape)}"
        )
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(gate):
        options = launch_options(gate.device)
        _silu_product_kernel[(ceil_div(out.numel(), TILE),)](
            gate, up, out, out.numel(), TILE=TILE, num_warps=8, **options
        )
    return out
