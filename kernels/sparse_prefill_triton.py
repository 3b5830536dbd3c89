"""Attention on tiles' block lists for every GPU: the portable kernel of `sparse_prefill.py`.

A program holds rows of one tile and goes through the tile's list, front and diagonal blocks masked, those between not.
On Hopper `sparse_prefill_hopper.py` does the same faster.
"""

from __future__ import annotations

import torch

from .common import HAS_TRITON, next_power_of_2, tl, triton
from .tile_lists import ListOptions, TileLists
from .tiles import log2_scales, precision, tma_ready

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

if HAS_TRITON:
    from .tiles import attend, begin_softmax

    @triton.jit(do_not_specialize=["num_heads", "q_len", "q_start", "tiles", "blocks"])
    def _sparse_prefill_kernel(
        p_q,
        p_k,
        p_v,
        desc_k,
        desc_v,
        p_out,
        p_heads,
        p_kv_heads,
        p_start,
        p_logits,
        p_order,
        p_indices,
        p_counts,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_vb,
        stride_vh,
        stride_vn,
        stride_ob,
        stride_om,
        stride_oh,
        num_heads,
        q_len,
        q_start,
        tiles,
        blocks,
        scale,
        softcap,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        PER_STEP: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        STAGES: tl.constexpr,
        HAS_START: tl.constexpr,
        SOFTCAP: tl.constexpr,
        HAS_LOGITS: tl.constexpr,
        USE_TMA: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # the longest lists start first; a tile may be cut into TILE_ROWS / BLOCK_M programs
        parts: tl.constexpr = TILE_ROWS // BLOCK_M
        i_list = tl.load(p_order + tl.program_id(0) // parts).to(tl.int64)
        i_t = (i_list % tiles).to(tl.int32)
        i_b = i_list // tiles // num_heads
        i_head = tl.load(p_heads + i_list // tiles % num_heads).to(tl.int64)
        i_kv = tl.load(p_kv_heads + i_list // tiles % num_heads).to(tl.int64)
        count = tl.load(p_counts + i_list)
        p_list = p_indices + i_list * blocks
        first = 0
        if HAS_START:
            first = tl.load(p_start + i_b).to(tl.int32)

        begin = (q_start // TILE_ROWS + i_t) * TILE_ROWS + (tl.program_id(0) % parts) * BLOCK_M
        o_slot = begin + tl.arange(0, BLOCK_M)
        o_m = o_slot - q_start
        o_d = tl.arange(0, BLOCK_D)
        o_n = tl.arange(0, BLOCK_N)
        m_d = o_d < HEAD_DIM
        m_rows = ((o_m >= 0) & (o_m < q_len))[:, None] & m_d[None, :]
        # [BLOCK_M, BLOCK_D]
        p_rows = p_q + i_b * stride_qb + i_head * stride_qh + o_m.to(tl.int64)[:, None] * stride_qm + o_d[None, :]
        b_q = tl.load(p_rows, mask=m_rows, other=0.0)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_max, b_sum = begin_softmax(p_logits, i_head, BLOCK_M, HAS_LOGITS)

        # the list ascends: a block that padding cuts comes first, those that reach the diagonal come last
        end = q_start + q_len
        tile_end = tl.minimum((begin // TILE_ROWS + 1) * TILE_ROWS, end)
        back = tl.minimum((tile_end + BLOCK_N - 1) // BLOCK_N - begin // TILE_ROWS * (TILE_ROWS // BLOCK_N), count)
        front = 0
        if HAS_START:
            front = tl.minimum(count - back, 1)
        # whole steps in the middle, what is left over goes to the front
        front += (count - front - back) % PER_STEP
        middle = count - front - back
        o_step = tl.arange(0, BLOCK_N * PER_STEP)

        p_kh = p_k + i_b * stride_kb + i_kv * stride_kh
        p_vh = p_v + i_b * stride_vb + i_kv * stride_vh
        for i_n in tl.range(0, front + back, num_stages=1):
            o_key = tl.load(p_list + tl.where(i_n < front, i_n, i_n + middle)) * BLOCK_N + o_n
            o_row = o_key.to(tl.int64)
            m_load = (o_key < end)[:, None] & m_d[None, :]
            # [BLOCK_N, BLOCK_D]
            b_k = tl.load(p_kh + o_row[:, None] * stride_kn + o_d[None, :], mask=m_load, other=0.0)
            b_v = tl.load(p_vh + o_row[:, None] * stride_vn + o_d[None, :], mask=m_load, other=0.0)
            b_mask = (o_key[None, :] <= o_slot[:, None]) & (o_key >= first)[None, :]
            b_acc, b_max, b_sum = attend(
                b_q, b_k, b_v, b_mask, b_acc, b_max, b_sum, scale, softcap, True, SOFTCAP, PRECISION
            )
        for i_n in tl.range(0, middle // PER_STEP, num_stages=STAGES):
            # [BLOCK_N * PER_STEP, BLOCK_D]
            if PER_STEP == 1:
                row = tl.load(p_list + front + i_n) * BLOCK_N
            if USE_TMA:
                b_k = desc_k.load([i_b.to(tl.int32), i_kv.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)
                b_v = desc_v.load([i_b.to(tl.int32), i_kv.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                if PER_STEP == 1:
                    o_row = (row + o_n).to(tl.int64)
                else:
                    b_block = tl.load(p_list + front + i_n * PER_STEP + o_step // BLOCK_N)
                    o_row = (b_block * BLOCK_N + o_step % BLOCK_N).to(tl.int64)
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


# keys that the kernel takes at a time: several listed blocks are gathered, without TMA
STEP_KEYS = 64


def _launch(query: torch.Tensor) -> tuple[int, int, int, bool]:
    """(BLOCK_M, warps, stages, TMA) by device capability, element size and head_dim, for steps of 64 keys."""
    head_dim = query.shape[3]
    if not query.is_cuda:
        return 64, 1, 1, False
    major = torch.cuda.get_device_capability(query.device)[0]
    if query.element_size() > 2:
        return 32, 4, 1, False
    if major >= 9:
        # two of the stages go to the block number, which has to arrive before its keys are asked for
        return 128, 4 if head_dim <= 64 else 8, 5 if head_dim <= 128 else 2, True
    if head_dim <= 128:
        return 128, 8, 2, False
    return 64, 8, 1, False


def attend_lists_portable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    lists: TileLists,
    options: ListOptions,
) -> None:
    """Launch the kernel; arguments as in `sparse_prefill_attention`, already checked, head lists as device tensors."""
    head_dim = query.shape[3]
    block_m, warps, stages, tma = _launch(query)
    block_d = max(16, next_power_of_2(head_dim))
    per_step = max(1, STEP_KEYS // lists.block)
    tma = tma and per_step == 1 and TensorDescriptor is not None and tma_ready(key) and tma_ready(value)
    desc_k = desc_v = None
    if tma:
        box = [1, 1, lists.block, block_d]
        desc_k = TensorDescriptor(key, key.shape, key.stride(), box)
        desc_v = TensorDescriptor(value, value.shape, value.stride(), box)
    _sparse_prefill_kernel[(lists.counts.numel() * lists.tile // block_m,)](
        query,
        key,
        value,
        desc_k,
        desc_v,
        out,
        heads,
        kv_heads,
        options.start,
        options.sink_logits,
        lists.longest_first(),
        lists.indices,
        lists.counts,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        heads.numel(),
        query.shape[2],
        options.q_start,
        *lists.indices.shape[2:],
        *log2_scales(options.scale, options.softcap),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=lists.block,
        PER_STEP=per_step,
        TILE_ROWS=lists.tile,
        STAGES=stages,
        USE_TMA=tma,
        PRECISION=precision(query),
        **options.flags(),
        num_warps=warps,
        num_stages=stages,
    )
