"""RoPE of a decode step's queries and keys in one launch, rounded as the base's own code rounds.

y = round(x * cos) + round(half(x) * sin)        half(x) = [-x_2, x_1], the two halves of a head swapped
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, next_power_of_2, tl, triton


def rotate_reference(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`vectors` `[B, H, M, D]` rotated by `cos`, `sin` `[B, M, D]` (B or 1 of them)."""
    first, second = vectors.chunk(2, -1)
    return vectors * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


if HAS_TRITON:

    @triton.jit
    def _rotate_step_kernel(
        p_query,
        p_key,
        p_cos,
        p_sin,
        p_query_out,
        p_key_out,
        num_heads,
        num_kv_heads,
        q_len,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_km,
        stride_cb,
        stride_cm,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """One head (a query's or a key's) of one token."""
        i_head = tl.program_id(0)
        i_token = tl.program_id(1) % q_len
        i_batch = (tl.program_id(1) // q_len).to(tl.int64)
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        second = o_dim >= HEAD_DIM // 2
        o_partner = tl.where(second, o_dim - HEAD_DIM // 2, o_dim + HEAD_DIM // 2)
        if i_head < num_heads:
            p_from = p_query + i_batch * stride_qb + i_head * stride_qh + i_token * stride_qm
            p_to = p_query_out + ((i_batch * num_heads + i_head) * q_len + i_token) * HEAD_DIM
        else:
            p_from = p_key + i_batch * stride_kb + (i_head - num_heads) * stride_kh + i_token * stride_km
            p_to = p_key_out + ((i_batch * num_kv_heads + i_head - num_heads) * q_len + i_token) * HEAD_DIM
        o_angle = i_batch * stride_cb + i_token * stride_cm + o_dim
        b_cos = tl.load(p_cos + o_angle, mask=m_dim, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_angle, mask=m_dim, other=0.0).to(tl.float32)
        b_here = tl.load(p_from + o_dim, mask=m_dim, other=0.0).to(tl.float32)
        b_there = tl.load(p_from + o_partner, mask=m_dim, other=0.0).to(tl.float32)
        b_there = tl.where(second, b_there, -b_there)
        dtype = p_query_out.dtype.element_ty
        b_here = (b_here * b_cos).to(dtype).to(tl.float32)
        b_there = (b_there * b_sin).to(dtype).to(tl.float32)
        tl.store(p_to + o_dim, (b_here + b_there).to(dtype), mask=m_dim)


def rotate_step(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `query` `[B, Hq, M, D]` and `key` `[B, Hkv, M, D]` by `cos`, `sin` `[B, M, D]`; Triton, no gradients.

    Raises:
        ValueError: `cos` does not cover the whole head.
    """
    batch, heads, q_len, dim = query.shape
    if cos.shape != sin.shape or cos.shape[1:] != (q_len, dim) or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos and sin must be [{batch}, {q_len}, {dim}], got {tuple(cos.shape)}, {tuple(sin.shape)}")
    cos, sin = (part.expand(batch, -1, -1) for part in (cos, sin))
    if query.stride(3) != 1 or key.stride(3) != 1 or cos.stride(2) != 1 or sin.stride() != cos.stride():
        query, key, cos, sin = (part.contiguous() for part in (query, key, cos, sin))
    outs = tuple(torch.empty(part.shape, dtype=query.dtype, device=query.device) for part in (query, key))
    _rotate_step_kernel[(heads + key.shape[1], batch * q_len)](
        query,
        key,
        cos,
        sin,
        *outs,
        heads,
        key.shape[1],
        q_len,
        *query.stride()[:3],
        *key.stride()[:3],
        *cos.stride()[:2],
        HEAD_DIM=dim,
        BLOCK_D=next_power_of_2(dim),
        num_warps=1,
    )
    return outs[0], outs[1]
