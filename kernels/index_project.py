"""Index queries and keys, projected, rotated and rounded in one launch (PAPER section 3).

    y = W_h x(m)                      W_h [r, D] in fp32, x(m) a query or key from before RoPE
    y_i, y_j -> y_i cos - y_j sin, y_j cos + y_i sin     for the pairs (i, j = i + R / 2) of the last R dimensions

`index_project`: queries and keys of a decode step's few tokens. `index_rows`: either of them, of a prefill's many.
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, ceil_div, index_tensor, next_power_of_2, tl, triton, use_triton
from .custom_op import needs_grad
from .launches import launch_options
from .workspace import head_table

Rotation = tuple[torch.Tensor, torch.Tensor]
# tokens of a program of `index_rows`
TOKENS = 128


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
    from .launches import after_previous

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
        PDL: tl.constexpr,
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
        after_previous(PDL)
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

    @triton.jit
    def _precise_dot(b_x, b_weight, SPLIT: tl.constexpr):
        """Products with fp32 weights; for 16-bit vectors two on the matrix units, of the weights' two parts."""
        if SPLIT:
            b_high = b_weight.to(b_x.dtype)
            b_low = (b_weight - b_high.to(tl.float32)).to(b_x.dtype)
            b_out = tl.dot(b_x, b_high)
            b_out = tl.dot(b_x, b_low, b_out)
        else:
            b_out = tl.dot(b_x, b_weight, input_precision="ieee")
        return b_out

    @triton.jit(do_not_specialize=["q_len"])
    def _index_rows_kernel(
        p_vectors,
        p_weight,
        p_heads,
        p_cos,
        p_sin,
        p_out,
        num_rows,
        q_len,
        stride_xb,
        stride_xh,
        stride_xm,
        stride_cb,
        stride_cm,
        INDEX_DIM: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        PAIRS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TOKENS: tl.constexpr,
        SPLIT: tl.constexpr,
    ):
        """One index row of a tile of tokens."""
        i_row = tl.program_id(0) % num_rows
        i_tile = tl.program_id(0) // num_rows
        tiles = (q_len + TOKENS - 1) // TOKENS
        i_batch = (i_tile // tiles).to(tl.int64)
        i_head = tl.load(p_heads + i_row).to(tl.int64)
        o_token = (i_tile % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        o_dim = tl.arange(0, BLOCK_D)
        o_out = tl.arange(0, BLOCK_R)
        m_token = o_token < q_len
        m_dim = o_dim < HEAD_DIM
        m_out = o_out < INDEX_DIM
        p_from = p_vectors + i_batch * stride_xb + i_head * stride_xh + o_token[:, None] * stride_xm + o_dim[None, :]
        # [TOKENS, BLOCK_D]
        b_x = tl.load(p_from, mask=m_token[:, None] & m_dim[None, :], other=0.0)
        p_rows = p_weight + i_row * INDEX_DIM * HEAD_DIM + o_dim[:, None]
        # [BLOCK_D, BLOCK_R]
        b_weight = tl.load(p_rows + o_out[None, :] * HEAD_DIM, mask=m_dim[:, None] & m_out[None, :], other=0.0)
        b_out = _precise_dot(b_x, b_weight.to(tl.float32), SPLIT)
        if PAIRS > 0:
            content = INDEX_DIM - 2 * PAIRS
            rotated = m_out & (o_out >= content)
            second = o_out >= content + PAIRS
            o_partner = tl.where(second, o_out - PAIRS, o_out + PAIRS)
            m_weight = m_dim[:, None] & rotated[None, :]
            b_weight = tl.load(p_rows + o_partner[None, :] * HEAD_DIM, mask=m_weight, other=0.0)
            b_partner = _precise_dot(b_x, b_weight.to(tl.float32), SPLIT)
            o_angle = tl.where(second, o_out - PAIRS, o_out) - content
            p_angle = i_batch * stride_cb + o_token[:, None] * stride_cm + o_angle[None, :]
            m_angle = m_token[:, None] & rotated[None, :]
            b_cos = tl.load(p_cos + p_angle, mask=m_angle, other=1.0)
            b_sin = tl.load(p_sin + p_angle, mask=m_angle, other=0.0)
            b_out = b_out * b_cos + tl.where(second[None, :], b_partner, -b_partner) * b_sin
        p_to = p_out + ((i_batch * num_rows + i_row) * q_len + o_token)[:, None] * INDEX_DIM + o_out[None, :]
        tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=m_token[:, None] & m_out[None, :])


def _check_weight(name: str, weight: torch.Tensor, listed: tuple[int, ...], head_dim: int) -> None:
    if weight.dim() != 3 or weight.shape[0] != len(listed) or weight.shape[2] != head_dim:
        raise ValueError(f"{name} must be [{len(listed)}, r, {head_dim}], got {tuple(weight.shape)}")


def _angles(
    rotation: Rotation | None, batch: int, q_len: int, otherwise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int, tuple[int, int]]:
    """cos, sin, their pairs and their strides by row and token; without a rotation, something that is not read."""
    if rotation is None:
        return otherwise, otherwise, 0, (0, 0)
    cos, sin = (part.expand(batch, 1, q_len, -1).contiguous() for part in rotation)
    return cos, sin, cos.shape[3], (cos.stride(0), cos.stride(2))


def index_rows(
    vectors: torch.Tensor,
    weight: torch.Tensor,
    *,
    heads: tuple[int, ...],
    rotation: Rotation | None,
    dtype: torch.dtype,
    backend: str = "auto",
) -> torch.Tensor:
    """Index vectors `[B, n, M, r]` of `dtype` of all tokens; differentiable by PyTorch's products where asked for.

    Args:
        vectors: `[B, H, M, D]`, from before RoPE. weight: fp32 `[n, r, D]`.
        heads: the head of each index row.
        rotation: fp32 cos and sin `[B, 1, M, R / 2]`, or None: nothing rotates.
        backend: "auto" (Triton for half precision on CUDA), "triton" or "reference".

    Raises:
        ValueError: weights that do not fit the heads or the vectors.
    """
    batch, _, q_len, head_dim = vectors.shape
    _check_weight("weight", weight, heads, head_dim)
    plain = torch.compiler.is_compiling() or needs_grad(vectors, weight) or not use_triton(backend, vectors)
    if plain or not heads or not q_len:
        return index_project_reference(vectors, weight, heads=heads, rotation=rotation).to(dtype)
    if vectors.stride(3) != 1:
        vectors = vectors.contiguous()
    index_dim = weight.shape[1]
    out = vectors.new_empty(batch, len(heads), q_len, index_dim, dtype=dtype)
    cos, sin, pairs, strides = _angles(rotation, batch, q_len, weight)
    with torch.cuda.device_of(vectors):
        _index_rows_kernel[(len(heads) * batch * ceil_div(q_len, TOKENS),)](
            vectors,
            weight.contiguous(),
            head_table(heads, vectors.device),
            cos,
            sin,
            out,
            len(heads),
            q_len,
            *vectors.stride()[:3],
            *strides,
            INDEX_DIM=index_dim,
            HEAD_DIM=head_dim,
            PAIRS=pairs,
            BLOCK_R=max(16, next_power_of_2(index_dim)),
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            TOKENS=TOKENS,
            SPLIT=vectors.element_size() == 2,
            num_warps=4,
        )
    return out


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
    _check_weight("query_weight", query_weight, heads, head_dim)
    _check_weight("key_weight", key_weight, kv_heads, head_dim)
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
    cos, sin, pairs, strides = _angles(rotation, batch, q_len, query_weight)
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
        **launch_options(query_pre.device),
    )
    return index_query, index_key
