"""Index queries and keys of a decode step's tokens, projected, rotated and rounded in one launch (PAPER section 3).

    y = W_h x(m)                      W_h [r, D] in fp32, x(m) a query or key from before RoPE
    y_i, y_j -> y_i cos - y_j sin, y_j cos + y_i sin     for the pairs (i, j = i + R / 2) of the last R dimensions

For a few rows at a time; a prefill projects with matrix products (`RTPurboIndexer.queries`).
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, index_tensor, next_power_of_2, tl, triton, use_triton
from .workspace import head_table

Rotation = tuple[torch.Tensor, torch.Tensor]


def index_project_reference(
    vectors: torch.Tensor, weight: torch.Tensor, *, heads: tuple[int, ...], rotation: Rotation | None
) -> torch.Tensor:
    """fp32 `[B, n, M, r]`: `heads` of `vectors` `[B, H, M, D]` by `weight` `[n, r, D]`, the last dimensions rotated."""
    chosen = vectors[:, index_tensor(heads, vectors.device)].to(weight.dtype)
    projected = torch.matmul(chosen, weight.transpose(-1, -2))
    if rotation is None:
        return projected
    cos, sin = rotation
    content = projected.shape[-1] - 2 * cos.shape[-1]
    first, second = projected[..., content:].chunk(2, -1)
    return torch.cat([projected[..., :content], first * cos - second * sin, first * sin + second * cos], -1)


if HAS_TRITON:

    @triton.jit
    def _index_project_kernel(
        p_query,
        p_key,
        p_query_weight,
        p_key_weight,
        p_heads,
        p_cos,
        p_sin,
        p_index_query,
        p_index_key,
        num_queries,
        num_keys,
        q_len,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_km,
        stride_cb,
        stride_cm,
        INDEX_DIM: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        PAIRS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """One index row (a query's or a key's) of one token."""
        i_row = tl.program_id(0)
        i_token = tl.program_id(1) % q_len
        i_batch = (tl.program_id(1) // q_len).to(tl.int64)
        o_dim = tl.arange(0, BLOCK_D)
        o_out = tl.arange(0, BLOCK_R)
        m_dim = o_dim < HEAD_DIM
        m_out = o_out < INDEX_DIM
        i_head = tl.load(p_heads + i_row).to(tl.int64)
        if i_row < num_queries:
            p_vector = p_query + i_batch * stride_qb + i_head * stride_qh + i_token * stride_qm
            p_weight = p_query_weight + i_row * INDEX_DIM * HEAD_DIM
            p_to = p_index_query + ((i_batch * num_queries + i_row) * q_len + i_token) * INDEX_DIM
        else:
            p_vector = p_key + i_batch * stride_kb + i_head * stride_kh + i_token * stride_km
            p_weight = p_key_weight + (i_row - num_queries) * INDEX_DIM * HEAD_DIM
            p_to = p_index_key + ((i_batch * num_keys + i_row - num_queries) * q_len + i_token) * INDEX_DIM
        b_vector = tl.load(p_vector + o_dim, mask=m_dim, other=0.0).to(tl.float32)
        m_weight = m_out[:, None] & m_dim[None, :]
        b_weight = tl.load(p_weight + o_out[:, None] * HEAD_DIM + o_dim[None, :], mask=m_weight, other=0.0)
        b_out = tl.sum(b_weight * b_vector[None, :], 1)
        if PAIRS > 0:
            # each rotated dimension needs its partner: a second product with the rows swapped is cheaper than a shuffle
            content = INDEX_DIM - 2 * PAIRS
            rotated = m_out & (o_out >= content)
            second = o_out >= content + PAIRS
            o_partner = tl.where(second, o_out - PAIRS, o_out + PAIRS)
            m_partner = rotated[:, None] & m_dim[None, :]
            b_weight = tl.load(p_weight + o_partner[:, None] * HEAD_DIM + o_dim[None, :], mask=m_partner, other=0.0)
            b_partner = tl.sum(b_weight * b_vector[None, :], 1)
            o_angle = i_batch * stride_cb + i_token * stride_cm + tl.where(second, o_out - PAIRS, o_out) - content
            b_cos = tl.load(p_cos + o_angle, mask=rotated, other=1.0)
            b_sin = tl.load(p_sin + o_angle, mask=rotated, other=0.0)
            b_out = b_out * b_cos + tl.where(second, b_partner, -b_partner) * b_sin
        tl.store(p_to + o_out, b_out.to(p_index_query.dtype.element_ty), mask=m_out)


def index_project(
    query_pre: torch.Tensor,
    key_pre: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    *,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    rotation: Rotation | None,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries `[B, n, M, r]` and keys `[B, I, M, r]` of `dtype`, without gradients.

    Args:
        query_pre, key_pre: `[B, Hq, M, D]`, `[B, Hkv, M, D]`, from before RoPE.
        query_weight, key_weight: fp32 `[n, r, D]`, `[I, r, D]`.
        heads, kv_heads: the query head of each index query, the KV head of each index key.
        rotation: fp32 cos and sin `[B, 1, M, R / 2]`, or None: nothing rotates.
        backend: "auto" (Triton for half precision on CUDA), "triton" or "reference".

    Raises:
        ValueError: weights that do not fit the heads or the vectors.
    """
    head_dim = query_pre.shape[3]
    for name, weight, listed in (("query_weight", query_weight, heads), ("key_weight", key_weight, kv_heads)):
        if weight.dim() != 3 or weight.shape[0] != len(listed) or weight.shape[2] != head_dim:
            raise ValueError(f"{name} must be [{len(listed)}, r, {head_dim}], got {tuple(weight.shape)}")
    # a compiler fuses the reference by itself
    if torch.compiler.is_compiling() or not use_triton(backend, query_pre):
        index_query = index_project_reference(query_pre, query_weight, heads=heads, rotation=rotation)
        index_key = index_project_reference(key_pre, key_weight, heads=kv_heads, rotation=rotation)
        return index_query.to(dtype), index_key.to(dtype)
    batch, _, q_len, _ = query_pre.shape
    index_dim = query_weight.shape[1]
    if query_pre.stride(3) != 1:
        query_pre = query_pre.contiguous()
    if key_pre.stride(3) != 1:
        key_pre = key_pre.contiguous()
    index_query = query_pre.new_empty(batch, len(heads), q_len, index_dim, dtype=dtype)
    index_key = key_pre.new_empty(batch, len(kv_heads), q_len, index_dim, dtype=dtype)
    cos = sin = query_weight
    pairs, strides = 0, (0, 0)
    if rotation is not None:
        cos, sin = (part.expand(batch, 1, q_len, -1).contiguous() for part in rotation)
        pairs, strides = cos.shape[3], (cos.stride(0), cos.stride(2))
    _index_project_kernel[(len(heads) + len(kv_heads), batch * q_len)](
        query_pre,
        key_pre,
        query_weight.contiguous(),
        key_weight.contiguous(),
        head_table(heads + kv_heads, query_pre.device),
        cos,
        sin,
        index_query,
        index_key,
        len(heads),
        len(kv_heads),
        q_len,
        *query_pre.stride()[:3],
        *key_pre.stride()[:3],
        *strides,
        INDEX_DIM=index_dim,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_R=next_power_of_2(index_dim),
        BLOCK_D=next_power_of_2(head_dim),
        num_warps=4,
    )
    return index_query, index_key
