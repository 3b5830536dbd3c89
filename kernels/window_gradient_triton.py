"""Gradients of sink + window attention as Triton kernels: `window_gradient.py` has the formulas and what they mean.

One kernel takes a tile of rows over the keys that it sees, twice: for the log-sum-exp and delta of each row, then for
dq. The other takes a tile of keys over the rows that see it, of all heads that read them, for dk and dv. The sinks are
seen by every row: a second launch of that kernel cuts the rows into parts and has one sum for each part. No atomics, so
runs repeat bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .common import HAS_TRITON, ceil_div, index_tensor, next_power_of_2, starts, tl, triton
from .tiles import LOG2E, TileLaunch, log2_scales

MAX_HEAD_DIM, MAX_SINKS = 256, 64
# rows of a part, in the launch for the sinks
_PART = 1024

if HAS_TRITON:
    from .tiles import begin_softmax, cap_scores, load_rows

    @triton.jit
    def _scores(b_fixed, b_stream, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
        """Scores `[fixed, streamed]` in units of log2; `scale` and `softcap` carry log2(e)."""
        return cap_scores(tl.dot(b_fixed, tl.trans(b_stream), input_precision=PRECISION), scale, softcap, SOFTCAP)

    @triton.jit
    def _slope(b_p, b_dp, b_delta, b_s, softcap, SOFTCAP: tl.constexpr):
        """Gradient by the product of query and key, but for the softmax scale."""
        b_ds = b_p * (b_dp - b_delta)
        if SOFTCAP:
            b_t = b_s / softcap
            b_ds *= 1.0 - b_t * b_t
        return b_ds

    @triton.jit(do_not_specialize=["num_heads", "length", "window", "num_sinks"])
    def _rows_kernel(
        p_q,
        p_k,
        p_v,
        p_grad,
        p_logits,
        p_heads,
        p_kv_heads,
        p_start,
        p_lse,
        p_delta,
        p_dq,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_gb,
        stride_gm,
        stride_gh,
        stride_db,
        stride_dh,
        stride_dm,
        num_heads,
        length,
        window,
        num_sinks,
        scale,
        softcap,
        factor,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_S: tl.constexpr,
        STAGES: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        SOFTCAP: tl.constexpr,
        HAS_LOGITS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # heads vary fastest, so that programs in flight share key tiles in L2; late rows first: they see the most
        i_pid = tl.program_id(0)
        i_tile = tl.num_programs(0) // num_heads - 1 - i_pid // num_heads
        tiles = (length + BLOCK_M - 1) // BLOCK_M
        i_b = (i_tile // tiles).to(tl.int64)
        i_h = i_pid % num_heads
        head = tl.load(p_heads + i_h).to(tl.int64)
        kv_head = tl.load(p_kv_heads + i_h).to(tl.int64)
        first = tl.load(p_start + i_b).to(tl.int32)
        q_first = (i_tile % tiles) * BLOCK_M
        o_m = q_first + tl.arange(0, BLOCK_M)
        o_n = tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        m_m = o_m < length
        p_k += i_b * stride_kb + kv_head * stride_kh
        p_v += i_b * stride_vb + kv_head * stride_vh
        # [BLOCK_M, BLOCK_D]
        b_q = load_rows(p_q + i_b * stride_qb + head * stride_qh, o_m, stride_qm, m_m, o_d, HEAD_DIM)
        b_g = load_rows(p_grad + i_b * stride_gb + head * stride_gh, o_m, stride_gm, m_m, o_d, HEAD_DIM)

        b_max, b_sum = begin_softmax(p_logits, head, BLOCK_M, HAS_LOGITS)
        b_delta = tl.zeros([BLOCK_M], tl.float32)
        b_lse = b_sum
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # slots [low, high) are seen by some row of the tile through its window
        low = tl.maximum(tl.maximum(q_first - window + 1, first + num_sinks), 0)
        high = tl.minimum(q_first + BLOCK_M, length)
        for phase in tl.static_range(2):
            if HAS_SINKS:
                o_s = first + tl.arange(0, BLOCK_S)
                m_s = (o_s < first + num_sinks) & (o_s < high)
                # [BLOCK_S, BLOCK_D]
                b_sk = load_rows(p_k, o_s, stride_kn, m_s, o_d, HEAD_DIM)
                b_sv = load_rows(p_v, o_s, stride_vn, m_s, o_d, HEAD_DIM)
                b_ss = _scores(b_q, b_sk, scale, softcap, SOFTCAP, PRECISION)
                b_ss = tl.where(m_s[None, :] & (o_m[:, None] >= o_s[None, :]), b_ss, float("-inf"))
                b_sdp = tl.dot(b_g, tl.trans(b_sv), input_precision=PRECISION)
                if phase == 0:
                    b_new = tl.maximum(b_max, tl.max(b_ss, 1))
                    b_sp = tl.exp2(b_ss - b_new[:, None])
                    b_alpha = tl.exp2(b_max - b_new)
                    b_sum = b_sum * b_alpha + tl.sum(b_sp, 1)
                    b_delta = b_delta * b_alpha + tl.sum(b_sp * b_sdp, 1)
                    b_max = b_new
                else:
                    b_sp = tl.exp2(b_ss - b_lse[:, None])
                    if SOFTCAP:
                        b_ss = tl.where(b_sp > 0.0, b_ss, 0.0)
                    b_sds = _slope(b_sp, b_sdp, b_delta[:, None], b_ss, softcap, SOFTCAP)
                    b_dq = tl.dot(b_sds.to(b_sk.dtype), b_sk, b_dq, input_precision=PRECISION)
            for i_n in tl.range(low, high, BLOCK_N, num_stages=STAGES):
                o_slot = i_n + o_n
                m_n = o_slot < high
                # [BLOCK_N, BLOCK_D]
                b_k = load_rows(p_k, o_slot, stride_kn, m_n, o_d, HEAD_DIM)
                b_v = load_rows(p_v, o_slot, stride_vn, m_n, o_d, HEAD_DIM)
                b_s = _scores(b_q, b_k, scale, softcap, SOFTCAP, PRECISION)
                o_distance = o_m[:, None] - o_slot[None, :]
                m_seen = m_n[None, :] & (o_distance >= 0) & (o_distance < window)
                b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
                if phase == 0:
                    b_s = tl.where(m_seen, b_s, float("-inf"))
                    b_new = tl.maximum(b_max, tl.max(b_s, 1))
                    b_p = tl.exp2(b_s - b_new[:, None])
                    b_alpha = tl.exp2(b_max - b_new)
                    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
                    b_delta = b_delta * b_alpha + tl.sum(b_p * b_dp, 1)
                    b_max = b_new
                else:
                    b_p = tl.where(m_seen, tl.exp2(b_s - b_lse[:, None]), 0.0)
                    b_ds = _slope(b_p, b_dp, b_delta[:, None], b_s, softcap, SOFTCAP)
                    b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
            if phase == 0:
                # where nothing is seen every weight is 0
                m_some = b_sum > 0.0
                b_sum = tl.where(m_some, b_sum, 1.0)
                b_lse = tl.where(m_some, b_max + tl.log2(b_sum), float("inf"))
                b_delta = b_delta / b_sum
        i_row = (i_b * num_heads + i_h) * length
        tl.store(p_lse + i_row + o_m, b_lse, mask=m_m)
        tl.store(p_delta + i_row + o_m, b_delta, mask=m_m)
        p_out = p_dq + i_b * stride_db + head * stride_dh + o_m.to(tl.int64)[:, None] * stride_dm + o_d[None, :]
        m_out = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(p_out, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_out)

    @triton.jit(do_not_specialize=["num_heads", "num_kv_heads", "length", "window", "num_sinks", "part"])
    def _keys_kernel(
        p_q,
        p_k,
        p_v,
        p_grad,
        p_heads,
        p_kv_heads,
        p_readers,
        p_bounds,
        p_start,
        p_lse,
        p_delta,
        p_dk,
        p_dv,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_gb,
        stride_gm,
        stride_gh,
        stride_db,
        stride_dh,
        stride_dn,
        num_heads,
        num_kv_heads,
        length,
        window,
        num_sinks,
        part,
        scale,
        softcap,
        factor,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        STAGES: tl.constexpr,
        SINKS: tl.constexpr,
        SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # program (tile of keys, or part of the rows; KV head; batch row)
        i_tile = tl.program_id(0)
        i_u = tl.program_id(1)
        i_b = tl.program_id(2).to(tl.int64)
        kv_head = tl.load(p_kv_heads + i_u).to(tl.int64)
        first = tl.load(p_start + i_b).to(tl.int32)
        o_d = tl.arange(0, BLOCK_D)
        o_n = tl.arange(0, BLOCK_N)
        if SINKS:
            # rows of this part from which some sink is out of the window
            o_n += first
            m_n = (o_n < first + num_sinks) & (o_n < length)
            m_low = tl.maximum(i_tile * part, first + window)
            m_high = tl.minimum(i_tile * part + part, length)
        else:
            o_n += i_tile * BLOCK_N
            m_n = (o_n < length) & (o_n >= first)
            m_low = tl.maximum(i_tile * BLOCK_N, first)
            m_high = tl.minimum(i_tile * BLOCK_N + BLOCK_N - 1 + window, length)
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_k + i_b * stride_kb + kv_head * stride_kh, o_n, stride_kn, m_n, o_d, HEAD_DIM)
        b_v = load_rows(p_v + i_b * stride_vb + kv_head * stride_vh, o_n, stride_vn, m_n, o_d, HEAD_DIM)
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i_r in tl.range(tl.load(p_bounds + i_u), tl.load(p_bounds + i_u + 1)):
            i_h = tl.load(p_readers + i_r)
            head = tl.load(p_heads + i_h).to(tl.int64)
            i_row = (i_b * num_heads + i_h) * length
            for i_m in tl.range(m_low, m_high, BLOCK_M, num_stages=STAGES):
                o_m = i_m + tl.arange(0, BLOCK_M)
                m_m = o_m < m_high
                # [BLOCK_M, BLOCK_D]
                b_q = load_rows(p_q + i_b * stride_qb + head * stride_qh, o_m, stride_qm, m_m, o_d, HEAD_DIM)
                b_g = load_rows(p_grad + i_b * stride_gb + head * stride_gh, o_m, stride_gm, m_m, o_d, HEAD_DIM)
                b_lse = tl.load(p_lse + i_row + o_m, mask=m_m, other=float("inf"))
                b_delta = tl.load(p_delta + i_row + o_m, mask=m_m, other=0.0)
                # [BLOCK_N, BLOCK_M]
                b_s = _scores(b_k, b_q, scale, softcap, SOFTCAP, PRECISION)
                o_distance = o_m[None, :] - o_n[:, None]
                if SINKS:
                    m_seen = m_n[:, None] & (o_distance >= window)
                else:
                    m_seen = m_n[:, None] & (o_distance >= 0) & (o_distance < window)
                b_p = tl.where(m_seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
                b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
                b_ds = _slope(b_p, b_dp, b_delta[None, :], b_s, softcap, SOFTCAP)
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        if SINKS:
            # [batch, KV heads, parts, BLOCK_N, HEAD_DIM]
            i_out = (i_b * num_kv_heads + i_u) * tl.num_programs(0) + i_tile
            o_out = i_out * BLOCK_N * HEAD_DIM + tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + o_d[None, :]
            m_out = (o_d < HEAD_DIM)[None, :]
        else:
            o_out = i_b * stride_db + kv_head * stride_dh + o_n.to(tl.int64)[:, None] * stride_dn + o_d[None, :]
            m_out = (o_n < length)[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(p_dk + o_out, (b_dk * factor).to(p_dk.dtype.element_ty), mask=m_out)
        tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


def _launches(query: torch.Tensor) -> tuple[TileLaunch, TileLaunch]:
    """Of rows and of keys, by element size and head_dim."""
    if not query.is_cuda:
        return TileLaunch(32, 16, 1, 1), TileLaunch(16, 32, 1, 1)
    if query.element_size() > 2:
        return TileLaunch(32, 32, 4, 1), TileLaunch(32, 32, 4, 1)
    if query.shape[3] <= 64:
        return TileLaunch(128, 64, 4, 3), TileLaunch(128, 64, 8, 2)
    if query.shape[3] <= 128:
        return TileLaunch(128, 64, 8, 2), TileLaunch(64, 64, 4, 2)
    return TileLaunch(64, 32, 8, 2), TileLaunch(32, 32, 8, 2)


@lru_cache(maxsize=4096)
def _readers(kv_heads: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """KV heads that are read; places in the list of heads, by KV head; and where those of each KV head begin."""
    used = tuple(sorted(set(kv_heads)))
    listed = [[i for i, row in enumerate(kv_heads) if row == kv_head] for kv_head in used]
    bounds = [0]
    for places in listed:
        bounds.append(bounds[-1] + len(places))
    return used, tuple(i for places in listed for i in places), tuple(bounds)


def window_gradient_triton(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_logits: torch.Tensor | None,
    *,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    window: int,
    num_sinks: int,
    scale: float,
    start: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `window_gradient_tiled`; head_dim <= 256 and at most 64 sinks."""
    dtypes = query.dtype, key.dtype, value.dtype
    grad, query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (grad, query, key, value))
    grad = grad.to(query.dtype)
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        # Triton's interpreter multiplies the bits of bf16
        grad, query, key, value = (x.float() for x in (grad, query, key, value))
    batch, _, length, head_dim = query.shape
    device, n = query.device, len(heads)
    first_slot = starts(start, batch, device)
    used, readers, bounds = _readers(kv_heads)
    # tables of the kernel for keys
    reading = [index_tensor(table, device) for table in (heads, used, readers, bounds)]
    lse, delta = torch.empty(2, batch, n, length, dtype=torch.float32, device=device)
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=device)
    grad_key, grad_value = torch.zeros(2, *key.shape, dtype=key.dtype, device=device)
    scales = *log2_scales(scale, softcap), scale
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3]
    of_rows, of_keys = _launches(query)
    # without sinks beyond the window, those within it are keys like others
    has_sinks = num_sinks > 0 and window < length
    block_s = max(16, next_power_of_2(num_sinks))
    shapes: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "SOFTCAP": softcap is not None,
        "PRECISION": "ieee" if query.element_size() > 2 else "tf32",
    }
    counted = num_sinks if has_sinks else 0
    with torch.cuda.device_of(query):
        _rows_kernel[(ceil_div(length, of_rows.fixed) * n * batch,)](
            query, key, value, grad, query if sink_logits is None else sink_logits, reading[0],
            index_tensor(kv_heads, device), first_slot, lse, delta, grad_query, *strides, *grad_query.stride()[:3],
            n, length, window, counted, *scales, BLOCK_M=of_rows.fixed,
            BLOCK_N=of_rows.streamed, BLOCK_S=block_s, STAGES=of_rows.stages, HAS_SINKS=has_sinks,
            HAS_LOGITS=sink_logits is not None, **of_rows.options, **shapes,
        )  # fmt: skip

        def keys(into: tuple[torch.Tensor, torch.Tensor], programs: int, block_n: int, sinks: bool) -> None:
            _keys_kernel[(programs, len(used), batch)](
                query, key, value, grad, *reading, first_slot, lse, delta, *into, *strides, *grad_key.stride()[:3],
                n, len(used), length, window, counted, _PART, *scales,
                BLOCK_M=of_keys.streamed, BLOCK_N=block_n, STAGES=of_keys.stages, SINKS=sinks,
                **of_keys.options, **shapes,
            )  # fmt: skip

        keys((grad_key, grad_value), ceil_div(length, of_keys.fixed), of_keys.fixed, False)
        if has_sinks:
            parts = ceil_div(length, _PART)
            sums = torch.empty(2, batch, len(used), parts, block_s, head_dim, dtype=torch.float32, device=device)
            keys((sums[0], sums[1]), parts, block_s, True)
            slots = first_slot[:, None] + torch.arange(num_sinks, device=device)
            # a sink that is not there has a sum of 0
            at = torch.arange(batch, device=device)[:, None], slots.clamp_max(length - 1)
            for into, part in zip((grad_key, grad_value), sums, strict=True):
                # [batch, sinks, KV heads, HEAD_DIM]
                beyond = part.sum(2)[:, :, :num_sinks].permute(0, 2, 1, 3).to(into.dtype)
                place = (at[0][..., None], reading[1][None, None], at[1][..., None])
                into.index_put_(place, beyond, accumulate=True)
    grad_logits = None
    if sink_logits is not None:
        logits = sink_logits.float()[reading[0]] * LOG2E
        by_head = -(torch.exp2(logits[:, None] - lse) * delta).sum((0, 2))
        grad_logits = torch.zeros_like(sink_logits).index_copy_(0, reading[0], by_head.to(sink_logits.dtype))
    found = (x.to(dtype) for x, dtype in zip((grad_query, grad_key, grad_value), dtypes, strict=True))
    return *found, grad_logits
