"""Prefill of retrieval heads on one block list for each tile of rows (`retrieval_prefill="sparse_tiled"`).

    out_h(m) = sum_{n in T_h(tile of m), n <= m} softmax_n(scale * q_h(m) . k(n)) v(n)

with `T_h(tile)` the real tokens of the blocks that `tile_blocks.py` lists from the index queries and keys: that file
states what a row may attend to and how it relates to the token-wise sets of `indexed.py`. With `top_p=1` it is dense
causal attention. Decode steps keep to the token-wise sets.

The prompt is worked off in pieces of whole tiles, so that the selector's masses stay within `WORKSPACE_BYTES` at any
length; a piece's longest lists start first. Nothing is copied from q, k and v, nothing is read back to the host, and
no sum depends on the order in which programs run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from .attention_inputs import check_attention_inputs
from .common import (
    HAS_TRITON,
    ceil_div,
    index_tensor,
    masked_softmax,
    next_power_of_2,
    row_tiles,
    soft_cap,
    starts,
    tl,
    triton,
    use_triton,
)
from .custom_op import define_op, needs_grad
from .sparse_gradient import Lists, as_lists, sparse_attention_with_gradient
from .sparse_prefill_hopper import attend_lists_hopper, hopper_fits
from .tile_blocks import BLOCK, GROUPS, TILE, tile_blocks_reference, tile_range
from .tiles import tma_ready

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

WORKSPACE_BYTES = 1 << 28
# listed blocks that the attention kernel takes at a time; with more than one they are gathered without TMA
STEP_BLOCKS = 1

Observer = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None]


def sparse_prefill_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    index_heads: torch.Tensor,
    top_p: float,
    min_tokens: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    on_selection: Observer | None = None,
) -> torch.Tensor:
    """The contract of `sparse_prefill_attention`, in fp32; differentiable, the lists being constants."""
    batch, _, q_len, _ = query.shape
    device, end = query.device, q_start + q_len
    first_slot = starts(start, batch, device)
    with torch.no_grad():
        listed = tile_blocks_reference(
            index_query,
            index_key,
            index_heads=index_heads,
            top_p=top_p,
            min_tokens=min_tokens,
            num_sinks=num_sinks,
            q_start=q_start,
            start=start,
        )
    logits = None if sink_logits is None else sink_logits[heads]
    slots = torch.arange(end, device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * end):
        q_slots = torch.arange(q_start + rows.start, q_start + rows.stop, device=device)
        # [B, 1, rows, keys]
        valid = ((slots <= q_slots[:, None]) & (slots >= first_slot[:, None, None]))[:, None]
        tiles = q_slots.div(TILE, rounding_mode="floor") - tile_range(q_start, q_len)[0]
        chosen = listed[:, :, tiles].repeat_interleave(BLOCK, -1)[..., :end] & valid
        q, k = query[:, heads, rows].float(), key[:, kv_heads, :end].float()
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        if on_selection is not None:
            with torch.no_grad():
                on_selection(rows, chosen, valid, masked_softmax(scores, valid, sink_logits=logits))
        weights = masked_softmax(scores, chosen, sink_logits=logits)
        tile = torch.matmul(weights, value[:, kv_heads, :end].float())
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


def pieces(q_len: int, *, q_start: int, rows: int) -> Iterator[slice]:
    """Slices of query rows that end on tile bounds, the last one excepted, for masses of `rows` heads at a time."""
    blocks = ceil_div(q_start + q_len, BLOCK)
    tiles = max(1, WORKSPACE_BYTES // (4 * GROUPS * blocks * rows))
    begin = 0
    while begin < q_len:
        end = min((tile_range(q_start + begin, 1)[0] + tiles) * TILE - q_start, q_len)
        yield slice(begin, end)
        begin = end


def piece_lists(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: torch.Tensor,
    q_start: int,
    start: torch.Tensor | None,
    fused: bool,
    **selection: float,
) -> Lists:
    """(rows, lists, counts) of the prompt, piece by piece; `fused`: by the Triton kernels.

    `selection`: `top_p`, `min_tokens` and `num_sinks`. Memory is bounded at any length.
    """
    options: dict = selection | {"index_heads": index_heads, "start": start}
    for rows in pieces(index_query.shape[2], q_start=q_start, rows=index_query.shape[0] * index_query.shape[1]):
        options["q_start"] = q_start + rows.start
        if fused:
            yield rows, *select_tile_blocks(index_query[:, :, rows], index_key, **options)
        else:
            yield rows, *as_lists(tile_blocks_reference(index_query[:, :, rows], index_key, **options))


if HAS_TRITON:
    from .tile_blocks import select_tile_blocks
    from .tiles import attend

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
        if HAS_LOGITS:
            # the learned sink is a column of the denominator that has no value
            logit = tl.load(p_logits + i_head).to(tl.float32) * 1.4426950408889634
            b_max = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(logit, -1.0e30)
            b_sum = tl.exp2(logit - b_max)
        else:
            # finite, so that rows which have seen nothing yet never compute inf - inf
            b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)

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

    def _attend_lists(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        indices: torch.Tensor,
        counts: torch.Tensor,
        heads: torch.Tensor,
        kv_heads: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        q_start: int,
        start: torch.Tensor | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        """Attention of the rows in `query` on `select_tile_blocks`' lists."""
        q_len, head_dim = query.shape[2:]
        order = counts.flatten().argsort(descending=True)
        if STEP_BLOCKS == 1 and hopper_fits(query, key, value, TILE, BLOCK):
            with torch.cuda.device_of(query):
                attend_lists_hopper(
                    query, key, value, (order, indices, counts), heads, kv_heads, scale, out, q_start, start, softcap,
                    sink_logits, BLOCK,
                )  # fmt: skip
            return
        block_m, warps, stages, tma = _launch(query)
        block_d = max(16, next_power_of_2(head_dim))
        tma = tma and STEP_BLOCKS == 1 and TensorDescriptor is not None and tma_ready(key) and tma_ready(value)
        desc_k = desc_v = None
        if tma:
            box = [1, 1, BLOCK, block_d]
            desc_k = TensorDescriptor(key, key.shape, key.stride(), box)
            desc_v = TensorDescriptor(value, value.shape, value.stride(), box)
        log2e = math.log2(math.e)
        if softcap is None:
            scale_arg, softcap_arg = scale * log2e, 0.0
        else:
            scale_arg, softcap_arg = 2 * scale / softcap * log2e, softcap * log2e
        with torch.cuda.device_of(query):
            _sparse_prefill_kernel[(order.numel() * TILE // block_m,)](
                query,
                key,
                value,
                desc_k,
                desc_v,
                out,
                heads,
                kv_heads,
                start,
                sink_logits,
                order,
                indices,
                counts,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *out.stride()[:3],
                heads.numel(),
                q_len,
                q_start,
                indices.shape[2],
                indices.shape[3],
                scale_arg,
                softcap_arg,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK_M=block_m,
                BLOCK_N=BLOCK,
                PER_STEP=STEP_BLOCKS,
                TILE_ROWS=TILE,
                STAGES=stages,
                HAS_START=start is not None,
                SOFTCAP=softcap is not None,
                HAS_LOGITS=sink_logits is not None,
                USE_TMA=tma,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=warps,
                num_stages=stages,
            )

    def _run_sparse_prefill(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        heads: list[int],
        kv_heads: list[int],
        index_heads: list[int],
        top_p: float,
        min_tokens: int,
        num_sinks: int,
        scale: float,
        out: torch.Tensor,
        q_start: int,
        start: torch.Tensor | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        on_device, kv_on_device, index_on_device = (
            index_tensor(tuple(listed), query.device) for listed in (heads, kv_heads, index_heads)
        )
        lists = piece_lists(
            index_query,
            index_key,
            index_heads=index_on_device,
            top_p=top_p,
            min_tokens=min_tokens,
            num_sinks=num_sinks,
            q_start=q_start,
            start=start,
            fused=True,
        )
        for rows, indices, counts in lists:
            _attend_lists(
                query[:, :, rows],
                key,
                value,
                indices,
                counts,
                on_device,
                kv_on_device,
                scale,
                out[:, rows],
                q_start + rows.start,
                start,
                softcap,
                sink_logits,
            )

    _sparse_prefill_op = define_op(
        "sparse_prefill_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor index_query, Tensor index_key, int[] heads, "
        "int[] kv_heads, int[] index_heads, float top_p, SymInt min_tokens, SymInt num_sinks, float scale, "
        "Tensor(a!) out, SymInt q_start, Tensor? start, float? softcap, Tensor? sink_logits) -> ()",
        _run_sparse_prefill,
    )


def sparse_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: Sequence[int],
    kv_heads: Sequence[int],
    index_heads: Sequence[int],
    top_p: float,
    min_tokens: int = 0,
    num_sinks: int = 4,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
    on_selection: Observer | None = None,
) -> torch.Tensor:
    """Attention of the listed heads on their tiles' block lists, written to their places in `out`.

    Args:
        query: `[B, Hq, M, D]`, rotated; row m is slot `q_start + m`.
        key, value: `[B, Hkv, N, D]`, rotated; row n is slot n, and N >= q_start + M (chunked prefill: N > M).
        index_query: `[B, n, M, r]`, one head for each listed head. index_key: `[B, I, N, r]`, unit stride on r.
        heads, kv_heads, index_heads: `n` query heads and their rows of `key` and `index_key`, as ints.
        top_p: index mass that a tile's list must reach, in (0, 1]; 1 reads everything.
        min_tokens: floor on the slots of a list. num_sinks: first real tokens whose blocks are always listed.
        scale: softmax scale of the exact attention, > 0 (the index scores carry their own).
        out: `[B, M, Hq, D]`; the listed heads are written, others left alone. Rows on padding give 0.
        start: int `[B]`, slot of each row's first real token (left padding); None: no padding.
        softcap: scores become `softcap * tanh(score / softcap)`. sink_logits: `[Hq]`, learned sinks.
        backend: `"auto"` (Triton for half precision on CUDA), `"triton"` or `"reference"`.
        on_selection: called per tile of rows with (rows, selected mask, valid mask, exact weights without selection);
            for measurements only: the reference runs, and computes the dense weights as well.

    Gradients reach query, key, value and sink_logits, in memory linear in the length (`sparse_gradient.py`), but not
    the index: lists are constants.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, options out of range, or queries beyond the last key.
    """
    check_attention_inputs(query, key, value, heads, kv_heads, out, start, sink_logits)
    batch, _, q_len, _ = query.shape
    count, dim = len(heads), index_query.shape[-1]
    if index_query.shape != (batch, count, q_len, dim) or index_key.dim() != 4 or len(index_heads) != count:
        raise ValueError(
            f"expected index_query [B, n, M, r] = {(batch, count, q_len, dim)}, index_key [B, I, N, r] and {count} "
            f"index_heads, got {tuple(index_query.shape)}, {tuple(index_key.shape)} and {len(index_heads)}"
        )
    if index_key.shape[0] != batch or index_key.shape[2] < q_start + q_len or index_key.shape[3] != dim:
        raise ValueError(
            f"index_key must hold [B, I, N >= {q_start + q_len}, {dim}] for {batch} rows, got {tuple(index_key.shape)}"
        )
    if scale <= 0 or q_start < 0 or q_start + q_len > key.shape[2]:
        given = f"scale={scale}, q_start={q_start}, {q_len} queries and {key.shape[2]} keys"
        raise ValueError(f"expected scale > 0 and 0 <= q_start <= keys - queries, got {given}")
    if not 0 < top_p <= 1 or min_tokens < 0 or num_sinks < 0:
        given = f"{top_p}, {min_tokens} and {num_sinks}"
        raise ValueError(f"expected 0 < top_p <= 1, min_tokens >= 0 and num_sinks >= 0, got {given}")
    if query.numel() == 0 or count == 0:
        return out
    fused = on_selection is None and query.shape[3] <= 256 and use_triton(backend, query)
    if on_selection is None and needs_grad(query, key, value, sink_logits, out):
        selection = {"top_p": top_p, "min_tokens": min_tokens, "num_sinks": num_sinks, "q_start": q_start}
        where = {"heads": tuple(heads), "kv_heads": tuple(kv_heads), "scale": scale, "softcap": softcap}
        attend = partial(sparse_prefill_attention, index_heads=index_heads, backend=backend, **selection, **where)
        lists = partial(
            piece_lists, index_heads=index_tensor(tuple(index_heads), query.device), fused=fused, **selection
        )
        return sparse_attention_with_gradient(
            query, key, value, index_query, index_key, out=out, sink_logits=sink_logits, attend=attend, lists=lists,
            q_start=q_start, start=start, **where,
        )  # fmt: skip
    if fused:
        _sparse_prefill_op(
            query,
            key,
            value,
            index_query,
            index_key,
            list(heads),
            list(kv_heads),
            list(index_heads),
            top_p,
            min_tokens,
            num_sinks,
            scale,
            out,
            q_start,
            start,
            softcap,
            sink_logits,
        )
        return out
    return sparse_prefill_attention_reference(
        query,
        key,
        value,
        index_query,
        index_key,
        heads=index_tensor(tuple(heads), query.device),
        kv_heads=index_tensor(tuple(kv_heads), query.device),
        index_heads=index_tensor(tuple(index_heads), query.device),
        top_p=top_p,
        min_tokens=min_tokens,
        num_sinks=num_sinks,
        scale=scale,
        out=out,
        q_start=q_start,
        start=start,
        softcap=softcap,
        sink_logits=sink_logits,
        on_selection=on_selection,
    )
