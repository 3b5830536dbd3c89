"""Sink + window attention on Hopper (compute capability 9), in Gluon: the fast path of `sink_window.py`.

The same sum, tiles and masks as the portable kernel there, with the work split over warps by hand, which the Triton
compiler does not do well on this chip:

- one warp copies Q, K and V tiles to shared memory through TMA, several stages ahead;
- two groups of four warps each own 64 query rows; each starts the scores of the next key tile before it
  finishes the softmax of this one, so that the tensor cores stay busy during the exponentials.

The key tiles of a program come in order: the sinks, then the window from its low end; only its two ends are
masked. (Both masked ends first would save a copy of the loop, but measured 5 to 20 % slower.) Not for gradients,
and not for fp32.
"""

from __future__ import annotations

import torch

from .common import ceil_div, next_power_of_2
from .sink_window_rule import SinkWindow
from .tiles import log2_scales, tma_ready

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # its name changed in triton 3.9
    _copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False

# padded head_dim: (rows of a warp group, keys of a tile, stages, registers of a thread); measured on an H200, where
# head_dim 64 is faster in the portable kernel (461 against 430 TFLOP/s), and where three groups of 64 x 64 tiles, three
# stages, or mbarriers that make the groups take turns at the tensor cores gained nothing at head_dim 128
TILES = {
    128: (64, 128, 2, 240),
    256: (64, 64, 2, 240),
}
WARP_GROUPS = 2

if HAS_GLUON:
    _VARYING = ["num_heads", "q_len", "kv_len", "q_start", "kv_start", "window", "num_sinks", "sink_len"]

    @gluon.jit
    def _softmax(b_s, b_mask, b_max, b_sum, scale, softcap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr):
        """One step of the online softmax, in units of log2: `scale` and `softcap` carry log2(e)."""
        if SOFTCAP:
            # softcap * tanh(x), with tanh(x) = 1 - 2 / (exp(2 x) + 1), safe at both ends
            b_s = softcap - 2.0 * softcap / (gl.exp2(b_s * scale) + 1.0)
            scale = 1.0
        if MASKED:
            b_s = gl.where(b_mask, b_s, float("-inf"))
        b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale)
        b_p = gl.exp2(b_s * scale - b_new[:, None])
        b_alpha = gl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
        return b_p, b_alpha, b_new, b_sum

    @gluon.jit
    def _load(
        shared,
        sources,
        places,
        span,
        HAS_SINKS: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK_N: gl.constexpr,
        BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr,
        GROUPS: gl.constexpr,
    ):
        """The copying warp."""
        q_tiles, k_tiles, v_tiles, bars = shared
        desc_q, desc_k, desc_v, desc_sink_k, desc_sink_v = sources
        i_b, i_head, i_kv, q_row, sink_row, row = places
        total = span[8]
        for i_g in gl.static_range(GROUPS):
            full = bars.index(4 * STAGES + i_g)
            mbarrier.expect(full, ROWS * BLOCK_D * 2)
            _copy_tile(desc_q, [i_b, i_head, q_row + i_g * ROWS, 0], full, q_tiles.index(i_g))
        for i_j in range(total):
            stage = i_j % STAGES
            # a barrier that nobody has arrived at yet counts as past its odd phase: the first round does not wait
            phase = ((i_j // STAGES) & 1) ^ 1
            k_full, k_free = bars.index(stage), bars.index(STAGES + stage)
            v_full, v_free = bars.index(2 * STAGES + stage), bars.index(3 * STAGES + stage)
            i_t = i_j - 1 if HAS_SINKS else i_j
            key_row = row + i_t * BLOCK_N
            mbarrier.wait(k_free, phase)
            mbarrier.expect(k_full, BLOCK_N * BLOCK_D * 2)
            if HAS_SINKS and i_j == 0:
                _copy_tile(desc_sink_k, [i_b, i_kv, sink_row, 0], k_full, k_tiles.index(stage))
            else:
                _copy_tile(desc_k, [i_b, i_kv, key_row, 0], k_full, k_tiles.index(stage))
            mbarrier.wait(v_free, phase)
            mbarrier.expect(v_full, BLOCK_N * BLOCK_D * 2)
            if HAS_SINKS and i_j == 0:
                _copy_tile(desc_sink_v, [i_b, i_kv, sink_row, 0], v_full, v_tiles.index(stage))
            else:
                _copy_tile(desc_v, [i_b, i_kv, key_row, 0], v_full, v_tiles.index(stage))

    @gluon.jit
    def _step(
        q_tile,
        shared,
        span,
        q_slot,
        i_j,
        b_p,
        b_acc,
        b_max,
        b_sum,
        MASKED: gl.constexpr,
        HAS_SINKS: gl.constexpr,
        SOFTCAP: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK_N: gl.constexpr,
        BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr,
        L_S: gl.constexpr,
        L_O: gl.constexpr,
    ):
        """Scores of tile `i_j` and weights of tile `i_j - 1` times V, both in flight; then the softmax of `i_j`."""
        _, k_tiles, v_tiles, bars = shared
        _, _, _, low, high, window, _, _, _, scale, softcap, _ = span
        stage, last = i_j % STAGES, (i_j - 1) % STAGES
        mbarrier.wait(bars.index(stage), (i_j // STAGES) & 1)
        # [BLOCK_D, BLOCK_N]
        k_tile = k_tiles.index(stage).reshape([BLOCK_N, BLOCK_D]).permute([1, 0])
        b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, L_S)
        scores = warpgroup_mma(q_tile, k_tile, b_zero, use_acc=False, is_async=True)
        mbarrier.wait(bars.index(2 * STAGES + last), ((i_j - 1) // STAGES) & 1)
        # [BLOCK_N, BLOCK_D]
        v_tile = v_tiles.index(last).reshape([BLOCK_N, BLOCK_D])
        sums = warpgroup_mma(b_p, v_tile, b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(bars.index(STAGES + stage), count=1)
        b_mask = None
        if MASKED:
            i_t = i_j - 1 if HAS_SINKS else i_j
            o_slot = low + i_t * BLOCK_N
            o_slot += gl.arange(0, BLOCK_N, gl.SliceLayout(0, L_S))
            o_distance = q_slot[:, None] - o_slot[None, :]
            b_mask = (o_slot < high)[None, :] & (o_distance >= 0) & (o_distance < window)
        b_next, b_alpha, b_max, b_sum = _softmax(b_s, b_mask, b_max, b_sum, scale, softcap, MASKED, SOFTCAP)
        b_next = gl.convert_layout(b_next.to(b_p.dtype), gl.DotOperandLayout(0, L_O, 2))
        b_acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(bars.index(3 * STAGES + last), count=1)
        b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, L_O))[:, None]
        return b_next, b_acc, b_max, b_sum

    @gluon.jit
    def _attend(
        shared,
        store,
        span,
        GROUP: gl.constexpr,
        HAS_SINKS: gl.constexpr,
        SOFTCAP: gl.constexpr,
        HAS_LOGITS: gl.constexpr,
        HEAD_DIM: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK_N: gl.constexpr,
        BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        """One group of four warps: `ROWS` query rows against every key tile."""
        q_tiles, k_tiles, v_tiles, bars = shared
        p_out, out_base, stride_om, i_m, q_len = store
        q_first, first, sink_len, low, high, window, front_end, middle_end, total, scale, softcap, logit = span
        L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
        L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        dtype: gl.constexpr = q_tiles.dtype
        q_tile = q_tiles.index(GROUP).reshape([ROWS, BLOCK_D])
        q_slot = q_first + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, L_S))
        if HAS_LOGITS:
            # the learned sink is a column of the denominator that has no value
            b_max = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, L_S)) + gl.maximum(logit, -1.0e30)
            b_sum = gl.exp2(logit - b_max)
        else:
            # finite, so that rows which have seen nothing yet never compute inf - inf
            b_max = gl.full([ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, L_S))
            b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, L_S))
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, L_O)

        # the first tile: the sinks if there are any
        mbarrier.wait(bars.index(4 * STAGES + GROUP), 0)
        mbarrier.wait(bars.index(0), 0)
        k_tile = k_tiles.index(0).reshape([BLOCK_N, BLOCK_D]).permute([1, 0])
        b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, L_S)
        b_s = warpgroup_mma_wait(0, deps=[warpgroup_mma(q_tile, k_tile, b_zero, use_acc=False, is_async=True)])
        mbarrier.arrive(bars.index(STAGES), count=1)
        o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L_S))
        if HAS_SINKS:
            b_mask = (o_n < sink_len)[None, :] & (q_slot[:, None] >= (o_n + first)[None, :])
        else:
            o_slot = low + o_n
            o_distance = q_slot[:, None] - o_slot[None, :]
            b_mask = (o_slot < high)[None, :] & (o_distance >= 0) & (o_distance < window)
        b_p, _, b_max, b_sum = _softmax(b_s, b_mask, b_max, b_sum, scale, softcap, True, SOFTCAP)
        b_p = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, L_O, 2))

        for i_j in range(1, front_end):
            b_p, b_acc, b_max, b_sum = _step(
                q_tile, shared, span, q_slot, i_j, b_p, b_acc, b_max, b_sum,
                True, HAS_SINKS, SOFTCAP, ROWS, BLOCK_N, BLOCK_D, STAGES, L_S, L_O,
            )  # fmt: skip
        for i_j in range(gl.maximum(front_end, 1), middle_end):
            b_p, b_acc, b_max, b_sum = _step(
                q_tile, shared, span, q_slot, i_j, b_p, b_acc, b_max, b_sum,
                False, HAS_SINKS, SOFTCAP, ROWS, BLOCK_N, BLOCK_D, STAGES, L_S, L_O,
            )  # fmt: skip
        for i_j in range(gl.maximum(middle_end, 1), total):
            b_p, b_acc, b_max, b_sum = _step(
                q_tile, shared, span, q_slot, i_j, b_p, b_acc, b_max, b_sum,
                True, HAS_SINKS, SOFTCAP, ROWS, BLOCK_N, BLOCK_D, STAGES, L_S, L_O,
            )  # fmt: skip

        last = (total - 1) % STAGES
        mbarrier.wait(bars.index(2 * STAGES + last), ((total - 1) // STAGES) & 1)
        v_tile = v_tiles.index(last).reshape([BLOCK_N, BLOCK_D])
        b_acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(b_p, v_tile, b_acc, is_async=True)])
        b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)
        b_out = b_acc / gl.convert_layout(b_sum, gl.SliceLayout(1, L_O))[:, None]
        o_m = i_m + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, L_O))
        o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, L_O))
        p_rows = p_out + out_base + o_m.to(gl.int64)[:, None] * stride_om + o_d[None, :]
        gl.store(p_rows, b_out.to(dtype), mask=(o_m < q_len)[:, None] & (o_d < HEAD_DIM)[None, :])

    @gluon.jit(do_not_specialize=_VARYING)
    def _sink_window_hopper_kernel(
        desc_q,
        desc_k,
        desc_v,
        desc_sink_k,
        desc_sink_v,
        p_out,
        p_heads,
        p_kv_heads,
        p_start,
        p_logits,
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
        HEAD_DIM: gl.constexpr,
        BLOCK_D: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK_N: gl.constexpr,
        STAGES: gl.constexpr,
        GROUPS: gl.constexpr,
        REGISTERS: gl.constexpr,
        HAS_START: gl.constexpr,
        HAS_SINKS: gl.constexpr,
        SINKS_APART: gl.constexpr,
        SOFTCAP: gl.constexpr,
        HAS_LOGITS: gl.constexpr,
    ):
        # heads vary fastest, so that the programs in flight share the key window of one KV group in L2;
        # late rows first, since early ones see fewer keys and fill the tail
        BLOCK_M: gl.constexpr = ROWS * GROUPS
        i_pid = gl.program_id(0)
        i_tile = gl.num_programs(0) // num_heads - 1 - i_pid // num_heads
        tiles = (q_len + BLOCK_M - 1) // BLOCK_M
        i_b = i_tile // tiles
        i_m = (i_tile % tiles) * BLOCK_M
        i_head = gl.load(p_heads + i_pid % num_heads).to(gl.int32)
        i_kv = gl.load(p_kv_heads + i_pid % num_heads).to(gl.int32)
        first = 0
        if HAS_START:
            first = gl.load(p_start + i_b).to(gl.int32)
        logit = 0.0
        if HAS_LOGITS:
            logit = gl.load(p_logits + i_head).to(gl.float32) * 1.4426950408889634

        # slots [low, high) are seen by some row of the tile, [low_all, high_all) by every row
        q_first = q_start + i_m
        q_last = q_first + BLOCK_M - 1
        low = gl.maximum(gl.maximum(q_first - window + 1, first + num_sinks), kv_start)
        high = gl.minimum(gl.minimum(q_last + 1, q_start + q_len), kv_start + kv_len)
        low_all = gl.minimum(gl.maximum(low, q_last - window + 1), gl.maximum(high, low))
        high_all = gl.minimum(q_first + 1, high)
        front = (low_all - low + BLOCK_N - 1) // BLOCK_N
        middle = gl.maximum(high_all - low - front * BLOCK_N, 0) // BLOCK_N
        back = gl.maximum(high - low - (front + middle) * BLOCK_N + BLOCK_N - 1, 0) // BLOCK_N
        # tile counts with the sinks' tile in front; one tile at least, wholly masked if the rows see nothing
        front_end = front + 1 if HAS_SINKS else front
        middle_end = front_end + middle
        total = middle_end + back if HAS_SINKS else gl.maximum(middle_end + back, 1)
        sink_row = 0 if SINKS_APART else first
        out_base = i_b.to(gl.int64) * stride_ob + i_head.to(gl.int64) * stride_oh

        dtype: gl.constexpr = desc_k.dtype
        q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, BLOCK_D], desc_q.layout)
        k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], desc_k.layout)
        v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], desc_v.layout)
        # K full, K free, V full, V free, one of each for a stage; then Q full, one for a group
        bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES + GROUPS, 1], mbarrier.MBarrierLayout())
        for i_s in gl.static_range(STAGES):
            mbarrier.init(bars.index(i_s), count=1)
            mbarrier.init(bars.index(STAGES + i_s), count=GROUPS)
            mbarrier.init(bars.index(2 * STAGES + i_s), count=1)
            mbarrier.init(bars.index(3 * STAGES + i_s), count=GROUPS)
        for i_g in gl.static_range(GROUPS):
            mbarrier.init(bars.index(4 * STAGES + i_g), count=1)

        shared = (q_tiles, k_tiles, v_tiles, bars)
        store = (p_out, out_base, stride_om, i_m, q_len)
        span = (q_first, first, sink_len, low, high, window, front_end, middle_end, total, scale, softcap, logit)
        sources = (desc_q, desc_k, desc_v, desc_sink_k, desc_sink_v)
        places = (i_b, i_head, i_kv, i_m, sink_row, low - kv_start)
        # the flags are written out: kept in a variable they would no longer be compile-time constants
        gl.warp_specialize([
            (_attend, (shared, store, span, 0, HAS_SINKS, SOFTCAP, HAS_LOGITS, HEAD_DIM,
                      ROWS, BLOCK_N, BLOCK_D, STAGES)),
            (_attend, (shared, store, span, 1, HAS_SINKS, SOFTCAP, HAS_LOGITS, HEAD_DIM,
                      ROWS, BLOCK_N, BLOCK_D, STAGES)),
            (_load, (shared, sources, places, span, HAS_SINKS, ROWS, BLOCK_N, BLOCK_D, STAGES, GROUPS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


def hopper_fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: SinkWindow) -> bool:
    """Whether `run_hopper` can take these tensors."""
    if not HAS_GLUON or not query.is_cuda or query.element_size() != 2:
        return False
    tile = TILES.get(next_power_of_2(query.shape[3]))
    if tile is None or rule.num_sinks > tile[1] or torch.cuda.get_device_capability(query.device)[0] != 9:
        return False
    read = (query, key, value, rule.sink_key, rule.sink_value)
    return all(tensor is None or tma_ready(tensor) for tensor in read)


def run_hopper(
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
    block_d = next_power_of_2(head_dim)
    rows, block_n, stages, registers = TILES[block_d]

    def descriptor(tensor: torch.Tensor, length: int, tile: int) -> TensorDescriptor:
        block = [1, 1, tile, block_d]
        dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        shape = [tensor.shape[0], tensor.shape[1], length, head_dim]
        return TensorDescriptor(tensor, shape, list(tensor.stride()), block, layout)

    # keys behind the last query may be uninitialised: past the descriptor's end zeros are read
    kv_len = min(key.shape[2], rule.q_start + q_len - rule.kv_start)
    desc_k, desc_v = descriptor(key, kv_len, block_n), descriptor(value, kv_len, block_n)
    desc_sink_k, desc_sink_v, sink_len = desc_k, desc_v, rule.num_sinks
    if rule.sink_key is not None and rule.sink_value is not None:
        sink_len = rule.sink_key.shape[2]
        desc_sink_k = descriptor(rule.sink_key, sink_len, block_n)
        desc_sink_v = descriptor(rule.sink_value, sink_len, block_n)
    _sink_window_hopper_kernel[(ceil_div(q_len, rows * WARP_GROUPS) * batch * heads.numel(),)](
        descriptor(query, q_len, rows),
        desc_k,
        desc_v,
        desc_sink_k,
        desc_sink_v,
        out,
        heads,
        kv_heads,
        rule.start,
        rule.sink_logits,
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
        ROWS=rows,
        BLOCK_N=block_n,
        STAGES=stages,
        GROUPS=WARP_GROUPS,
        REGISTERS=registers,
        **rule.flags(),
        num_warps=4,
    )
