"""Append of a decode step's tokens to the stores of the hybrid cache (PAPER section 1).

    full store    [B, F, C, D]        slot-ordered: the token of slot t lies at t; in 8 bits by `kv_quant.py`
    index store   [B, I, C, r]        slot-ordered; in 8 bits, one scale a token: x ~ scale * round(x / scale)
    window store  [B, W, S + R, D]    by logical position p: sinks p < S at p, the others at S + (p - S) % R

Padding (negative logical positions) never enters the window store. Not for the prefill, which writes whole
tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from .common import HAS_TRITON, next_power_of_2, starts, tl, triton, use_triton
from .kv_quant import check_kv_scales, kv_limit, quantize_kv
from .workspace import head_table

INT8_MAX = 127.0
append_head: Any = None
append_index: Any = None


def quantize_index(index_key: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 keys `[..., r]` and their scales `[...]` (of `scale_dtype`): one token at a time, symmetric.

    The scale is rounded to `scale_dtype` before the division, so that only the keys carry a rounding error.
    """
    x = index_key.float()
    scale = (x.abs().amax(-1) / INT8_MAX).to(scale_dtype)
    step = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(x / step[..., None]).clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def append_step_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    *,
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    num_sinks: int,
    index_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """The contract of `append_step`; reads `length` on the host."""
    batch, _, q_len, _ = key.shape
    end = int(length)
    full = [head for head, row in enumerate(full_slot) if row >= 0]
    window = [head for head, row in enumerate(window_slot) if row >= 0]
    if key_scale is not None and value_scale is not None:
        for head in full:  # one at a time: quantising takes several copies in fp32
            at = (slice(None), full_slot[head], slice(end - q_len, end))
            full_key[at], key_scale[at] = quantize_kv(key[:, head], full_key.dtype)
            full_value[at], value_scale[at] = quantize_kv(value[:, head], full_value.dtype)
    elif full:
        rows = [full_slot[head] for head in full]
        full_key[:, rows, end - q_len : end] = key[:, full].to(full_key.dtype)
        full_value[:, rows, end - q_len : end] = value[:, full].to(full_value.dtype)
    if index_key_new is not None and index_key.shape[1]:
        if index_scale is None:
            index_key[:, :, end - q_len : end] = index_key_new.to(index_key.dtype)
        else:
            quantized, scale = quantize_index(index_key_new, index_scale.dtype)
            index_key[:, :, end - q_len : end] = quantized
            index_scale[:, :, end - q_len : end] = scale
    if window:
        ring = window_key.shape[2] - num_sinks
        slots = torch.arange(end - q_len, end, device=key.device)
        position = slots - starts(start, batch, key.device)[:, None]
        slot = torch.where(position < num_sinks, position, num_sinks + (position - num_sinks) % max(ring, 1))
        b, m = torch.nonzero(position >= 0, as_tuple=True)
        rows = [window_slot[head] for head in window]
        # advanced indices on either side of the head axis: the result is [tokens, W, D]
        row = torch.tensor(rows, device=key.device)[None]
        head = torch.tensor(window, device=key.device)[None]
        at = slot[b, m][:, None]
        window_key[b[:, None], row, at] = key[b[:, None], head, m[:, None]].to(window_key.dtype)
        window_value[b[:, None], row, at] = value[b[:, None], head, m[:, None]].to(window_value.dtype)


if HAS_TRITON:

    @triton.jit
    def _store_row(p_to, p_scale, b_row, o_dim, m_dim, KV_LIMIT: tl.constexpr):
        """Store a row of K or V; with a limit as `quantize_kv` does: int8 up to 127, fp8 e4m3 up to 448."""
        if KV_LIMIT > 0:
            b_row = b_row.to(tl.float32)
            top = tl.max(tl.where(m_dim, tl.abs(b_row), 0.0), 0)
            # divisions as torch rounds them: what decode appends is what the prefill's reference would
            scale = tl.minimum(tl.div_rn(top, top * 0.0 + KV_LIMIT), 65504.0).to(tl.float16)
            tl.store(p_scale, scale)
            b_row = tl.div_rn(b_row, o_dim * 0.0 + tl.maximum(scale.to(tl.float32), 1.1754943508222875e-38))
            if KV_LIMIT == 127:
                b_row = (b_row + 12582912.0) - 12582912.0
            b_row = tl.minimum(tl.maximum(b_row, -KV_LIMIT), KV_LIMIT)
        tl.store(p_to + o_dim, b_row.to(p_to.dtype.element_ty), mask=m_dim)

    @triton.jit
    def append_head(
        p_key,
        p_value,
        p_full_key,
        p_full_value,
        p_key_scale,
        p_value_scale,
        p_window_key,
        p_window_value,
        p_tables,
        p_start,
        i_item,
        length,
        num_kv_heads,
        q_len,
        num_sinks,
        ring,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_fkb,
        stride_fkh,
        stride_fkn,
        stride_fvb,
        stride_fvh,
        stride_fvn,
        stride_scb,
        stride_sch,
        stride_wkb,
        stride_wkh,
        stride_wkn,
        stride_wvb,
        stride_wvh,
        stride_wvn,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        HAS_START: tl.constexpr,
        KV_LIMIT: tl.constexpr,
    ):
        """Write K and V of one (batch, KV head, token) to its store."""
        i_token = i_item % q_len
        i_head = i_item // q_len % num_kv_heads
        i_batch = (i_item // q_len // num_kv_heads).to(tl.int64)
        slot = length.to(tl.int64) - q_len + i_token
        o_dim = tl.arange(0, BLOCK_D)
        m_dim = o_dim < HEAD_DIM
        b_key = tl.load(p_key + i_batch * stride_kb + i_head * stride_kh + i_token * stride_kn + o_dim, mask=m_dim)
        b_value = tl.load(p_value + i_batch * stride_vb + i_head * stride_vh + i_token * stride_vn + o_dim, mask=m_dim)
        i_full = tl.load(p_tables + i_head).to(tl.int64)
        i_window = tl.load(p_tables + num_kv_heads + i_head).to(tl.int64)
        if i_full >= 0:
            o_scale = i_batch * stride_scb + i_full * stride_sch + slot
            p_to = p_full_key + i_batch * stride_fkb + i_full * stride_fkh + slot * stride_fkn
            _store_row(p_to, p_key_scale + o_scale, b_key, o_dim, m_dim, KV_LIMIT)
            p_to = p_full_value + i_batch * stride_fvb + i_full * stride_fvh + slot * stride_fvn
            _store_row(p_to, p_value_scale + o_scale, b_value, o_dim, m_dim, KV_LIMIT)
        if i_window >= 0:
            position = slot
            if HAS_START:
                position = slot - tl.load(p_start + i_batch).to(tl.int64)
            at = tl.where(position < num_sinks, position, num_sinks + (position - num_sinks) % ring)
            # of two tokens of one step in one place, the later one stays
            stays = (position < num_sinks) | (i_token + ring >= q_len)
            m_real = o_dim < tl.where((position >= 0) & stays, HEAD_DIM, 0)
            p_to = p_window_key + i_batch * stride_wkb + i_window * stride_wkh + at * stride_wkn
            tl.store(p_to + o_dim, b_key.to(p_window_key.dtype.element_ty), mask=m_real)
            p_to = p_window_value + i_batch * stride_wvb + i_window * stride_wvh + at * stride_wvn
            tl.store(p_to + o_dim, b_value.to(p_window_value.dtype.element_ty), mask=m_real)

    @triton.jit
    def quantize_index_row(b_index, SCALE_TYPE: tl.constexpr):
        """An index key rounded to whole numbers within +-127 (fp32), and its scale."""
        b_index = b_index.to(tl.float32)
        scale = (tl.max(tl.abs(b_index), 0) / 127.0).to(SCALE_TYPE)
        b_index = b_index / tl.maximum(scale.to(tl.float32), 1.1754943508222875e-38)
        # round half to even, as torch does, by the fp32 mantissa
        b_index = (b_index + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(b_index, -127.0), 127.0), scale

    @triton.jit
    def append_index(
        p_index_new,
        p_index_key,
        p_index_scale,
        i_item,
        length,
        num_index,
        q_len,
        stride_xb,
        stride_xh,
        stride_xn,
        stride_ib,
        stride_ih,
        stride_in,
        stride_sb,
        stride_sh,
        stride_sn,
        INDEX_DIM: tl.constexpr,
        BLOCK_R: tl.constexpr,
        INT8: tl.constexpr,
    ):
        """Write the index key of item (batch, index row, token)."""
        i_token = i_item % q_len
        i_row = (i_item // q_len % num_index).to(tl.int64)
        i_batch = (i_item // q_len // num_index).to(tl.int64)
        slot = length.to(tl.int64) - q_len + i_token
        o_r = tl.arange(0, BLOCK_R)
        m_r = o_r < INDEX_DIM
        b_index = tl.load(
            p_index_new + i_batch * stride_xb + i_row * stride_xh + i_token * stride_xn + o_r, mask=m_r, other=0.0
        )
        if INT8:
            b_index, scale = quantize_index_row(b_index, p_index_scale.dtype.element_ty)
            tl.store(p_index_scale + i_batch * stride_sb + i_row * stride_sh + slot * stride_sn, scale)
        p_index_key += i_batch * stride_ib + i_row * stride_ih + slot * stride_in
        tl.store(p_index_key + o_r, b_index.to(p_index_key.dtype.element_ty), mask=m_r)

    @triton.jit
    def _append_kernel(
        p_key,
        p_value,
        p_index_new,
        p_full_key,
        p_full_value,
        p_key_scale,
        p_value_scale,
        p_index_key,
        p_index_scale,
        p_window_key,
        p_window_value,
        p_tables,
        p_length,
        p_start,
        num_kv_heads,
        num_heads_items,
        num_index,
        q_len,
        num_sinks,
        ring,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_xb,
        stride_xh,
        stride_xn,
        stride_fkb,
        stride_fkh,
        stride_fkn,
        stride_fvb,
        stride_fvh,
        stride_fvn,
        stride_scb,
        stride_sch,
        stride_ib,
        stride_ih,
        stride_in,
        stride_sb,
        stride_sh,
        stride_sn,
        stride_wkb,
        stride_wkh,
        stride_wkn,
        stride_wvb,
        stride_wvh,
        stride_wvn,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        INDEX_DIM: tl.constexpr,
        BLOCK_R: tl.constexpr,
        INT8: tl.constexpr,
        HAS_START: tl.constexpr,
        KV_LIMIT: tl.constexpr,
    ):
        """One program for each (batch, KV head, token), then one for each (batch, index row, token)."""
        i_item = tl.program_id(0)
        length = tl.load(p_length).to(tl.int64)
        if i_item < num_heads_items:
            append_head(
                p_key,
                p_value,
                p_full_key,
                p_full_value,
                p_key_scale,
                p_value_scale,
                p_window_key,
                p_window_value,
                p_tables,
                p_start,
                i_item,
                length,
                num_kv_heads,
                q_len,
                num_sinks,
                ring,
                stride_kb,
                stride_kh,
                stride_kn,
                stride_vb,
                stride_vh,
                stride_vn,
                stride_fkb,
                stride_fkh,
                stride_fkn,
                stride_fvb,
                stride_fvh,
                stride_fvn,
                stride_scb,
                stride_sch,
                stride_wkb,
                stride_wkh,
                stride_wkn,
                stride_wvb,
                stride_wvh,
                stride_wvn,
                HEAD_DIM,
                BLOCK_D,
                HAS_START,
                KV_LIMIT,
            )
        else:
            append_index(
                p_index_new,
                p_index_key,
                p_index_scale,
                i_item - num_heads_items,
                length,
                num_index,
                q_len,
                stride_xb,
                stride_xh,
                stride_xn,
                stride_ib,
                stride_ih,
                stride_in,
                stride_sb,
                stride_sh,
                stride_sn,
                INDEX_DIM,
                BLOCK_R,
                INT8,
            )


def append_step(
    key: torch.Tensor,
    value: torch.Tensor,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    *,
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    num_sinks: int,
    index_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write a decode step's M tokens to every store of one layer, in one launch, without a host synchronisation.

    Args:
        key, value: `[B, Hkv, M, D]`, rotated. index_key_new: `[B, I, M, r]`, projected and rotated, or None.
        full_key, full_value: `[B, F, C, D]`. index_key: `[B, I, C, r]`. window_key, window_value: `[B, W, S + R, D]`.
        full_slot, window_slot: for each KV head its row of the full or of the window store, -1 where it has none.
        length: int32 device tensor `[1]`: slots in use *after* the append. start: int `[B]` or None.
        num_sinks: S. index_scale: `[B, I, C]` when `index_key` is int8; the new tokens are quantised here.
        key_scale, value_scale: fp16 `[B, F, C]` when the full stores are int8 or fp8; quantised here as well.
        backend: "auto" (Triton for half precision on CUDA), "triton" or "reference".

    Raises:
        ValueError: shapes that do not fit.
    """
    check_append(key, value, index_key_new, full_key, index_key, window_key, full_slot, window_slot, index_scale)
    check_kv_scales(full_key, full_value, key_scale, value_scale)
    if not use_triton(backend, key):
        append_step_reference(
            key,
            value,
            index_key_new,
            full_key,
            full_value,
            index_key,
            window_key,
            window_value,
            full_slot=full_slot,
            window_slot=window_slot,
            length=length,
            start=start,
            num_sinks=num_sinks,
            index_scale=index_scale,
            key_scale=key_scale,
            value_scale=value_scale,
        )
        return
    batch, kv_heads, q_len, head_dim = key.shape
    device = key.device
    num_index = 0 if index_key_new is None else index_key.shape[1]
    new = key if index_key_new is None else index_key_new
    scale = index_key if index_scale is None else index_scale
    _append_kernel[(batch * (kv_heads + num_index) * q_len,)](
        key,
        value,
        new,
        full_key,
        full_value,
        full_key if key_scale is None else key_scale,
        full_value if value_scale is None else value_scale,
        index_key,
        scale,
        window_key,
        window_value,
        head_table(full_slot + window_slot, device),
        length,
        length if start is None else start,
        kv_heads,
        batch * kv_heads * q_len,
        num_index,
        q_len,
        num_sinks,
        max(window_key.shape[2] - num_sinks, 1),
        *key.stride()[:3],
        *value.stride()[:3],
        *new.stride()[:3],
        *full_key.stride()[:3],
        *full_value.stride()[:3],
        *((0, 0) if key_scale is None else key_scale.stride()[:2]),
        *index_key.stride()[:3],
        *scale.stride()[:3],
        *window_key.stride()[:3],
        *window_value.stride()[:3],
        HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        INDEX_DIM=index_key.shape[3],
        BLOCK_R=next_power_of_2(index_key.shape[3]),
        INT8=index_scale is not None,
        HAS_START=start is not None,
        KV_LIMIT=kv_limit(full_key),
        num_warps=1,
    )


def check_append(
    key: torch.Tensor,
    value: torch.Tensor,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    index_scale: torch.Tensor | None,
) -> None:
    if key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"key and value must be [B, Hkv, M, D], got {tuple(key.shape)} and {tuple(value.shape)}")
    if not len(full_slot) == len(window_slot) == key.shape[1]:
        raise ValueError(
            f"full_slot and window_slot must name each of the {key.shape[1]} KV heads, got {len(full_slot)} and "
            f"{len(window_slot)} entries"
        )
    for name, store in (("full_key", full_key), ("window_key", window_key)):
        if store.dim() != 4 or store.shape[3] != key.shape[3]:
            raise ValueError(f"{name} must be [B, heads, slots, {key.shape[3]}], got {tuple(store.shape)}")
    if index_key_new is None:
        return
    if index_key_new.shape[1] != index_key.shape[1] or index_key_new.shape[3] != index_key.shape[3]:
        raise ValueError(
            f"index_key_new {tuple(index_key_new.shape)} does not fit the index store {tuple(index_key.shape)}"
        )
    if (index_key.dtype == torch.int8) != (index_scale is not None):
        raise ValueError(f"an int8 index store needs index_scale, and only that does; got {index_key.dtype}")
