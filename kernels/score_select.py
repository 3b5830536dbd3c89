"""Score and select at decode: the top-p set of each query row as an ascending list (PAPER sections 4 and 5).

    s(m, n) = iq(m) . ik(n)        the set: the fewest blocks whose softmax(s(m, .)) mass reaches p (`top_p.py`)

The list holds *logical* block numbers: block b is the logical positions b * block_size to (b + 1) * block_size - 1.
Not for prefill, where the rows are many and share tiles of keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .append import append_head, append_index
from .common import HAS_TRITON, ceil_div, next_power_of_2, tl, triton, use_triton
from .count_assembly import count_assembly, count_constraints, counts_by_assembly
from .kv_quant import kv_limit
from .launches import launch_options
from .list_assembly import LIST_CONSTRAINTS, list_assembly
from .ptx import sums_over_warps
from .selection import Selection, select_top_p_reference
from .workspace import (
    HISTOGRAM_BINS,
    HISTOGRAM_SPAN,
    HISTOGRAM_ZERO,
    MIN_TILE_KEYS,
    DecodeWorkspace,
    head_table,
    num_processors,
)


class NewTokens(NamedTuple):
    """What `append_step` takes, for the launch that appends and selects at once; `index_key` is `[B, I, M, r]`."""

    key: torch.Tensor
    value: torch.Tensor
    index_key: torch.Tensor
    full_key: torch.Tensor
    full_value: torch.Tensor
    window_key: torch.Tensor
    window_value: torch.Tensor
    tables: tuple[int, ...]
    num_sinks: int
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


if HAS_TRITON:
    from .compact_range import compact_range, compact_range_by_assembly
    from .score_range import load_query, score_range

    @triton.jit
    def _score_select_kernel(
        p_query,
        p_key,
        p_scale,
        p_codes,
        p_tile_max,
        p_histogram,
        p_sums,
        p_peak,
        p_state,
        p_indices,
        p_counts,
        p_index_heads,
        p_length,
        p_start,
        p_new_key,
        p_new_value,
        p_new_index,
        p_full_key,
        p_full_value,
        p_key_scale,
        p_value_scale,
        p_window_key,
        p_window_value,
        p_tables,
        top_p,
        min_tokens,
        num_rows,
        per_split,
        num_items,
        num_kv_items,
        num_kv_heads,
        num_index,
        num_sinks,
        ring,
        num_heads,
        q_len,
        num_splits,
        stride_qb,
        stride_qh,
        stride_qm,
        stride_kb,
        stride_kh,
        stride_kn,
        stride_sb,
        stride_sh,
        stride_sn,
        stride_codes,
        stride_tiles,
        stride_indices,
        stride_nkb,
        stride_nkh,
        stride_nkn,
        stride_nvb,
        stride_nvh,
        stride_nvn,
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
        stride_wkb,
        stride_wkh,
        stride_wkn,
        stride_wvb,
        stride_wvh,
        stride_wvn,
        HEAD: tl.constexpr,
        PADDED: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
        BINS: tl.constexpr,
        SPAN: tl.constexpr,
        ZERO: tl.constexpr,
        STEPS: tl.constexpr,
        TILES: tl.constexpr,
        WORDS: tl.constexpr,
        SPLITS: tl.constexpr,
        POPC: tl.constexpr,
        SPLIT_QUERY: tl.constexpr,
        INT8: tl.constexpr,
        CONTIGUOUS: tl.constexpr,
        HAS_START: tl.constexpr,
        BATCHED: tl.constexpr,
        SCORE: tl.constexpr,
        COMPACT: tl.constexpr,
        PDL: tl.constexpr,
        STAGES: tl.constexpr,
        COUNTING: tl.constexpr,
        CONSTRAINTS: tl.constexpr,
        LISTING: tl.constexpr,
        LIST_CONSTRAINTS: tl.constexpr,
        THREADS: tl.constexpr,
        ELEMENTS: tl.constexpr,
        APPEND: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        KV_LIMIT: tl.constexpr,
        MIN_TILE: tl.constexpr,
        GROUP: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """Two phases, a launch each. SCORE: CTA (query row, split) scores its share of the keys. COMPACT: it
        lists the selected units of that share, once the whole row is scored.

        With APPEND the step's tokens are written by SCORE, in further CTAs; no other one reads them back.
        `per_split` is 2^32 / num_splits, rounded up: a number below 2^23 is divided by one product.
        """
        i_row = ((tl.program_id(0) * tl.cast(per_split, tl.int64)) >> 32).to(tl.int32)
        i_split = tl.program_id(0) - i_row * num_splits
        i_query = i_row % q_len
        i_head = i_row // q_len
        i_batch = (i_row * 0).to(tl.int64)
        if BATCHED:
            i_batch += i_head // num_heads
            i_head = i_head % num_heads
        is_row = i_row < num_rows
        # a table, which no kernel writes
        i_key = tl.load(p_index_heads + i_head, mask=is_row, other=0).to(tl.int64)
        if PDL:
            # what follows COMPACT may start beside SCORE already: it has work that needs neither
            if SCORE:
                tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        # two histograms a row, in turn: one is used while the other is cleared for the next call. A row's state is the
        # turn of this call, which SCORE leaves for COMPACT, and that of the next
        p_turn = p_state + i_row * 2
        p_query += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + i_query * stride_qm
        # all that is fetched is on its way before the first of it is looked at
        if SCORE:
            b_line, b_matrix = load_query(p_query, tl.where(is_row, HEAD, 0), PADDED, LANES)
            turn = tl.load(p_turn + 1, mask=is_row, other=0)
        # COMPACT reads these before it waits: SCORE has waited for whatever wrote them
        length = tl.load(p_length, cache_modifier=".cg").to(tl.int32)
        begin = i_row * 0
        if HAS_START:
            begin = tl.load(p_start + i_batch, mask=is_row, other=0, cache_modifier=".cg").to(tl.int32)
        if APPEND and i_row >= num_rows:
            if SCORE:
                num_writers = tl.num_programs(0) - num_rows * num_splits
                for i_item in tl.range(tl.program_id(0) - num_rows * num_splits, num_items, num_writers):
                    if i_item >= num_kv_items:
                        append_index(
                            p_new_index,
                            p_key,
                            p_scale,
                            i_item - num_kv_items,
                            length,
                            num_index,
                            q_len,
                            stride_xb,
                            stride_xh,
                            stride_xn,
                            stride_kb,
                            stride_kh,
                            stride_kn,
                            stride_sb,
                            stride_sh,
                            stride_sn,
                            HEAD,
                            PADDED,
                            INT8,
                        )
                    else:
                        append_head(
                            p_new_key,
                            p_new_value,
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
                            stride_nkb,
                            stride_nkh,
                            stride_nkn,
                            stride_nvb,
                            stride_nvh,
                            stride_nvn,
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
            return
        # keys up to the row's own, counted from the first real token
        num_seen = tl.maximum(length - begin - (q_len - 1 - i_query), 0)
        num_units = tl.cdiv(num_seen, BLOCK)
        # equal shares of the keys, in the smallest tiles that there are
        num_shared = tl.cdiv(num_seen, MIN_TILE)
        share = ((num_shared * tl.cast(per_split, tl.int64)) >> 32).to(tl.int32)
        longer = num_shared - share * num_splits
        first_key = (share * i_split + tl.minimum(i_split, longer)) * MIN_TILE
        last_key = first_key + (share + (i_split < longer).to(tl.int32)) * MIN_TILE
        i_long = i_row.to(tl.int64)
        p_codes += i_long * stride_codes
        p_tile_max += i_long * stride_tiles
        p_sums += i_long * num_splits * BINS
        p_peak += i_long * num_splits
        if COMPACT:
            if PDL:
                tl.extra.cuda.gdc_wait()
            turn = tl.load(p_turn)
        p_cleared = p_histogram + (i_long * 2 + 1 - turn) * SPAN
        p_histogram += (i_long * 2 + turn) * SPAN
        if SCORE:
            for i_bin in tl.range(i_split * BINS, SPAN, num_splits * BINS):
                tl.store(p_cleared + i_bin + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int32))
            score_range(
                b_line,
                b_matrix,
                p_query,
                p_key + i_batch * stride_kb + i_key * stride_kh + tl.cast(begin, tl.int64) * stride_kn,
                p_scale + i_batch * stride_sb + i_key * stride_sh + begin * stride_sn,
                p_codes,
                p_tile_max,
                p_histogram,
                p_sums + i_split * BINS,
                p_peak + i_split,
                p_new_index + i_batch * stride_xb + i_key * stride_xh,
                i_query + 1,
                num_seen,
                first_key,
                last_key,
                stride_kn,
                stride_sn,
                stride_xn,
                HEAD,
                PADDED,
                ROWS,
                LANES,
                BLOCK,
                BINS,
                SPAN,
                ZERO,
                STEPS,
                SPLIT_QUERY,
                INT8,
                CONTIGUOUS,
                STAGES,
                COUNTING,
                CONSTRAINTS,
                ELEMENTS,
                APPEND,
                MIN_TILE,
                GROUP,
                WHOLE,
            )
        if COMPACT:
            # the last block may be short: count it as such, so that the floor holds whichever blocks are taken
            tail = num_seen - (num_units - 1) * BLOCK
            wanted = tl.minimum(tl.cdiv(min_tokens + BLOCK - tail, BLOCK), num_units)
            p_tile_max += first_key // MIN_TILE
            p_indices += i_long * stride_indices
            first = first_key // BLOCK
            stop = tl.minimum(last_key // BLOCK, num_units)
            if LISTING == "":
                compact_range(
                    p_codes,
                    p_tile_max,
                    p_histogram,
                    p_sums,
                    p_peak,
                    p_indices,
                    p_counts + i_row,
                    num_units,
                    wanted,
                    top_p,
                    i_split,
                    num_splits,
                    first,
                    stop,
                    GROUP,
                    GROUP * BLOCK // MIN_TILE,
                    BINS,
                    ZERO,
                    STEPS,
                    TILES,
                    WORDS,
                    SPLITS,
                    POPC,
                )
            else:
                compact_range_by_assembly(
                    p_codes,
                    p_tile_max,
                    p_histogram,
                    p_sums,
                    p_peak,
                    p_indices,
                    p_counts + i_row,
                    num_units,
                    wanted,
                    top_p,
                    i_split,
                    num_splits,
                    first,
                    stop,
                    LISTING,
                    LIST_CONSTRAINTS,
                    THREADS,
                    ZERO,
                )
        if i_split == 0:
            if SCORE:
                tl.store(p_turn, turn)
            else:
                tl.store(p_turn + 1, 1 - turn)

    @triton.jit
    def _select_all_kernel(
        p_indices,
        p_counts,
        p_length,
        p_start,
        num_rows_per_batch,
        q_len,
        num_splits,
        stride_indices,
        BLOCK: tl.constexpr,
        HAS_START: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """top_p = 1: every block that the row sees."""
        i_row = tl.program_id(0) // num_splits
        i_split = tl.program_id(0) % num_splits
        begin = i_row * 0
        if HAS_START:
            begin = tl.load(p_start + i_row // num_rows_per_batch).to(tl.int32)
        num_seen = tl.maximum(tl.load(p_length).to(tl.int32) - begin - (q_len - 1 - i_row % q_len), 0)
        num_units = tl.cdiv(num_seen, BLOCK)
        for i_first in tl.range(i_split * WIDTH, num_units, num_splits * WIDTH):
            o_unit = i_first + tl.arange(0, WIDTH)
            tl.store(p_indices + i_row.to(tl.int64) * stride_indices + o_unit, o_unit, mask=o_unit < num_units)
        if i_split == 0:
            tl.store(p_counts + i_row, num_units)


# measured on an H100 with Triton 3.6: CTAs a multiprocessor holds, numbers in a tile of keys, keys that one row of a
# product scores, warps (fewer where a tile has too few rows for them), pipeline stages, registers of a thread
_SCORE_CONFIG = {
    "ctas": 2,
    "tile_numbers": 16384,
    "lanes": 8,
    "warps": 8,
    "stages": 3,
    "registers": 96,
    "writers": 8,
}
# of COMPACT: warps, up to a number of units that a CTA lists. With few registers its CTAs find room beside SCORE's, and
# those of the attention beside both; without assembly it may spill a little
_LIST_WARPS = ((8192, 4), (1 << 31, 8))
_LIST_REGISTERS = {"assembly": 64, "compiler": 88}
_STEPS = 8


@lru_cache(maxsize=64)
def _score_stages(device: torch.device) -> int:
    """Pipeline stages of SCORE, so that as many tiles are in shared memory as were when it was measured.

    Triton 3.8 and later multiply from there on Hopper while the next tile comes, which takes room for one more.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    newer = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
    return _SCORE_CONFIG["stages"] - (hopper and newer)


def check_select(
    index_query: torch.Tensor, index_key: torch.Tensor, index_heads: tuple[int, ...], block_size: int
) -> None:
    if index_query.dim() != 4 or index_query.shape[1] != len(index_heads):
        raise ValueError(
            f"index_query must be [B, {len(index_heads)}, M, r] for {len(index_heads)} index_heads, "
            f"got {tuple(index_query.shape)}"
        )
    if index_key.dim() != 4 or index_key.shape[3] != index_query.shape[3]:
        raise ValueError(
            f"index_key must be [B, I, C, {index_query.shape[3]}] as index_query is {tuple(index_query.shape)}, "
            f"got {tuple(index_key.shape)}"
        )
    if block_size not in (1, 16, 32, 64):
        raise ValueError(f"block_size must be 1, 16, 32 or 64, got {block_size}")


def select_top_p(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    index_scale: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    backend: str = "auto",
) -> Selection:
    """The top-p set of every query row of a decode step, without a host synchronisation.

    Args:
        index_query: `[B, n, M, r]`, one head for each listed retrieval head; r from 4 to 64.
        index_key: `[B, I, C, r]`, slot-ordered, or int8 with `index_scale`.
        index_heads: for each of the n heads its row of `index_key`.
        length: int32 device tensor `[1]`: slots in use, this step's M tokens included; row m sits in slot
            `length - M + m` and sees the slots up to its own.
        start: int `[B]`, slot of each row's first real token; None: no padding.
        top_p: mass to reach, in (0, 1]; 1 selects everything. min_tokens: floor on the number of tokens.
        block_size: 1, 16, 32 or 64 tokens, aligned to logical positions.
        index_scale: `[B, I, C]`, the scale of each int8 key.
        workspace: its buffers hold the result; None allocates.
        backend: "auto" (Triton for half precision on CUDA), "triton" or "reference".

    Returns:
        A `Selection`; `indices` is `[B, n, M, K]`. The reference gives the smallest set. Triton reckons masses by
        bins of 1/8 octave, from the safe side: the mass is never under p nor the count under the floor, and the set
        lies within the smallest set for the mass p' = 1.19 p / (1 + 0.19 p) (0.914 for 0.9), whole bins taken.
        Tokens more than 31 octaves (2e9 times) below the best one count as ties, and so do scores above 133 or below
        -110.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
    """
    check_select(index_query, index_key, index_heads, block_size)
    if not use_triton(backend, index_query):
        return select_top_p_reference(
            index_query,
            index_key,
            index_heads=index_heads,
            length=length,
            start=start,
            top_p=top_p,
            min_tokens=min_tokens,
            block_size=block_size,
            index_scale=index_scale,
        )
    return launch_select(
        index_query, index_key, index_heads, length, start, top_p, min_tokens, block_size, index_scale, workspace
    )


def launch_select(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    index_heads: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    index_scale: torch.Tensor | None,
    workspace: DecodeWorkspace | None,
    new_tokens: NewTokens | None = None,
) -> Selection:
    batch, heads, q_len, head = index_query.shape
    capacity, device = index_key.shape[2], index_query.device
    rows = batch * heads * q_len
    blocks = ceil_div(capacity, block_size)
    if workspace is None:
        workspace = DecodeWorkspace(
            batch=batch,
            retrieval_heads=heads,
            queries=q_len,
            capacity=capacity,
            query_heads=1,
            kv_heads=1,
            head_dim=1,
            block_size=block_size,
            device=device,
        )
    # 16 codes are fetched at once
    code_stride = 16 * ceil_div(blocks, 16)
    if rows > workspace.rows or rows * blocks > workspace.indices.numel():
        raise ValueError(
            f"the workspace holds {workspace.rows} rows and {workspace.indices.numel()} blocks, this step has {rows} "
            f"rows of {blocks} blocks; make it with the step's batch, heads, queries, capacity and block_size"
        )
    selection = Selection(
        workspace.indices[: rows * blocks].view(batch, heads, q_len, blocks),
        workspace.counts[:rows].view(batch, heads, q_len),
    )
    if index_query.stride(3) != 1:
        index_query = index_query.contiguous()
    on_gpu = index_query.is_cuda
    padded = max(next_power_of_2(head), 4)
    lanes = _SCORE_CONFIG["lanes"]
    # in the interpreter two of the smallest tiles, so that shares end within one
    tile_numbers = _SCORE_CONFIG["tile_numbers"] if on_gpu else 2 * MIN_TILE_KEYS * padded
    tile_rows = max(min(tile_numbers // padded, MIN_TILE_KEYS * _SCORE_CONFIG["warps"]), MIN_TILE_KEYS) // lanes
    tile = tile_rows * lanes
    score_warps = min(_SCORE_CONFIG["warps"], max(tile_rows // 16, 4))
    slots = _SCORE_CONFIG["ctas"] * num_processors(device)
    items = kv_items = 0
    if new_tokens is not None:
        kv_items = batch * new_tokens.key.shape[1] * q_len
        items = kv_items + batch * index_key.shape[1] * q_len
    writers = min(items, _SCORE_CONFIG["writers"])
    # with 8-bit keys less than a tile takes a CTA as long as a whole one
    least = tile if index_scale is not None else max(tile // 2, MIN_TILE_KEYS)
    splits = max(1, min((slots - writers) // rows, ceil_div(capacity, least)))
    first_slot = length if start is None else start
    if top_p >= 1.0:
        _select_all_kernel[(rows * splits,)](
            selection.indices,
            selection.counts,
            length,
            first_slot,
            heads * q_len,
            q_len,
            splits,
            blocks,
            BLOCK=block_size,
            HAS_START=start is not None,
            WIDTH=1024 if on_gpu else 64,
        )
        return selection
    # units that share the maximum from which their codes count: the keys of one warp, or a whole tile's blocks
    group = MIN_TILE_KEYS if block_size == 1 else tile // block_size
    list_warps = next(warps for most, warps in _LIST_WARPS if blocks // splits <= most)
    list_units = 1024 if on_gpu else 64
    threads = 32 * score_warps
    elements = max(tile // threads, 1)
    # counting by hand needs each score in one thread only, and a warp's in one group: tensor cores, with 16 rows
    # a warp, leave them so
    rows_of_16 = tile == MIN_TILE_KEYS * score_warps and index_key.dtype != torch.float32
    counting = block_size == 1 and rows_of_16 and counts_by_assembly(device)
    listing = block_size == 1 and sums_over_warps(device)
    scale = index_key if index_scale is None else index_scale
    # without an append the rest of the arguments is never read
    key = value = new_index = full_key = full_value = window_key = window_value = index_key
    tables, num_sinks = index_heads, 0
    key_scale = value_scale = None
    if new_tokens is not None:
        key, value, new_index, full_key, full_value, window_key, window_value, tables, num_sinks = new_tokens[:9]
        key_scale, value_scale = new_tokens.key_scale, new_tokens.value_scale
    arguments = (
        index_query,
        index_key,
        scale,
        workspace.codes,
        workspace.tile_max,
        workspace.histogram,
        workspace.sums,
        workspace.peak,
        workspace.state,
        selection.indices,
        selection.counts,
        head_table(index_heads, device),
        length,
        first_slot,
        key,
        value,
        new_index,
        full_key,
        full_value,
        full_key if key_scale is None else key_scale,
        full_value if value_scale is None else value_scale,
        window_key,
        window_value,
        head_table(tables, device),
        float(top_p),
        min_tokens,
        rows,
        ceil_div(1 << 32, splits),
        items,
        kv_items,
        key.shape[1],
        index_key.shape[1],
        num_sinks,
        max(window_key.shape[2] - num_sinks, 1),
        heads,
        q_len,
        splits,
        index_query.stride(0),
        index_query.stride(1),
        index_query.stride(2),
        index_key.stride(0),
        index_key.stride(1),
        index_key.stride(2),
        scale.stride(0),
        scale.stride(1),
        scale.stride(2),
        code_stride,
        workspace.tiles,
        blocks,
        *key.stride()[:3],
        *value.stride()[:3],
        *new_index.stride()[:3],
        *full_key.stride()[:3],
        *full_value.stride()[:3],
        *((0, 0) if key_scale is None else key_scale.stride()[:2]),
        *window_key.stride()[:3],
        *window_value.stride()[:3],
    )
    constants = {
        "HEAD": head,
        "PADDED": padded,
        "ROWS": tile_rows,
        "LANES": lanes,
        "BLOCK": block_size,
        "BINS": HISTOGRAM_BINS,
        "SPAN": HISTOGRAM_SPAN,
        "ZERO": HISTOGRAM_ZERO,
        "STEPS": _STEPS,
        "TILES": max(1, list_units // (2 * group)),
        "WORDS": list_units // 32,
        "SPLITS": next_power_of_2(splits),
        "POPC": on_gpu and torch.version.hip is None,
        "SPLIT_QUERY": index_query.dtype == torch.float32 and index_key.dtype != torch.float32,
        "INT8": index_scale is not None,
        "CONTIGUOUS": index_key.stride(2) == head == padded,
        "HAS_START": start is not None,
        "BATCHED": batch > 1,
        "STAGES": _score_stages(device),
        "COUNTING": (
            count_assembly(threads, elements, HISTOGRAM_BINS, HISTOGRAM_SPAN, HISTOGRAM_ZERO) if counting else ""
        ),
        "CONSTRAINTS": count_constraints(elements) if counting else "",
        "LISTING": (
            list_assembly(32 * list_warps, splits, HISTOGRAM_BINS, _STEPS, HISTOGRAM_ZERO, group) if listing else ""
        ),
        "LIST_CONSTRAINTS": LIST_CONSTRAINTS if listing else "",
        "THREADS": 32 * list_warps,
        "ELEMENTS": elements,
        "APPEND": new_tokens is not None,
        "HEAD_DIM": key.shape[3],
        "BLOCK_D": next_power_of_2(key.shape[3]),
        "MIN_TILE": MIN_TILE_KEYS,
        "GROUP": group,
        # codes that are written together, all of one share; past the last key there are some that no one reads
        "WHOLE": min(4, MIN_TILE_KEYS // block_size),
        "KV_LIMIT": 0.0 if key_scale is None else kv_limit(full_key),
    }
    phases = (
        ("SCORE", rows * splits + writers, score_warps, _SCORE_CONFIG["registers"]),
        ("COMPACT", rows * splits, list_warps, _LIST_REGISTERS["assembly" if listing else "compiler"]),
    )
    for phase, ctas, warps, registers in phases:
        own = {"SCORE": phase == "SCORE", "COMPACT": phase == "COMPACT", "num_warps": warps, "maxnreg": registers}
        _score_select_kernel[(ctas,)](*arguments, **constants, **own, **launch_options(device))
    return selection
