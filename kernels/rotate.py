"""RoPE of queries and keys in one launch, rounded as the base's own code rounds.

y = round(x * cos) + round(half(x) * sin)        half(x) = [-x_2, x_1], the two halves of a head swapped

A decode step's few tokens and a prefill's many alike: each number is read once and written once. Forward only.
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, ceil_div, next_power_of_2, tl, triton
from .launches import launch_options

# tokens of a program, at most
TOKENS = 32


def rotate_reference(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`vectors` `[B, H, M, D]` rotated by `cos`, `sin` `[B, M, D]` (B or 1 of them)."""
    first, second = vectors.chunk(2, -1)
    return vectors * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


if HAS_TRITON:
    from .launches import after_previous

    @triton.jit
    def _turned(b_x, b_cos, b_half, b_sin, dtype: tl.constexpr):
        """x * cos + half * sin, each product rounded to `dtype` as in the base's code."""
        b_x = (b_x.to(tl.float32) * b_cos).to(dtype).to(tl.float32)
        b_half = (b_half.to(tl.float32) * b_sin).to(dtype).to(tl.float32)
        return (b_x + b_half).to(dtype)

    @triton.jit(do_not_specialize=["q_len"])
    def _rotate_kernel(
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
        stride_yb,
        stride_yh,
        stride_ym,
        stride_zb,
        stride_zh,
        stride_zm,
        HALF: tl.constexpr,
        BLOCK_H: tl.constexpr,
        TOKENS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One head (a query's or a key's) of a few tokens; programs of the same tokens follow one another."""
        i_head = (tl.program_id(0) % (num_heads + num_kv_heads)).to(tl.int64)
        i_tile = tl.program_id(0) // (num_heads + num_kv_heads)
        tiles = (q_len + TOKENS - 1) // TOKENS
        i_batch = (i_tile // tiles).to(tl.int64)
        o_token = i_tile % tiles * TOKENS + tl.arange(0, TOKENS)
        o_half = tl.arange(0, BLOCK_H)
        m_tile = (o_token < q_len)[:, None] & (o_half < HALF)[None, :]
        o_token = o_token.to(tl.int64)[:, None]
        if i_head < num_heads:
            p_from = p_query + i_batch * stride_qb + i_head * stride_qh + o_token * stride_qm
            p_to = p_query_out + i_batch * stride_yb + i_head * stride_yh + o_token * stride_ym
        else:
            p_from = p_key + i_batch * stride_kb + (i_head - num_heads) * stride_kh + o_token * stride_km
            p_to = p_key_out + i_batch * stride_zb + (i_head - num_heads) * stride_zh + o_token * stride_zm
        o_angle = i_batch * stride_cb + o_token * stride_cm + o_half[None, :]
        after_previous(PDL)
        # [TOKENS, BLOCK_H]
        b_first = tl.load(p_from + o_half[None, :], mask=m_tile, other=0.0)
        b_second = tl.load(p_from + HALF + o_half[None, :], mask=m_tile, other=0.0)
        b_cos = tl.load(p_cos + o_angle, mask=m_tile, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_angle, mask=m_tile, other=0.0).to(tl.float32)
        dtype: tl.constexpr = p_query_out.dtype.element_ty
        b_out = _turned(b_first, b_cos, -b_second, b_sin, dtype)
        tl.store(p_to + o_half[None, :], b_out, mask=m_tile)
        b_cos = tl.load(p_cos + HALF + o_angle, mask=m_tile, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + HALF + o_angle, mask=m_tile, other=0.0).to(tl.float32)
        b_out = _turned(b_second, b_cos, b_first, b_sin, dtype)
        tl.store(p_to + HALF + o_half[None, :], b_out, mask=m_tile)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `query` `[B, Hq, M, D]` and `key` `[B, Hkv, M, D]` by `cos`, `sin` `[B, M, D]`; Triton, no gradients.

    The results lie in memory as `query` and `key` do (heads of a token together, as projections leave them).

    Raises:
        ValueError: `cos` does not cover the whole head, or the head has an odd number of dimensions.
    """
    batch, heads, q_len, dim = query.shape
    if cos.shape != sin.shape or cos.shape[1:] != (q_len, dim) or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos and sin must be [{batch}, {q_len}, {dim}], got {tuple(cos.shape)}, {tuple(sin.shape)}")
    if dim % 2:
        raise ValueError(f"a head must have an even number of dimensions to rotate, got {dim}")
    cos, sin = (part.expand(batch, -1, -1) for part in (cos, sin))
    if query.stride(3) != 1 or key.stride(3) != 1 or cos.stride(2) != 1 or sin.stride() != cos.stride():
        query, key, cos, sin = (part.contiguous() for part in (query, key, cos, sin))
    outs = torch.empty_like(query), torch.empty_like(key, dtype=query.dtype)
    tokens = min(TOKENS, next_power_of_2(max(q_len, 1)))
    programs = (heads + key.shape[1]) * batch * ceil_div(q_len, tokens)
    if programs == 0:
        return outs
    with torch.cuda.device_of(query):
        _rotate_kernel[(programs,)](
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
            *outs[0].stride()[:3],
            *outs[1].stride()[:3],
            HALF=dim // 2,
            BLOCK_H=next_power_of_2(dim // 2),
            TOKENS=tokens,
            num_warps=1 if tokens == 1 else 4,
            **launch_options(query.device),
            enable_fp_fusion=False,  # a product and the sum fused would skip a rounding
        )
    return outs
