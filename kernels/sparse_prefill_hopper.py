"""Sparse prefill on Hopper (compute capability 9), in Gluon: the fast path of `sparse_prefill.py`.

The same sum over a tile's list as in `sparse_prefill_triton.py`, with the work split as in `sink_window_hopper.py`: one
warp copies, two groups of four warps own 64 rows each and keep the tensor cores busy during the exponentials.

A step takes `BLOCK_N` keys, which are several listed blocks: each is copied by TMA to its place in one swizzled tile,
so that a step's products are those of dense attention, however short the blocks. Steps are filled from the end of the
list, which is the diagonal; what the first step lacks is read as zeros from behind the store and masked. Only the first
step (it may lack blocks, or hold the one that padding cuts) and the tile's own are masked.

Not for gradients, and not for fp32.
"""

from __future__ import annotations

import torch

from .common import next_power_of_2
from .sink_window_hopper import HAS_GLUON, WARP_GROUPS
from .tile_lists import ListOptions, TileLists
from .tiles import log2_scales, tma_ready

# padded head_dim: (rows of a warp group, keys of a step, stages, registers of a thread)
TILES = {
    64: (64, 128, 3, 240),
    128: (64, 128, 2, 240),
    256: (64, 64, 2, 240),
}

if HAS_GLUON:
    from .sink_window_hopper import (
        TensorDescriptor,
        _copy_tile,
        _softmax,
        gl,
        gluon,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # elements of a row that lie together in shared memory
    PANEL = 64
    # a block number that no store reaches: its keys are read as zeros, and lie behind every row
    NO_BLOCK = gl.constexpr(1 << 23)
    # its name changed in triton 3.9
    PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

    @gluon.jit
    def _as_tiles(parts, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as tiles of `shape`."""
        if PUBLIC:
            return parts.reinterpret(parts.dtype, shape, layout)
        else:
            return parts._reinterpret(parts.dtype, shape, layout)

    @gluon.jit
    def _load_list(
        shared,
        sources,
        places,
        span,
        ROWS: gl.constexpr,
        BLOCK: gl.constexpr,
        PER_STEP: gl.constexpr,
        PANELS: gl.constexpr,
        STAGES: gl.constexpr,
        GROUPS: gl.constexpr,
    ):
        """The copying warp: Q, then the keys and values of a step's blocks."""
        q_tiles, k_parts, v_parts, _, _, bars = shared
        desc_q, desc_k, desc_v = sources
        i_b, i_head, i_kv, q_row = places
        p_list, lacking, total = span[0], span[1], span[2]
        panel: gl.constexpr = k_parts.shape[4]
        step_bytes: gl.constexpr = PER_STEP * BLOCK * PANELS * panel * 2
        for i_g in gl.static_range(GROUPS):
            full = bars.index(4 * STAGES + i_g)
            mbarrier.expect(full, ROWS * PANELS * panel * 2)
            _copy_tile(desc_q, [i_b, i_head, q_row + i_g * ROWS, 0], full, q_tiles.index(i_g))
        for i_j in range(total):
            stage = i_j % STAGES
            # a barrier that nobody has arrived at yet counts as past its odd phase: the first round does not wait
            phase = ((i_j // STAGES) & 1) ^ 1
            k_full, k_free = bars.index(stage), bars.index(STAGES + stage)
            v_full, v_free = bars.index(2 * STAGES + stage), bars.index(3 * STAGES + stage)
            # asked for before the wait, so that the wait hides how long it takes
            blocks = ()
            for i_p in gl.static_range(PER_STEP):
                place = i_j * PER_STEP + i_p - lacking
                blocks = blocks + (gl.load(p_list + place, mask=place >= 0, other=NO_BLOCK),)  # noqa: RUF005
            mbarrier.wait(k_free, phase)
            mbarrier.expect(k_full, step_bytes)
            for i_d in gl.static_range(PANELS):
                for i_p in gl.static_range(PER_STEP):
                    part = k_parts.index((stage * PANELS + i_d) * PER_STEP + i_p)
                    _copy_tile(desc_k, [i_b, i_kv, blocks[i_p] * BLOCK, i_d * panel], k_full, part)
            mbarrier.wait(v_free, phase)
            mbarrier.expect(v_full, step_bytes)
            for i_d in gl.static_range(PANELS):
                for i_p in gl.static_range(PER_STEP):
                    part = v_parts.index((stage * PANELS + i_d) * PER_STEP + i_p)
                    _copy_tile(desc_v, [i_b, i_kv, blocks[i_p] * BLOCK, i_d * panel], v_full, part)

    @gluon.jit
    def _seen(span, q_slot, i_j, BLOCK: gl.constexpr, PER_STEP: gl.constexpr, L_S: gl.constexpr):
        """Bool `[ROWS, BLOCK_N]`: the step's keys that are real and not after the row."""
        p_list, lacking, _, first = span[0], span[1], span[2], span[3]
        o_n = gl.arange(0, BLOCK * PER_STEP, gl.SliceLayout(0, L_S))
        o_place = i_j * PER_STEP + o_n // BLOCK - lacking
        o_slot = gl.load(p_list + o_place, mask=o_place >= 0, other=NO_BLOCK) * BLOCK + o_n % BLOCK
        return (o_slot[None, :] <= q_slot[:, None]) & (o_slot >= first)[None, :]

    @gluon.jit
    def _list_step(
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
        SOFTCAP: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK: gl.constexpr,
        PER_STEP: gl.constexpr,
        BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr,
        L_S: gl.constexpr,
        L_O: gl.constexpr,
    ):
        """Scores of step `i_j` and weights of step `i_j - 1` times V, both in flight; then the softmax of `i_j`."""
        _, _, _, k_tiles, v_tiles, bars = shared
        _, _, _, _, scale, softcap, _ = span
        BLOCK_N: gl.constexpr = BLOCK * PER_STEP
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
            b_mask = _seen(span, q_slot, i_j, BLOCK, PER_STEP, L_S)
        b_next, b_alpha, b_max, b_sum = _softmax(b_s, b_mask, b_max, b_sum, scale, softcap, MASKED, SOFTCAP)
        b_next = gl.convert_layout(b_next.to(b_p.dtype), gl.DotOperandLayout(0, L_O, 2))
        b_acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(bars.index(3 * STAGES + last), count=1)
        b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, L_O))[:, None]
        return b_next, b_acc, b_max, b_sum

    @gluon.jit
    def _attend_list(
        shared,
        store,
        span,
        GROUP: gl.constexpr,
        SOFTCAP: gl.constexpr,
        HAS_LOGITS: gl.constexpr,
        HEAD_DIM: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK: gl.constexpr,
        PER_STEP: gl.constexpr,
        BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr,
        OWN_STEPS: gl.constexpr,
    ):
        """One group of four warps: `ROWS` query rows against every step of the list."""
        q_tiles, _, _, k_tiles, v_tiles, bars = shared
        p_out, out_base, stride_om, i_m, q_start, q_len = store
        _, _, total, _, scale, softcap, logit = span
        BLOCK_N: gl.constexpr = BLOCK * PER_STEP
        L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
        L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        dtype: gl.constexpr = q_tiles.dtype
        q_tile = q_tiles.index(GROUP).reshape([ROWS, BLOCK_D])
        q_slot = q_start + i_m + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, L_S))
        if HAS_LOGITS:
            # the learned sink is a column of the denominator that has no value
            b_max = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, L_S)) + gl.maximum(logit, -1.0e30)
            b_sum = gl.exp2(logit - b_max)
        else:
            # finite, so that rows which have seen nothing yet never compute inf - inf
            b_max = gl.full([ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, L_S))
            b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, L_S))
        b_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, L_O)

        mbarrier.wait(bars.index(4 * STAGES + GROUP), 0)
        mbarrier.wait(bars.index(0), 0)
        k_tile = k_tiles.index(0).reshape([BLOCK_N, BLOCK_D]).permute([1, 0])
        b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, L_S)
        b_s = warpgroup_mma_wait(0, deps=[warpgroup_mma(q_tile, k_tile, b_zero, use_acc=False, is_async=True)])
        mbarrier.arrive(bars.index(STAGES), count=1)
        b_mask = _seen(span, q_slot, 0, BLOCK, PER_STEP, L_S)
        b_p, _, b_max, b_sum = _softmax(b_s, b_mask, b_max, b_sum, scale, softcap, True, SOFTCAP)
        b_p = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, L_O, 2))

        middle_end = gl.maximum(total - OWN_STEPS, 1)
        for i_j in range(1, middle_end):
            b_p, b_acc, b_max, b_sum = _list_step(
                q_tile, shared, span, q_slot, i_j, b_p, b_acc, b_max, b_sum,
                False, SOFTCAP, ROWS, BLOCK, PER_STEP, BLOCK_D, STAGES, L_S, L_O,
            )  # fmt: skip
        for i_j in range(middle_end, total):
            b_p, b_acc, b_max, b_sum = _list_step(
                q_tile, shared, span, q_slot, i_j, b_p, b_acc, b_max, b_sum,
                True, SOFTCAP, ROWS, BLOCK, PER_STEP, BLOCK_D, STAGES, L_S, L_O,
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
        m_rows = ((o_m >= 0) & (o_m < q_len))[:, None] & (o_d < HEAD_DIM)[None, :]
        gl.store(p_rows, b_out.to(dtype), mask=m_rows)

    @gluon.jit(do_not_specialize=["num_heads", "q_len", "q_start", "tiles", "blocks"])
    def _sparse_prefill_hopper_kernel(
        desc_q,
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
        HEAD_DIM: gl.constexpr,
        BLOCK_D: gl.constexpr,
        ROWS: gl.constexpr,
        BLOCK: gl.constexpr,
        PER_STEP: gl.constexpr,
        PANELS: gl.constexpr,
        STAGES: gl.constexpr,
        GROUPS: gl.constexpr,
        REGISTERS: gl.constexpr,
        L_K: gl.constexpr,
        HAS_START: gl.constexpr,
        SOFTCAP: gl.constexpr,
        HAS_LOGITS: gl.constexpr,
    ):
        # a program is a tile of one head; the longest lists start first
        TILE: gl.constexpr = ROWS * GROUPS
        BLOCK_N: gl.constexpr = BLOCK * PER_STEP
        OWN_STEPS: gl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
        i_list = gl.load(p_order + gl.program_id(0)).to(gl.int64)
        i_t = (i_list % tiles).to(gl.int32)
        i_b = (i_list // tiles // num_heads).to(gl.int32)
        place = i_list // tiles % num_heads
        i_head = gl.load(p_heads + place).to(gl.int32)
        i_kv = gl.load(p_kv_heads + place).to(gl.int32)
        count = gl.load(p_counts + i_list)
        first = 0
        if HAS_START:
            first = gl.load(p_start + i_b).to(gl.int32)
        logit = 0.0
        if HAS_LOGITS:
            logit = gl.load(p_logits + i_head).to(gl.float32) * 1.4426950408889634
        # the tile's first row, which may lie before the call's
        i_m = (q_start // TILE + i_t) * TILE - q_start
        # one step at least, wholly masked if the rows see nothing
        total = gl.maximum((count + PER_STEP - 1) // PER_STEP, 1)
        lacking = total * PER_STEP - count
        out_base = i_b.to(gl.int64) * stride_ob + i_head.to(gl.int64) * stride_oh

        dtype: gl.constexpr = desc_k.dtype
        panel: gl.constexpr = BLOCK_D // PANELS
        parts: gl.constexpr = STAGES * PANELS * PER_STEP
        q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, BLOCK_D], desc_q.layout)
        k_parts = gl.allocate_shared_memory(dtype, [parts, 1, 1, BLOCK, panel], desc_k.layout)
        v_parts = gl.allocate_shared_memory(dtype, [parts, 1, 1, BLOCK, panel], desc_v.layout)
        # the blocks of a panel lie one after another, as the rows of one tile do
        k_tiles = _as_tiles(k_parts, [STAGES, 1, 1, BLOCK_N, BLOCK_D], L_K)
        v_tiles = _as_tiles(v_parts, [STAGES, 1, 1, BLOCK_N, BLOCK_D], L_K)
        # K full, K free, V full, V free, one of each for a stage; then Q full, one for a group
        bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES + GROUPS, 1], mbarrier.MBarrierLayout())
        for i_s in gl.static_range(STAGES):
            mbarrier.init(bars.index(i_s), count=1)
            mbarrier.init(bars.index(STAGES + i_s), count=GROUPS)
            mbarrier.init(bars.index(2 * STAGES + i_s), count=1)
            mbarrier.init(bars.index(3 * STAGES + i_s), count=GROUPS)
        for i_g in gl.static_range(GROUPS):
            mbarrier.init(bars.index(4 * STAGES + i_g), count=1)

        shared = (q_tiles, k_parts, v_parts, k_tiles, v_tiles, bars)
        store = (p_out, out_base, stride_om, i_m, q_start, q_len)
        span = (p_indices + i_list * blocks, lacking, total, first, scale, softcap, logit)
        sources = (desc_q, desc_k, desc_v)
        places = (i_b, i_head, i_kv, i_m)
        # the flags are written out: kept in a variable they would no longer be compile-time constants
        gl.warp_specialize([
            (_attend_list, (shared, store, span, 0, SOFTCAP, HAS_LOGITS, HEAD_DIM,
                           ROWS, BLOCK, PER_STEP, BLOCK_D, STAGES, OWN_STEPS)),
            (_attend_list, (shared, store, span, 1, SOFTCAP, HAS_LOGITS, HEAD_DIM,
                           ROWS, BLOCK, PER_STEP, BLOCK_D, STAGES, OWN_STEPS)),
            (_load_list, (shared, sources, places, span, ROWS, BLOCK, PER_STEP, PANELS, STAGES, GROUPS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


def hopper_fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: TileLists) -> bool:
    """Whether `attend_lists_hopper` can take these tensors."""
    if not HAS_GLUON or not query.is_cuda or query.element_size() != 2:
        return False
    shape = TILES.get(next_power_of_2(query.shape[3]))
    if shape is None or torch.cuda.get_device_capability(query.device)[0] != 9:
        return False
    rows, keys = shape[:2]
    fits = rows * WARP_GROUPS == lists.tile and keys % lists.block == 0 and lists.block >= 8
    return fits and all(tma_ready(tensor) for tensor in (query, key, value))


def attend_lists_hopper(
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
    q_len, head_dim = query.shape[2:]
    block_d = next_power_of_2(head_dim)
    rows, block_n, stages, registers = TILES[block_d]
    dtype = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16

    def descriptor(tensor: torch.Tensor, length: int, box: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
        shape = [tensor.shape[0], tensor.shape[1], length, head_dim]
        return TensorDescriptor(tensor, shape, list(tensor.stride()), box, layout)

    # keys behind the last query may be uninitialised: past the descriptor's end zeros are read
    desc_k, desc_v = (descriptor(x, options.q_start + q_len, [1, 1, lists.block, PANEL]) for x in (key, value))
    _sparse_prefill_hopper_kernel[(lists.counts.numel(),)](
        descriptor(query, q_len, [1, 1, rows, block_d]),
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
        *out.stride()[:3],
        heads.numel(),
        q_len,
        options.q_start,
        *lists.indices.shape[2:],
        *log2_scales(options.scale, options.softcap),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        ROWS=rows,
        BLOCK=lists.block,
        PER_STEP=block_n // lists.block,
        PANELS=block_d // PANEL,
        STAGES=stages,
        GROUPS=WARP_GROUPS,
        REGISTERS=registers,
        L_K=gl.NVMMASharedLayout.get_default_for([1, 1, block_n, block_d], dtype),
        **options.flags(),
        num_warps=4,
    )
