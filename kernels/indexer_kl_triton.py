"""The stage-1 loss as Triton kernels: `indexer_kl.py` has the contract, the wrapper and what the symbols mean.

With teacher scores t and student scores s of a row, over the keys that it sees, in units of log2:

    KL = ln 2 (sum_n p_n (t_n - s_n) - lse(t) + lse(s)),    p = 2^(t - lse(t))
    grad iq = w sum_n (2^(s_n - lse(s)) - p_n) ik_n,        grad ik_n = w sum_rows (2^(s_n - lse(s)) - p_n) iq

One kernel takes a tile of rows over all its keys twice: online sums for the loss, then grad iq. The other takes a tile
of keys over the rows that see it, for grad ik; no atomics, so runs repeat bit for bit. Nothing of rows x keys is
stored. The weight of a row, and a power of two that keeps slopes clear of fp16's small end, are folded into the lse.

Next to half precision teachers the fp32 index vectors are split as x = high + low, both fp16: `[high | low]` is what is
streamed, and its products with `[high | high]` and `[low | low]` of the fixed side add up to the fp32 product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .common import HAS_TRITON, ceil_div, next_power_of_2, tl, triton
from .tiles import LOG2E, TileLaunch, log2_scales

MAX_HEAD_DIM, MAX_INDEX_DIM = 256, 64
# slopes are at most 1 and stored in fp16 at most as 2^14
_SLOPE_BITS = 14


@dataclass(frozen=True)
class SampledRows:
    """Which rows of which heads the loss is taken over, as in `indexer_kl`, and how the teacher attends.

    weight: fp32 `[B, M]`, 0 for rows that do not count. first_slot: int64 `[B]`.
    """

    heads: torch.Tensor
    kv_heads: torch.Tensor
    index_heads: torch.Tensor
    q_slots: torch.Tensor
    weight: torch.Tensor
    first_slot: torch.Tensor
    scale: float
    softcap: float | None


if HAS_TRITON:
    from .tiles import cap_scores

    @triton.jit
    def _scores(
        b_fixed,
        b_high,
        b_low,
        b_stream,
        b_index,
        scale,
        softcap,
        SOFTCAP: tl.constexpr,
        SPLIT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Teacher and student scores `[fixed, streamed]` in units of log2; `scale` and `softcap` carry log2(e)."""
        b_t = tl.dot(b_fixed, tl.trans(b_stream), input_precision=PRECISION)
        b_t = cap_scores(b_t, scale, softcap, SOFTCAP)
        b_s = tl.dot(b_high, tl.trans(b_index), input_precision=PRECISION)
        if SPLIT:
            b_s = tl.dot(b_low, tl.trans(b_index), b_s, input_precision=PRECISION)
        return b_t, b_s

    @triton.jit
    def _load(p_base, o_row, stride, limit, o_column, COLUMNS: tl.constexpr):
        """The rows `o_row` < `limit` of a matrix with unit column stride; zeros beyond its edges."""
        p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
        return tl.load(p_tile, mask=(o_row < limit)[:, None] & (o_column < COLUMNS)[None, :], other=0.0)

    @triton.jit
    def _load_fixed(p_base, o_row, limit, o_column, INDEX_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
        """`[high | high]` and `[low | low]` of contiguous rows `[high | low]`; without a split, the rows themselves."""
        p_rows = p_base + o_row.to(tl.int64)[:, None] * WIDTH + (o_column % INDEX_DIM)[None, :]
        m_load = (o_row < limit)[:, None] & (o_column < WIDTH)[None, :]
        b_high = tl.load(p_rows, mask=m_load, other=0.0)
        b_low = b_high
        if SPLIT:
            b_low = tl.load(p_rows + INDEX_DIM, mask=m_load, other=0.0)
        return b_high, b_low

    @triton.jit(do_not_specialize=["num_heads", "num_index_heads", "q_len", "kv_len"])
    def _rows_kernel(
        p_q,
        p_k,
        p_iq,
        p_ik,
        p_heads,
        p_kv_heads,
        p_index_heads,
        p_slots,
        p_weight,
        p_start,
        p_kl,
        p_lse_t,
        p_lse_s,
        p_grad,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        num_heads,
        num_index_heads,
        q_len,
        kv_len,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        INDEX_DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        STAGES: tl.constexpr,
        SHIFT: tl.constexpr,
        GRADIENT: tl.constexpr,
        SOFTCAP: tl.constexpr,
        SPLIT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # heads vary fastest, so that programs in flight share key tiles in L2; late rows first: they see the most
        i_pid = tl.program_id(0)
        i_tile = tl.num_programs(0) // num_heads - 1 - i_pid // num_heads
        tiles = (q_len + BLOCK_M - 1) // BLOCK_M
        i_b = (i_tile // tiles).to(tl.int64)
        i_h = i_pid % num_heads
        o_m = (i_tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        o_w = tl.arange(0, BLOCK_W)
        m_m = o_m < q_len
        i_row = (i_b * num_heads + i_h) * q_len
        p_q += i_b * stride_qb + tl.load(p_heads + i_h).to(tl.int64) * stride_qh
        p_k += i_b * stride_kb + tl.load(p_kv_heads + i_h).to(tl.int64) * stride_kh
        p_ik += (i_b * num_index_heads + tl.load(p_index_heads + i_h).to(tl.int64)) * kv_len * WIDTH
        first = tl.load(p_start + i_b).to(tl.int32)

        # [BLOCK_M]
        b_weight = tl.load(p_weight + i_b * q_len + o_m, mask=m_m, other=0.0)
        b_slot = tl.load(p_slots + i_b * q_len + o_m, mask=m_m, other=-1).to(tl.int32)
        m_counted = b_weight > 0.0
        # keys [first, seen_by_all) need no mask, [seen_by_all, seen) do; rows that do not count may see anything
        seen = tl.maximum(tl.max(tl.where(m_counted, b_slot, -1), 0) + 1, first)
        seen_by_all = tl.minimum(tl.min(tl.where(m_counted, b_slot, kv_len), 0) + 1, seen)
        seen_by_all = first + tl.maximum(seen_by_all - first, 0) // BLOCK_N * BLOCK_N
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_W]
        b_q = _load(p_q, o_m, stride_qm, q_len, o_d, HEAD_DIM)
        b_high, b_low = _load_fixed(p_iq + i_row * WIDTH, o_m, q_len, o_w, INDEX_DIM, WIDTH, SPLIT)

        # finite, so that rows which have seen nothing yet never compute inf - inf
        b_max_t = tl.full([BLOCK_M], -1.0e30, tl.float32)
        b_max_s = tl.full([BLOCK_M], -1.0e30, tl.float32)
        b_sum_t = tl.zeros([BLOCK_M], tl.float32)
        b_sum_s = tl.zeros([BLOCK_M], tl.float32)
        b_gap = tl.zeros([BLOCK_M], tl.float32)
        for phase in tl.static_range(2):
            begin = seen_by_all if phase else first
            end = seen if phase else seen_by_all
            for i_n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_W]
                b_k = _load(p_k, i_n + o_n, stride_kn, kv_len, o_d, HEAD_DIM)
                b_ik = _load(p_ik, i_n + o_n, WIDTH, kv_len, o_w, WIDTH)
                b_t, b_s = _scores(b_q, b_high, b_low, b_k, b_ik, scale, softcap, SOFTCAP, SPLIT, PRECISION)
                if phase:
                    m_seen = (i_n + o_n)[None, :] <= b_slot[:, None]
                    b_t = tl.where(m_seen, b_t, -1.0e30)
                    b_s = tl.where(m_seen, b_s, -1.0e30)
                b_new = tl.maximum(b_max_t, tl.max(b_t, 1))
                b_p = tl.exp2(b_t - b_new[:, None])
                b_alpha = tl.exp2(b_max_t - b_new)
                b_sum_t = b_sum_t * b_alpha + tl.sum(b_p, 1)
                b_gap = b_gap * b_alpha + tl.sum(b_p * (b_t - b_s), 1)
                b_max_t = b_new
                b_new = tl.maximum(b_max_s, tl.max(b_s, 1))
                b_sum_s = b_sum_s * tl.exp2(b_max_s - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
                b_max_s = b_new

        b_sum_t = tl.where(m_counted, b_sum_t, 1.0)
        b_lse_t = b_max_t + tl.log2(b_sum_t)
        b_lse_s = b_max_s + tl.log2(tl.where(m_counted, b_sum_s, 1.0))
        b_kl = 0.6931471805599453 * (b_gap / b_sum_t - b_lse_t + b_lse_s)
        tl.store(p_kl + i_row + o_m, tl.where(m_counted, b_kl, 0.0), mask=m_m)
        if GRADIENT:
            # 2^(s - lse) is then the weighted, shifted probability, and 0 in rows that do not count
            b_shift = SHIFT + tl.log2(tl.where(m_counted, b_weight, 1.0))
            b_lse_t = tl.where(m_counted, b_lse_t - b_shift, float("inf"))
            b_lse_s = tl.where(m_counted, b_lse_s - b_shift, float("inf"))
            tl.store(p_lse_t + i_row + o_m, b_lse_t, mask=m_m)
            tl.store(p_lse_s + i_row + o_m, b_lse_s, mask=m_m)
            b_grad = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
            for phase in tl.static_range(2):
                begin = seen_by_all if phase else first
                end = seen if phase else seen_by_all
                for i_n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_W]
                    b_k = _load(p_k, i_n + o_n, stride_kn, kv_len, o_d, HEAD_DIM)
                    b_ik = _load(p_ik, i_n + o_n, WIDTH, kv_len, o_w, WIDTH)
                    b_t, b_s = _scores(b_q, b_high, b_low, b_k, b_ik, scale, softcap, SOFTCAP, SPLIT, PRECISION)
                    b_slope = tl.exp2(b_s - b_lse_s[:, None]) - tl.exp2(b_t - b_lse_t[:, None])
                    if phase:
                        b_slope = tl.where((i_n + o_n)[None, :] <= b_slot[:, None], b_slope, 0.0)
                    b_grad = tl.dot(b_slope.to(b_ik.dtype), b_ik, b_grad, input_precision=PRECISION)
            p_out = p_grad + (i_row + o_m)[:, None] * WIDTH + o_w[None, :]
            tl.store(p_out, b_grad, mask=m_m[:, None] & (o_w < WIDTH)[None, :])

    @triton.jit(do_not_specialize=["num_heads", "num_index_heads", "q_len", "kv_len"])
    def _keys_kernel(
        p_q,
        p_k,
        p_iq,
        p_ik,
        p_heads,
        p_kv_heads,
        p_index_heads,
        p_slots,
        p_start,
        p_lse_t,
        p_lse_s,
        p_first_tile,
        p_full_tile,
        p_grad,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        num_heads,
        num_index_heads,
        q_len,
        kv_len,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        INDEX_DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        STAGES: tl.constexpr,
        SOFTCAP: tl.constexpr,
        SPLIT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # early keys first: the most rows see them
        i_pid = tl.program_id(0)
        tiles = (kv_len + BLOCK_N - 1) // BLOCK_N
        i_tile = i_pid // num_heads
        i_b = (i_tile % (tl.num_programs(0) // num_heads // tiles)).to(tl.int64)
        i_tile = i_tile // (tl.num_programs(0) // num_heads // tiles)
        i_h = i_pid % num_heads
        o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        o_w = tl.arange(0, BLOCK_W)
        i_row = (i_b * num_heads + i_h) * q_len
        p_q += i_b * stride_qb + tl.load(p_heads + i_h).to(tl.int64) * stride_qh
        p_k += i_b * stride_kb + tl.load(p_kv_heads + i_h).to(tl.int64) * stride_kh
        p_ik += (i_b * num_index_heads + tl.load(p_index_heads + i_h).to(tl.int64)) * kv_len * WIDTH
        first = tl.load(p_start + i_b).to(tl.int32)
        first_tile = tl.load(p_first_tile + i_b * tiles + i_tile)
        full_tile = tl.load(p_full_tile + i_b * tiles + i_tile)

        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_W]
        b_k = _load(p_k, o_n, stride_kn, kv_len, o_d, HEAD_DIM)
        b_high, b_low = _load_fixed(p_ik, o_n, kv_len, o_w, INDEX_DIM, WIDTH, SPLIT)
        b_grad = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for phase in tl.static_range(2):
            begin = full_tile if phase else first_tile
            end = (q_len + BLOCK_M - 1) // BLOCK_M if phase else full_tile
            for i_m in tl.range(begin, end, num_stages=STAGES):
                o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
                # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_W]
                b_q = _load(p_q, o_m, stride_qm, q_len, o_d, HEAD_DIM)
                b_iq = _load(p_iq + i_row * WIDTH, o_m, WIDTH, q_len, o_w, WIDTH)
                b_lse_t = tl.load(p_lse_t + i_row + o_m, mask=o_m < q_len, other=float("inf"))
                b_lse_s = tl.load(p_lse_s + i_row + o_m, mask=o_m < q_len, other=float("inf"))
                b_t, b_s = _scores(b_k, b_high, b_low, b_q, b_iq, scale, softcap, SOFTCAP, SPLIT, PRECISION)
                # [BLOCK_N, BLOCK_M]
                b_slope = tl.exp2(b_s - b_lse_s[None, :]) - tl.exp2(b_t - b_lse_t[None, :])
                if phase == 0:
                    b_slot = tl.load(p_slots + i_b * q_len + o_m, mask=o_m < q_len, other=-1).to(tl.int32)
                    m_seen = (o_n[:, None] <= b_slot[None, :]) & (o_n >= first)[:, None]
                    b_slope = tl.where(m_seen, b_slope, 0.0)
                b_grad = tl.dot(b_slope.to(b_iq.dtype), b_iq, b_grad, input_precision=PRECISION)
        i_out = (i_b * num_heads + i_h) * kv_len
        p_out = p_grad + (i_out + o_n)[:, None] * WIDTH + o_w[None, :]
        tl.store(p_out, b_grad, mask=(o_n < kv_len)[:, None] & (o_w < WIDTH)[None, :])


def _launch(query: torch.Tensor, index_dim: int) -> TileLaunch:
    """By device capability, element size, head_dim and the width of the index."""
    if not query.is_cuda:
        return TileLaunch(32, 16, 1, 1)
    if query.element_size() > 2:
        return TileLaunch(64, 32, 4, 1)
    hopper = torch.cuda.get_device_capability(query.device)[0] >= 9
    if index_dim > 32 or (query.shape[3] > 128 and not hopper):
        return TileLaunch(64, 32, 4, 2)
    if query.shape[3] > 128 or not hopper:
        return TileLaunch(128, 32, 8, 2)
    # 128 registers: two programs on a multiprocessor, one multiplies while the other takes exponentials
    return TileLaunch(128, 64, 8, 3, 128)


def _split(vectors: torch.Tensor) -> torch.Tensor:
    """`[high | low]` fp16 of fp32 vectors: their sum is exact to 22 bits."""
    high = vectors.half()
    return torch.cat([high, (vectors - high.float()).half()], -1)


def _row_tiles_of_keys(
    q_slots: torch.Tensor, weight: torch.Tensor, first_slot: torch.Tensor, kv_len: int, block_m: int, block_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per key tile, int32 `[B, key tiles]`: no row tile before `first` sees it, each from `full` on sees all of it.

    Exact for ascending rows; for others a safe bound. Rows without weight are of no account.
    """
    batch, q_len = q_slots.shape
    tiles = ceil_div(q_len, block_m)
    none = torch.iinfo(torch.int64).max

    def of_tiles(fill: int) -> torch.Tensor:
        slots = q_slots.new_full((batch, tiles * block_m), fill)
        slots[:, :q_len] = torch.where(weight > 0, q_slots, fill)
        return slots.view(batch, tiles, block_m)

    highest = of_tiles(-1).amax(-1).cummax(1).values
    lowest = of_tiles(none).amin(-1).flip(1).cummin(1).values.flip(1)
    begin = torch.arange(0, kv_len, block_n, device=q_slots.device).expand(batch, -1).contiguous()
    first = torch.searchsorted(highest, begin)
    full = torch.searchsorted(lowest.contiguous(), begin + block_n - 1)
    full = torch.where(begin >= first_slot[:, None], torch.maximum(full, first), tiles)
    return first.int(), full.int()


def indexer_kl_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    rows: SampledRows,
    *,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss of each head `[n]` and, if asked for, its gradients by index query `[B, n, M, r]` and key `[B, n, N, r]`.

    Tensors as in `indexer_kl`; everything returned is fp32. Next to half precision queries the entries of the index
    vectors must stay below fp16's 65504, else the loss is not finite.
    """
    batch, _, q_len, head_dim = query.shape
    kv_len, index_dim, n = key.shape[2], index_query.shape[3], rows.heads.numel()
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key.to(query.dtype)))
    split = query.element_size() == 2
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        # Triton's interpreter multiplies the bits of bf16
        query, key = query.float(), key.float()
    # the student's scores in units of log2
    index = (index_query.float() * LOG2E).contiguous(), index_key.float().contiguous()
    streamed_query, streamed_key = map(_split, index) if split else index
    width = streamed_query.shape[3]
    q_slots, weight, first_slot = rows.q_slots.contiguous(), rows.weight.contiguous(), rows.first_slot
    largest = weight.amax().clamp_min(torch.finfo(torch.float32).tiny)
    relative = weight / largest
    launch = _launch(query, index_dim)
    lse_shape = batch, n, q_len

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    kl = empty(*lse_shape)
    lse = [empty(*lse_shape) for _ in range(2)] if gradient else [kl, kl]
    grad_query = empty(batch, n, q_len, width) if gradient else kl
    places = rows.heads, rows.kv_heads, rows.index_heads
    sizes = (
        *query.stride()[:3],
        *key.stride()[:3],
        n,
        index_key.shape[1],
        q_len,
        kv_len,
        *log2_scales(rows.scale, rows.softcap),
    )
    shapes: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "INDEX_DIM": index_dim,
        "WIDTH": width,
        "BLOCK_W": max(16, next_power_of_2(width)),
        "STAGES": launch.stages,
        "SOFTCAP": rows.softcap is not None,
        "SPLIT": split,
        "PRECISION": "tf32" if split else "ieee",
        **launch.options,
    }
    with torch.cuda.device_of(query):
        _rows_kernel[(ceil_div(q_len, launch.fixed) * n * batch,)](
            query, key, streamed_query, streamed_key, *places, q_slots, relative, first_slot, kl, *lse, grad_query,
            *sizes, BLOCK_M=launch.fixed, BLOCK_N=launch.streamed, SHIFT=_SLOPE_BITS, GRADIENT=gradient, **shapes,
        )  # fmt: skip
        loss = (kl * weight[:, None]).sum((0, 2))
        if not gradient:
            return loss, None, None
        grad_key = empty(batch, n, kv_len, width)
        tiles = _row_tiles_of_keys(q_slots, relative, first_slot, kv_len, launch.streamed, launch.fixed)
        _keys_kernel[(ceil_div(kv_len, launch.fixed) * n * batch,)](
            query, key, streamed_query, streamed_key, *places, q_slots, first_slot, *lse, *tiles, grad_key,
            *sizes, BLOCK_M=launch.streamed, BLOCK_N=launch.fixed, **shapes,
        )  # fmt: skip
    unit = largest * 2.0**-_SLOPE_BITS
    if split:
        grad_query, grad_key = (g[..., :index_dim] + g[..., index_dim:] for g in (grad_query, grad_key))
    return loss, grad_query * unit, grad_key * (unit / LOG2E)
