"""Sink + window attention for a subset of query heads (local heads; PAPER section 1).

A query at logical position m sees the key at n iff `n <= m` and (`m - n < window` or `n < num_sinks`):

    out_h(m) = sum_n softmax_n(scale * q_h(m) . k(n)) v(n)      over the n it sees

Two key ranges are read: the sinks, and one contiguous run of keys. With `num_sinks=0` it is plain sliding
window attention, with `window >= length` dense causal attention. Not for single decode steps over the cache's
ring buffer: that is `decode.py`.

The Triton kernel: one program for a tile of query rows of one head. Key tiles start at the first key that any
row of the tile sees, so only the tiles at the two ends need a mask; what lies between runs without one. On Hopper
`sink_window_hopper.py` does the same faster; this kernel serves every other device and what that one refuses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from .common import (
    HAS_TRITON,
    index_tensor,
    masked_softmax,
    row_tiles,
    soft_cap,
    starts,
    tl,
    triton,
    use_triton,
)
from .custom_op import define_op, needs_grad
from .sink_window_hopper import hopper_fits, run_hopper, tma_ready
from .sink_window_sdpa import sink_window_attention_sdpa
from .window_gradient import gradient_kernels_fit, window_attention_with_gradient

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None


def gather_sinks(
    key: torch.Tensor, value: torch.Tensor, *, num_sinks: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `num_sinks` real tokens of each row, `[B, Hkv, S, D]`; row 0 of `key` must be slot 0."""
    num_sinks = min(num_sinks, key.shape[2])
    if start is None:
        return key[:, :, :num_sinks], value[:, :, :num_sinks]
    slots = starts(start, key.shape[0], key.device)[:, None] + torch.arange(num_sinks, device=key.device)
    slots = slots.clamp_max(key.shape[2] - 1)[:, None, :, None]
    return (
        key.gather(2, slots.expand(-1, key.shape[1], -1, key.shape[3])),
        value.gather(2, slots.expand(-1, value.shape[1], -1, value.shape[3])),
    )


def sink_window_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    kv_start: int = 0,
    start: torch.Tensor | None = None,
    sink_key: torch.Tensor | None = None,
    sink_value: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `sink_window_attention`, in fp32, one tile of rows at a time."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    if sink_key is None:
        sink_key, sink_value = gather_sinks(key, value, num_sinks=num_sinks, start=start)
    sink_key, sink_value = sink_key[:, kv_heads].float(), sink_value[:, kv_heads].float()
    sink_pos = torch.arange(sink_key.shape[2], device=device)
    width = heads.numel() * batch * min(window + 256, kv_len)
    for rows in row_tiles(q_len, width):
        low = max(q_start + rows.start - window + 1 - kv_start, 0)
        high = min(q_start + rows.stop - kv_start, kv_len)
        q = query[:, heads, rows].float()
        k = torch.cat([sink_key, key[:, kv_heads, low:high].float()], 2)
        v = torch.cat([sink_value, value[:, kv_heads, low:high].float()], 2)
        # [B, rows], [B, keys]: logical positions
        q_pos = torch.arange(q_start + rows.start, q_start + rows.stop, device=device) - first_slot[:, None]
        k_pos = torch.arange(kv_start + low, kv_start + high, device=device) - first_slot[:, None]
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        in_window = (distance >= 0) & (distance < window) & (k_pos >= num_sinks)[:, None, :]
        in_sinks = q_pos[:, :, None] >= sink_pos
        mask = torch.cat([in_sinks, in_window], -1)[:, None]
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        logits = None if sink_logits is None else sink_logits[heads]
        tile = torch.matmul(masked_softmax(scores, mask, sink_logits=logits), v)
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


if HAS_TRITON:

    @triton.jit
    def _attend(
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
        """One key tile of the online softmax, in units of log2: `scale` and `softcap` carry log2(e)."""
        # [BLOCK_M, keys]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SOFTCAP:
            # softcap * tanh(x), with tanh(x) = 1 - 2 / (exp(2 x) + 1), safe at both ends
            b_s = softcap - 2.0 * softcap / (tl.exp2(b_s * scale) + 1.0)
            if MASKED:
                b_s = tl.where(b_mask, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
        else:
            if MASKED:
                b_s = tl.where(b_mask, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        return b_acc, b_new, b_sum

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
        if HAS_LOGITS:
            # the learned sink is a column of the denominator that has no value
            logit = tl.load(p_logits + i_head).to(tl.float32) * 1.4426950408889634
            b_max = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(logit, -1.0e30)
            b_sum = tl.exp2(logit - b_max)
        else:
            # finite, so that rows which have seen nothing yet never compute inf - inf
            b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)

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
                b_acc, b_max, b_sum = _attend(
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
            b_acc, b_max, b_sum = _attend(
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
            b_acc, b_max, b_sum = _attend(
                b_q, b_k, b_v, None, b_acc, b_max, b_sum, scale, softcap, False, SOFTCAP, PRECISION
            )

        b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_rows = p_out + i_b * stride_ob + i_head * stride_oh + o_m.to(tl.int64)[:, None] * stride_om + o_d[None, :]
        tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_rows)

    def _launch(query: torch.Tensor) -> tuple[int, int, int, int, bool]:
        """(BLOCK_M, BLOCK_N, warps, stages, TMA) by device capability, element size and head_dim."""
        head_dim = query.shape[3]
        if not query.is_cuda:
            return 32, 16, 1, 1, False
        major = torch.cuda.get_device_capability(query.device)[0]
        if query.element_size() > 2:
            return 64, 16, 4, 1, False
        if major >= 9:
            if head_dim <= 64:
                return 128, 64, 4, 3, True
            if head_dim <= 128:
                return 128, 128, 8, 3, True
            return 128, 64, 8, 2, True
        if head_dim <= 64:
            return 128, 64, 4, 3, False
        if head_dim <= 128:
            return 128, 32, 4, 3, False
        return 64, 32, 4, 2, False

    def _run_sink_window(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: torch.Tensor | None,
        kv_heads: torch.Tensor | None,
        head_list: list[int],
        kv_head_list: list[int],
        window: int,
        num_sinks: int,
        scale: float,
        out: torch.Tensor,
        q_start: int,
        kv_start: int,
        start: torch.Tensor | None,
        sink_key: torch.Tensor | None,
        sink_value: torch.Tensor | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        batch, _, q_len, head_dim = query.shape
        kv_len = key.shape[2]
        if heads is None:
            heads = index_tensor(tuple(head_list), query.device)
            kv_heads = index_tensor(tuple(kv_head_list), query.device)
        if query.numel() == 0 or heads.numel() == 0:
            return
        # a window beyond every slot is no window; this keeps slot arithmetic inside 32 bits
        window = min(window, 1 << 30)
        others = (key, value) if sink_key is None else (key, value, sink_key, sink_value)
        if q_start + q_len > kv_start and hopper_fits(query, others, num_sinks):
            with torch.cuda.device_of(query):
                run_hopper(
                    query,
                    key,
                    value,
                    heads=heads,
                    kv_heads=kv_heads,
                    window=window,
                    num_sinks=num_sinks,
                    scale=scale,
                    out=out,
                    q_start=q_start,
                    kv_start=kv_start,
                    start=start,
                    sink_key=sink_key,
                    sink_value=sink_value,
                    softcap=softcap,
                    sink_logits=sink_logits,
                )
            return
        block_m, block_n, warps, stages, tma = _launch(query)
        block_d = max(16, triton.next_power_of_2(head_dim))
        tma = tma and kv_len > 0 and tma_ready(key) and tma_ready(value)
        desc_k = desc_v = None
        if tma:
            block = [1, 1, block_n, block_d]
            desc_k = TensorDescriptor(key, key.shape, key.stride(), block)
            desc_v = TensorDescriptor(value, value.shape, value.stride(), block)
        apart = sink_key is not None
        sink_k, sink_v = (sink_key, sink_value) if apart else (key, value)
        sink_len = min(num_sinks, sink_k.shape[2])
        log2e = math.log2(math.e)
        if softcap is None:
            scale_arg, softcap_arg = scale * log2e, 0.0
        else:
            scale_arg, softcap_arg = 2 * scale / softcap * log2e, softcap * log2e
        tiles = triton.cdiv(q_len, block_m)
        grid = (tiles * batch * heads.numel(),)
        with torch.cuda.device_of(query):
            _sink_window_kernel[grid](
                query,
                key,
                value,
                desc_k,
                desc_v,
                sink_k,
                sink_v,
                out,
                heads,
                kv_heads,
                start,
                sink_logits,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *sink_k.stride()[:3],
                *sink_v.stride()[:3],
                out.stride(0),
                out.stride(1),
                out.stride(2),
                heads.numel(),
                q_len,
                kv_len,
                q_start,
                kv_start,
                window,
                num_sinks,
                sink_len,
                scale_arg,
                softcap_arg,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_S=16 if sink_len <= 16 else 64,
                STAGES=stages,
                HAS_START=start is not None,
                HAS_SINKS=num_sinks > 0,
                SINKS_APART=apart,
                SOFTCAP=softcap is not None,
                HAS_LOGITS=sink_logits is not None,
                USE_TMA=tma,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=warps,
                num_stages=stages,
            )

    _sink_window_op = define_op(
        "sink_window_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor? heads, Tensor? kv_heads, int[] head_list, "
        "int[] kv_head_list, SymInt window, SymInt num_sinks, float scale, Tensor(a!) out, SymInt q_start, "
        "SymInt kv_start, Tensor? start, Tensor? sink_key, Tensor? sink_value, float? softcap, "
        "Tensor? sink_logits) -> ()",
        _run_sink_window,
    )


def check_attention_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    out: torch.Tensor,
    start: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
) -> None:
    """Raise ValueError, saying what was given, if the arguments that prefill attention shares do not fit."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "expected query [B, Hq, M, D] and key, value [B, Hkv, N, D] of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, num_heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"query and key must share batch and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if out.shape != (batch, q_len, num_heads, head_dim):
        raise ValueError(f"out must be [B, M, Hq, D] = {(batch, q_len, num_heads, head_dim)}, got {tuple(out.shape)}")
    if len(heads) != len(kv_heads):
        raise ValueError(f"heads and kv_heads must be of one length, got {len(heads)} and {len(kv_heads)}")
    for name, values, size in (("heads", heads, num_heads), ("kv_heads", kv_heads, key.shape[1])):
        if not isinstance(values, torch.Tensor) and any(not 0 <= value < size for value in values):
            raise ValueError(f"{name} must be in [0, {size}), got {tuple(values)}")
    if start is not None and start.shape != (batch,):
        raise ValueError(f"start must be [B] = ({batch},), got {tuple(start.shape)}")
    if sink_logits is not None and sink_logits.shape != (num_heads,):
        raise ValueError(f"sink_logits must be [Hq] = ({num_heads},), got {tuple(sink_logits.shape)}")


def sink_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    kv_start: int = 0,
    start: torch.Tensor | None = None,
    sink_key: torch.Tensor | None = None,
    sink_value: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sinks + sliding window for the listed query heads, written to their places in `out` (PAPER section 1).

    Args:
        query: `[B, Hq, M, D]`, rotated; row m is slot `q_start + m`.
        key, value: `[B, Hkv, N, D]`, rotated; row n is slot `kv_start + n`. Any strides, unit stride on D.
        heads, kv_heads: `n` query heads and the row of `key` that each reads: int64 tensors on the device of
            `query`, or tuples of ints (copied to the device once and kept: call once before a graph capture).
        window: keys in sight, the query itself counted. num_sinks: first real tokens, always in sight.
        scale: softmax scale, > 0.
        out: `[B, M, Hq, D]`; the listed heads are written, others left alone. Rows that see nothing give 0.
        start: int `[B]`, slot of each row's first real token (left padding); None: no padding.
        sink_key, sink_value: `[B, Hkv, S <= num_sinks, D]`, the sinks kept apart. `key` may then start
            anywhere, and only its keys of logical position >= num_sinks count. Without them `kv_start` is 0.
        softcap: scores become `softcap * tanh(score / softcap)`. sink_logits: `[Hq]`, learned sinks.
        backend: `"auto"` (Triton for half precision on CUDA), `"triton"` or `"reference"`.

    Differentiable in memory linear in the length: whole sequences through `window_gradient.py` where Triton serves and
    for a soft-cap or learned sinks, all else in tiles of `scaled_dot_product_attention`, as on CPUs.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, a window < 1, a scale <= 0, or heads out of range.
    """
    check_attention_inputs(query, key, value, heads, kv_heads, out, start, sink_logits)
    if (sink_key is None) != (sink_value is None):
        raise ValueError("sink_key and sink_value must be given together")
    if window < 1 or num_sinks < 0 or scale <= 0:
        raise ValueError(f"expected window >= 1, num_sinks >= 0, scale > 0, got {window}, {num_sinks}, {scale}")
    if sink_key is None and num_sinks > 0 and kv_start > 0:
        raise ValueError(f"keys from slot {kv_start} on do not hold the sinks: give sink_key and sink_value")
    if sink_key is not None and sink_key.shape[2] > num_sinks:
        raise ValueError(f"sink_key holds {sink_key.shape[2]} tokens, more than num_sinks={num_sinks}")
    grad = needs_grad(query, key, value, sink_key, sink_value, sink_logits, out)
    on_triton = use_triton(backend, query)
    fused = on_triton and gradient_kernels_fit(query, num_sinks)
    whole = q_start == kv_start == 0 and key.shape[2] == query.shape[2] and sink_key is None
    special = softcap is not None or sink_logits is not None
    if grad and whole and (fused or (special and backend == "auto")):
        return window_attention_with_gradient(
            query, key, value, heads=heads, kv_heads=kv_heads, window=window, num_sinks=num_sinks, scale=scale, out=out,
            start=start, softcap=softcap, sink_logits=sink_logits, fused=fused,
            attend=partial(sink_window_attention, backend=backend),
        )  # fmt: skip
    if on_triton and query.shape[3] <= 256 and not grad:
        listed = isinstance(heads, torch.Tensor)
        _sink_window_op(
            query,
            key,
            value,
            heads if listed else None,
            kv_heads if listed else None,
            [] if listed else list(heads),
            [] if listed else list(kv_heads),
            window,
            num_sinks,
            scale,
            out,
            q_start,
            kv_start,
            start,
            sink_key,
            sink_value,
            softcap,
            sink_logits,
        )
        return out
    if backend == "auto" and not special:
        if sink_key is None or sink_value is None:
            sink_key, sink_value = gather_sinks(key, value, num_sinks=num_sinks, start=start)
        return sink_window_attention_sdpa(
            query,
            key,
            value,
            heads=tuple(heads.tolist()) if isinstance(heads, torch.Tensor) else tuple(heads),
            kv_heads=tuple(kv_heads.tolist()) if isinstance(kv_heads, torch.Tensor) else tuple(kv_heads),
            window=window,
            num_sinks=num_sinks,
            scale=scale,
            out=out,
            q_start=q_start,
            kv_start=kv_start,
            start=start,
            sink_key=sink_key,
            sink_value=sink_value,
        )
    if not isinstance(heads, torch.Tensor):
        heads, kv_heads = (
            index_tensor(tuple(heads), query.device),
            index_tensor(tuple(kv_heads), query.device),
        )
    return sink_window_attention_reference(
        query,
        key,
        value,
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        num_sinks=num_sinks,
        scale=scale,
        out=out,
        q_start=q_start,
        kv_start=kv_start,
        start=start,
        sink_key=sink_key,
        sink_value=sink_value,
        softcap=softcap,
        sink_logits=sink_logits,
    )
