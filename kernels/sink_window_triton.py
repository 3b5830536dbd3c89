"""Sink + window attention in Triton, for every device: `sink_window.py` has the contract and the wrapper.

One program for a tile of query rows of one head. Key tiles start at the first key that any row of the tile sees, so
only the tiles at the two ends need a mask; what lies between runs without one. On Hopper `sink_window_hopper.py` does
the same faster; this kernel serves every other device and what that one refuses.
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, ceil_div, next_power_of_2, tl, triton
from .sink_window_rule import SinkWindow
from .tiles import TileLaunch, log2_scales, precision, tma_ready

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

if HAS_TRITON:
    from .tiles import attend, begin_softmax

    @triton.jit(
        do_not_specialize=[
            "num_heads",
            "q_len",
            "kv_len",
            "q_start",
            "kv_start",
            "window",
            "num_sinks",
            "sink_len",
        ]
    )
    def _sink_window_kernel(
        p_q,
        p_k,
        p_v,
        desc_k,
        desc_v,
        p_sink_k,
        p_sink_v,
        p_out,
        p_heads,
        p_kv_heads,
        p_start,
        p_logits,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_sb,
        stride_sh,
        stride_sn,
        stride_tb,
        stride_th,
        stride_tn,
        stride_ob,
        stride_om,
        stride_oh,
        num_heads,
        q_len,
        kv_len,
        q_start,
        kv_start,
        window,
        num_sinks,
        sink_len,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_S: tl.constexpr,
        STAGES: tl.constexpr,
        HAS_START: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        SINKS_APART: tl.constexpr,
        SOFTCAP: tl.constexpr,
        HAS_LOGITS: tl.constexpr,
        USE_TMA: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # heads vary fastest, so that the programs in flight share the key window of one KV group in L2;
        # late rows first, since early ones see fewer keys and fill the tail
        i_pid = tl.program_id(0)
        i_tile = tl.num_programs(0) // num_heads - 1 - i_pid // num_heads
        tiles = (q_len + BLOCK_M - 1) // BLOCK_M
        i_b = (i_tile // tiles).to(tl.int64)
        i_m = i_tile % tiles
        i_head = tl.load(p_heads + i_pid % num_heads).to(tl.int64)
        i_kv = tl.load(p_kv_heads + i_pid % num_heads).to(tl.int64)
        first = 0
        if HAS_START:
            first = tl.load(p_start + i_b).to(tl.int32)

        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_d = tl.arange(0, BLOCK_D)
        o_n = tl.arange(0, BLOCK_N)
        m_d = o_d < HEAD_DIM
        q_slot = q_start + o_m
        m_rows = (o_m < q_len)[:, None] & m_d[None, :]
        # [BLOCK_M, BLOCK_D]
        p_rows = p_q + i_b * stride_qb + i_head * stride_qh + o_m.to(tl.int64)[:, None] * stride_qm + o_d[None, :]
        b_q = tl.load(p_rows, mask=m_rows, other=0.0)

        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_max, b_sum = begin_softmax(p_logits, i_head, BLOCK_M, HAS_LOGITS)

        if HAS_SINKS:
            p_sk = p_sink_k + i_b * stride_sb + i_kv * stride_sh
            p_sv = p_sink_v + i_b * stride_tb + i_kv * stride_th
            # sinks taken from `key` itself start at the row's first real token
            shift = 0 if SINKS_APART else first
            readable = sink_len if SINKS_APART else kv_len
            for i_s in tl.range(0, sink_len, BLOCK_S, num_stages=1):
                o_s = i_s + tl.arange(0, BLOCK_S)
                m_s = (o_s < sink_len) & (o_s + shift < readable) & (o_s + first < q_start + q_len)
                o_row = (o_s + shift).to(tl.int64)
                m_load = m_s[:, None] & m_d[None, :]
                # [BLOCK_S, BLOCK_D]
                b_k = tl.load(p_sk + o_row[:, None] * stride_sn + o_d[None, :], mask=m_load, other=0.0)
                b_v = tl.load(p_sv + o_row[:, None] * stride_tn + o_d[None, :], mask=m_load, other=0.0)
                b_mask = m_s[None, :] & (q_slot[:, None] >= (o_s + first)[None, :])
                b_acc, b_max, b_sum = attend(
                    b_q, b_k, b_v, b_mask, b_acc, b_max, b_sum, scale, softcap, True, SOFTCAP, PRECISION
                )

        # slots [low, high) are seen by some row of the tile, [low_all, high_all) by every row
        q_first = q_start + i_m * BLOCK_M
        q_last = q_first + BLOCK_M - 1
        low = tl.maximum(tl.maximum(q_first - window + 1, first + num_sinks), kv_start)
        high = tl.minimum(tl.minimum(q_last + 1, q_start + q_len), kv_start + kv_len)
        low_all = tl.minimum(tl.maximum(low, q_last - window + 1), tl.maximum(high, low))
        high_all = tl.minimum(q_first + 1, high)
        front = (low_all - low + BLOCK_N - 1) // BLOCK_N
        middle = tl.maximum(high_all - low - front * BLOCK_N, 0) // BLOCK_N
        back = tl.maximum(high - low - (front + middle) * BLOCK_N + BLOCK_N - 1, 0) // BLOCK_N

        p_kh = p_k + i_b * stride_kb + i_kv * stride_kh
        p_vh = p_v + i_b * stride_vb + i_kv * stride_vh
        for i_t in tl.range(0, front + back, num_stages=STAGES):
            o_slot = low + tl.where(i_t < front, i_t, i_t + middle) * BLOCK_N + o_n
            m_n = o_slot < high
            o_row = (o_slot - kv_start).to(tl.int64)
            m_load = m_n[:, None] & m_d[None, :]
            # [BLOCK_N, BLOCK_D]
            b_k = tl.load(p_kh + o_row[:, None] * stride_kn + o_d[None, :], mask=m_load, other=0.0)
            b_v = tl.load(p_vh + o_row[:, None] * stride_vn + o_d[None, :], mask=m_load, other=0.0)
            o_distance = q_slot[:, None] - o_slot[None, :]
            b_mask = m_n[None, :] & (o_distance >= 0) & (o_distance < window)
            b_acc, b_max, b_sum = attend(
                b_q, b_k, b_v, b_mask, b_acc, b_max, b_sum, scale, softcap, True, SOFTCAP, PRECISION
            )

        begin = low + front * BLOCK_N - kv_start
        for i_t in tl.range(0, middle, num_stages=STAGES):
            row = begin + i_t * BLOCK_N
            # [BLOCK_N, BLOCK_D]
            if USE_TMA:
                b_k = desc_k.load([i_b.to(tl.int32), i_kv.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)
                b_v = desc_v.load([i_b.to(tl.int32), i_kv.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                o_row = (row + o_n).to(tl.int64)
                p_kt = p_kh + o_row[:, None] * stride_kn + o_d[None, :]
                p_vt = p_vh + o_row[:, None] * stride_vn + o_d[None, :]
                if HEAD_DIM == BLOCK_D:
                    b_k = tl.load(p_kt)
                    b_v = tl.load(p_vt)
                else:
                    b_k = tl.load(p_kt, mask=m_d[None, :], other=0.0)
                    b_v = tl.load(p_vt, mask=m_d[None, :], other=0.0)
            b_acc, b_max, b_sum = attend(
                b_q, b_k, b_v, None, b_acc, b_max, b_sum, scale, softcap, False, SOFTCAP, PRECISION
            )

        b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_rows = p_out + i_b * stride_ob + i_head * stride_oh + o_m.to(tl.int64)[:, None] * stride_om + o_d[None, :]
        tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_rows)


def _launch(query: torch.Tensor) -> TileLaunch:
    """By device capability, element size and head_dim."""
    head_dim = query.shape[3]
    if not query.is_cuda:
        return TileLaunch(32, 16, 1, 1)
    if query.element_size() > 2:
        return TileLaunch(64, 16, 4, 1)
    if torch.cuda.get_device_capability(query.device)[0] >= 9:
        if head_dim <= 64:
            return TileLaunch(128, 64, 4, 3)
        if head_dim <= 128:
            return TileLaunch(128, 128, 8, 3)
        return TileLaunch(128, 64, 8, 2)
    if head_dim <= 64:
        return TileLaunch(128, 64, 4, 3)
    if head_dim <= 128:
        return TileLaunch(128, 32, 4, 3)
    return TileLaunch(64, 32, 4, 2)


def _use_tma(key: torch.Tensor, value: torch.Tensor) -> bool:
    if not key.is_cuda or key.element_size() > 2 or torch.cuda.get_device_capability(key.device)[0] < 9:
        return False
    return key.shape[2] > 0 and tma_ready(key) and tma_ready(value)


def run_portable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    rule: SinkWindow,
) -> None:
    """Launch the kernel; arguments as in `sink_window_attention`, already checked, head lists as device tensors."""
    batch, _, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    launch = _launch(query)
    block_d = max(16, next_power_of_2(head_dim))
    tma = _use_tma(key, value)
    desc_k = desc_v = None
    if tma:
        block = [1, 1, launch.streamed, block_d]
        desc_k = TensorDescriptor(key, key.shape, key.stride(), block)
        desc_v = TensorDescriptor(value, value.shape, value.stride(), block)
    sink_key, sink_value = (rule.sink_key, rule.sink_value) if rule.apart else (key, value)
    sink_len = min(rule.num_sinks, sink_key.shape[2])
    _sink_window_kernel[(ceil_div(q_len, launch.fixed) * batch * heads.numel(),)](
        query,
        key,
        value,
        desc_k,
        desc_v,
        sink_key,
        sink_value,
        out,
        heads,
        kv_heads,
        rule.start,
        rule.sink_logits,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *sink_key.stride()[:3],
        *sink_value.stride()[:3],
        *out.stride()[:3],
        heads.numel(),
        q_len,
        kv_len,
        rule.q_start,
        rule.kv_start,
        rule.window,
        rule.num_sinks,
        sink_len,
        *log2_scales(rule.scale, rule.softcap),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=launch.fixed,
        BLOCK_N=launch.streamed,
        BLOCK_S=16 if sink_len <= 16 else 64,
        STAGES=launch.stages,
        USE_TMA=tma,
        PRECISION=precision(query),
        **rule.flags(),
        **launch.options,
    )
