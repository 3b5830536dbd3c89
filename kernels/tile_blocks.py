"""Which key blocks a tile of prefill queries reads (beyond the paper: the index selects for prefill rows as well).

Queries are cut into tiles of `TILE` slots and keys into blocks of `BLOCK` slots, both counted from slot 0. A tile is
represented by the last of each `GROUP` aligned rows (of `FAR_GROUP`, if it begins at slot `FAR` or later), with their
own index queries iq(m); the tile's last row is one of them, also where a prompt ends inside a tile, and counts twice,
since after the last row of a prompt comes the answer.
A block's keys are dealt out to `CELLS` cells, slot n to cell n % CELLS, and each cell counts as its best key: with

    size_m(j) = sum over cells c of exp(max of iq(m) . ik(n) over the keys n of cell c of block j)     n real, n <= m
    mass(j)   = weighted mean over the representing rows m of size_m(j) / sum_i size_m(i)

the list of a tile of one head is

    forced:    blocks of the first `num_sinks` real tokens, the tile's own blocks, `RECENT_BLOCKS` before the tile
    selected:  the smallest set of earlier blocks that brings forced + selected to the mass 1 - MISSED * (1 - p) and to
               `min_tokens` slots. Blocks that tie with the last one all enter.

That is a relaxation of the token-wise contract (`top_p.py`), where each row's own set reaches p: the mass is promised
to the representing rows on average, and a row may miss what only it and few others ask for. A block that holds more
than `MISSED * (1 - p)` of the average is never left out: with p = 0.9 none that holds 60 % of the last row's mass, or
32 % beyond `FAR`. Why rows and not their mean query, and why `MISSED`: docs/sparse_prefill.md has the figures.

A row never attends to later keys, but which earlier blocks it reads depends on the later rows of its tile: a prompt
that ends inside a tile and its continuation in one forward may differ in that tile's rows.

Slots, not logical positions, are cut: prefill in chunks whose bounds are multiples of `TILE` selects as one forward
does. A chunk that begins inside a tile selects for the rest of that tile without the rows that came before.
Likewise a left-padded row is cut elsewhere than the same row alone, unless its padding is a multiple of `TILE`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .common import HAS_TRITON, ceil_div, next_power_of_2, row_tiles, starts, tl, triton

TILE, BLOCK, RECENT_BLOCKS = 128, 32, 4
# rows that one of them represents, in tiles that begin before slot FAR and in those after
GROUP, FAR_GROUP, FAR = 8, 16, 1 << 18
# of a block, each counted as its best key; and of the mass that p lets a row miss, what a tile may miss on average
CELLS, MISSED = 8, 0.7
# blocks whose places in a list are found at a time
CHUNK = 1024
# of the scoring kernel: representing rows and blocks of a program (steps x columns, columns in eights), keys of a
# product, warps, pipeline stages
MASS_LAUNCH = {"rows": 64, "columns": 8, "steps": 8, "keys": 64, "warps": 4, "stages": 3}


def tile_range(q_start: int, q_len: int) -> tuple[int, int]:
    """The number of the first tile that the rows touch, and how many they touch."""
    first = q_start // TILE
    return first, ceil_div(q_start + q_len, TILE) - first


def group_rows(q_start: int) -> int:
    """Rows that one of them represents, in the tile of slot `q_start`."""
    return GROUP if q_start < FAR else FAR_GROUP


def representing_rows(q_start: int, q_len: int, device: torch.device) -> torch.Tensor:
    """Slot of each tile's representing rows, int64 `[tiles, groups]`; groups beyond the end give the last slot.

    For rows on one side of slot FAR.
    """
    first, tiles = tile_range(q_start, q_len)
    size = group_rows(q_start)
    group = torch.arange(first * TILE // size, (first + tiles) * TILE // size, device=device).view(tiles, -1)
    return ((group + 1) * size).clamp_max(q_start + q_len) - 1


def mass_bytes(q_start: int, end: int) -> int:
    """What `select_tile_blocks` stores for a tile of one head, in a call from slot `q_start` to slot `end`."""
    return 4 * TILE // group_rows(q_start) * ceil_div(end, BLOCK)


def empty_lists(rows: tuple[int, int], tiles: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for ascending int32 lists `[B, n, tiles, blocks]` and their counts `[B, n, tiles]`; rows: B and n."""
    indices = torch.empty(*rows, tiles, ceil_div(end, BLOCK), dtype=torch.int32, device=device)
    return indices, torch.empty(*rows, tiles, dtype=torch.int32, device=device)


def _sampled(index_query: torch.Tensor, rows: torch.Tensor, q_start: int) -> torch.Tensor:
    """`[B, n, tiles * groups, r]` of `[B, n, M, r]`; groups before `q_start` give row 0."""
    return index_query[:, :, (rows.flatten() - q_start).clamp_min(0)]


def _forced_and_earlier(tiles: torch.Tensor, blocks: int, first: torch.Tensor, end: int, num_sinks: int):
    """Bool `[B, tiles, blocks]`: what is always read, and what may be selected."""
    block = torch.arange(blocks, device=tiles.device)
    own = (tiles * (TILE // BLOCK))[None, :, None]
    last = ((tiles + 1) * TILE).clamp_max(end).sub(1).div(BLOCK, rounding_mode="floor")[None, :, None]
    first = first[:, None, None]
    seen = (block <= last) & ((block + 1) * BLOCK > first)
    earlier = seen & (block < own - RECENT_BLOCKS)
    sinks = (block * BLOCK < first + num_sinks) & (num_sinks > 0)
    forced = seen & (~earlier | sinks)
    return forced, earlier & ~forced


def tile_blocks_reference(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    index_heads: torch.Tensor,
    top_p: float,
    min_tokens: int,
    num_sinks: int,
    q_start: int = 0,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract: bool `[B, n, tiles, blocks]`, whether a tile reads a block; fp32 inside.

    Args:
        index_query: `[B, n, M, r]`, row m at slot `q_start + m`. index_key: `[B, I, N, r]`, N >= q_start + M.
        index_heads: int64 `[n]`, rows of `index_key`.
        top_p: p, in (0, 1]; 1 reads everything. min_tokens: floor on the slots read by a row.
        num_sinks: first real tokens whose blocks are always read. start: `[B]` slot of each first real token.
    """
    batch, heads, q_len, _ = index_query.shape
    device, end = index_query.device, q_start + q_len
    if q_start < FAR < end:
        options = {"index_heads": index_heads, "top_p": top_p, "min_tokens": min_tokens, "num_sinks": num_sinks}
        cut = FAR - q_start
        near = tile_blocks_reference(index_query[:, :, :cut], index_key, q_start=q_start, start=start, **options)
        far = tile_blocks_reference(index_query[:, :, cut:], index_key, q_start=FAR, start=start, **options)
        return torch.cat([F.pad(near, (0, far.shape[3] - near.shape[3])), far], 2)
    first = starts(start, batch, device)
    first_tile, tiles = tile_range(q_start, q_len)
    blocks = ceil_div(end, BLOCK)
    rows = representing_rows(q_start, q_len, device)
    groups = rows.shape[1]
    queries = _sampled(index_query, rows, q_start).float()
    # a group lives if it holds real rows of this call
    numbers = torch.arange(tiles, device=device) + first_tile
    begin = numbers[:, None] * TILE + torch.arange(0, TILE, TILE // groups, device=device)
    alive = (begin < end) & (rows >= q_start) & (rows >= first[:, None, None])
    last = (numbers + 1).mul(TILE).clamp_max(end) - 1
    weight = (alive * (1.0 + (rows == last[:, None])))[:, None, :, :, None]
    keys = index_key[:, index_heads, :end].float()
    slots = torch.arange(end, device=device)
    chosen = torch.empty(batch, heads, tiles, blocks, dtype=torch.bool, device=device)
    for part in row_tiles(tiles, groups * batch * heads * end):
        valid = (slots <= rows[part, :, None]) & (slots >= first[:, None, None, None])
        scores = torch.matmul(queries[:, :, part.start * groups : part.stop * groups], keys.transpose(-1, -2))
        scores = scores.unflatten(2, (-1, groups)).masked_fill(~valid[:, None], -torch.inf)
        scores = F.pad(scores, (0, blocks * BLOCK - end), value=-torch.inf)
        # [B, n, tiles, groups, blocks, CELLS]
        best = scores.unflatten(-1, (blocks, BLOCK // CELLS, CELLS)).amax(-2)
        mass = torch.softmax(best.flatten(-2), -1).nan_to_num(0.0).view(best.shape).sum(-1)
        mass = (mass * weight[:, :, part]).sum(3) / weight[:, :, part].sum(3).clamp_min(1)
        forced, earlier = (mask[:, None] for mask in _forced_and_earlier(numbers[part], blocks, first, end, num_sinks))
        chosen[:, :, part] = forced | _smallest_set(mass, forced, earlier, tile_p(top_p), ceil_div(min_tokens, BLOCK))
    return chosen


def tile_p(top_p: float) -> float:
    """The mass that a tile's list must hold, mean over its representing rows."""
    return 1.0 - MISSED * (1.0 - top_p)


def _smallest_set(
    mass: torch.Tensor, forced: torch.Tensor, earlier: torch.Tensor, top_p: float, min_blocks: int
) -> torch.Tensor:
    """Blocks of `earlier` that bring each row of `mass` to its goals, given what `forced` holds."""
    earlier = earlier.expand_as(mass)
    if top_p >= 1.0:
        return earlier
    goal = top_p * mass.sum(-1, keepdim=True) - (mass * forced).sum(-1, keepdim=True)
    values = mass.masked_fill(~earlier, -1.0).sort(dim=-1, descending=True).values
    before = values.clamp_min(0).cumsum(-1) - values.clamp_min(0)
    count = torch.arange(mass.shape[-1], device=mass.device) + forced.sum(-1, keepdim=True)
    wanted = ((before < goal) | (count < min_blocks)) & (values >= 0)
    size = wanted.sum(-1, keepdim=True)
    level = values.gather(-1, (size - 1).clamp_min(0))
    return (mass >= level) & earlier & (size > 0)


if HAS_TRITON:

    @triton.jit
    def _four_masses(
        b_q,
        p_kh,
        o_r,
        o_column,
        slot,
        stride_kn,
        high,
        limit,
        first,
        masked,
        DIM: tl.constexpr,
        BLOCK_N: tl.constexpr,
        CELL_COUNT: tl.constexpr,
        KEYS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """log2 of the sizes `[BLOCK_G, 4]` of four blocks for each row of `b_q`, KEYS / 4 keys of each at a time."""
        RUN: tl.constexpr = KEYS // 4
        # [BLOCK_G, CELLS / 2, 4, 2]: the best keys of the blocks' cells
        b_best = tl.full([b_q.shape[0], CELL_COUNT // 2, 4, 2], float("-inf"), tl.float32)
        for i_run in tl.static_range(BLOCK_N // RUN):
            o_n = slot + i_run * RUN + o_column
            # [KEYS, BLOCK_R]
            b_k = tl.load(
                p_kh + o_n.to(tl.int64)[:, None] * stride_kn + o_r[None, :],
                mask=(o_n < high)[:, None] & (o_r < DIM)[None, :],
                other=0.0,
            )
            # [BLOCK_G, KEYS]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if masked:
                b_s = tl.where((o_n[None, :] < limit[:, None]) & (o_n >= first)[None, :], b_s, float("-inf"))
            b_s = tl.reshape(b_s, (b_q.shape[0], RUN // CELL_COUNT, CELL_COUNT // 2, 4, 2))
            b_best = tl.maximum(b_best, tl.max(b_s, 1))
        # in units of log2
        b_best = b_best * 1.4426950408889634
        b_top = tl.maximum(tl.max(tl.max(b_best, 3), 1), -1.0e30)
        b_sum = tl.sum(tl.sum(tl.exp2(b_best - b_top[:, None, :, None]), 3), 1)
        return tl.log2(b_sum) + b_top

    @triton.jit(do_not_specialize=["num_heads", "groups", "blocks", "first_tile", "end"])
    def _block_mass_kernel(
        p_q,
        p_k,
        p_heads,
        p_start,
        p_mass,
        stride_kb,
        stride_kh,
        stride_kn,
        num_heads,
        groups,
        blocks,
        first_tile,
        end,
        HAS_START: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_N: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        CELL_COUNT: tl.constexpr,
        COLUMNS: tl.constexpr,
        STEPS: tl.constexpr,
        KEYS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """log2 of each block's size, for BLOCK_G representing rows and STEPS * COLUMNS blocks."""
        i_g = tl.program_id(0)
        i_split = tl.program_id(1)
        i_row = tl.program_id(2)
        i_b = (i_row // num_heads).to(tl.int64)
        i_head = tl.load(p_heads + i_row % num_heads).to(tl.int64)
        first = 0
        if HAS_START:
            first = tl.load(p_start + i_b).to(tl.int32)
        o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
        o_r = tl.arange(0, BLOCK_R)
        m_g = o_g < groups
        m_r = o_r < DIM
        # keys below `limit` are in sight of the row
        limit = tl.minimum(first_tile * TILE_ROWS + (o_g + 1) * GROUP_ROWS, end)
        low = tl.min(limit, 0)
        high = tl.max(tl.where(m_g, limit, 0), 0)
        o_row = i_row.to(tl.int64) * groups + o_g
        # [BLOCK_G, BLOCK_R]
        b_q = tl.load(p_q + o_row[:, None] * DIM + o_r[None, :], mask=m_g[:, None] & m_r[None, :], other=0.0)
        p_kh = p_k + i_b * stride_kb + i_head * stride_kh
        begin = i_split * STEPS * COLUMNS
        seen = (high + BLOCK_N - 1) // BLOCK_N
        steps = tl.minimum((tl.maximum(seen - begin, 0) + COLUMNS - 1) // COLUMNS, STEPS)
        # A thread holds columns 8 i + 2 t and 8 i + 2 t + 1 of a product. So that all keys of a block are one thread's,
        # column 8 i + 2 t + e is key 2 i + e of the t-th of four blocks, every second one: no sum crosses threads.
        o_k = tl.arange(0, KEYS)
        o_column = (o_k % 8 // 2) * (2 * BLOCK_N) + o_k // 8 * 2 + o_k % 2
        for i_step in tl.range(0, steps):
            block = begin + i_step * COLUMNS
            # some row does not see all of these keys
            masked = ((block + COLUMNS) * BLOCK_N > low) | (block * BLOCK_N < first)
            for i_eight in tl.static_range(COLUMNS // 8):
                # [BLOCK_G, 4] of even and of odd blocks: a thread has neighbours to store
                slot = (block + i_eight * 8) * BLOCK_N
                b_even = _four_masses(
                    b_q, p_kh, o_r, o_column, slot, stride_kn, high, limit, first, masked,
                    DIM, BLOCK_N, CELL_COUNT, KEYS, PRECISION,
                )  # fmt: skip
                b_odd = _four_masses(
                    b_q, p_kh, o_r, o_column, slot + BLOCK_N, stride_kn, high, limit, first, masked,
                    DIM, BLOCK_N, CELL_COUNT, KEYS, PRECISION,
                )  # fmt: skip
                o_block = block + i_eight * 8 + tl.arange(0, 8)
                tl.store(
                    p_mass + o_row[:, None] * blocks + o_block[None, :],
                    tl.reshape(tl.join(b_even, b_odd), (BLOCK_G, 8)),
                    mask=m_g[:, None] & (o_block < blocks)[None, :],
                )

    @triton.jit(
        do_not_specialize=["num_heads", "tiles", "blocks", "first_tile", "q_start", "end", "num_sinks", "min_blocks"]
    )
    def _select_kernel(
        p_mass,
        p_start,
        p_indices,
        p_counts,
        stride_it,
        stride_ih,
        stride_ch,
        num_heads,
        tiles,
        blocks,
        first_tile,
        q_start,
        end,
        num_sinks,
        min_blocks,
        goal_p,
        HAS_START: tl.constexpr,
        HAS_FLOOR: tl.constexpr,
        SIZE: tl.constexpr,
        PLACES: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        RECENT: tl.constexpr,
        STEPS: tl.constexpr,
    ):
        """The ascending block list of one tile of one head."""
        i_t = tl.program_id(0)
        i_row = tl.program_id(1)
        first = 0
        if HAS_START:
            first = tl.load(p_start + i_row // num_heads).to(tl.int32)
        begin = (first_tile + i_t) * TILE_ROWS
        stop = tl.minimum(begin + TILE_ROWS, end)
        o_j = tl.arange(0, SIZE)
        m_seen = (o_j * BLOCK_N < stop) & ((o_j + 1) * BLOCK_N > first)
        m_sinks = m_seen & (o_j * BLOCK_N < first + num_sinks) & (num_sinks > 0)
        m_forced = m_sinks | (m_seen & (o_j >= begin // BLOCK_N - RECENT))
        m_early = m_seen & (m_forced == 0)
        forced = tl.sum(m_forced.to(tl.int32), 0)
        parts: tl.constexpr = TILE_ROWS // GROUP_ROWS
        i_tile = i_row.to(tl.int64) * tiles + i_t
        # [SIZE], the sum of the rows' shares, and of their weights
        b_sum = tl.zeros([SIZE], tl.float32)
        weights = tl.zeros([], tl.float32)
        for i_g in tl.range(0, parts):
            rows = begin + i_g * GROUP_ROWS
            rows_end = tl.minimum(rows + GROUP_ROWS, stop)
            if (rows < stop) & (rows_end > tl.maximum(first, q_start)):
                # [SIZE]
                b_mass = tl.load(p_mass + (i_tile * parts + i_g) * blocks + o_j, mask=m_seen, other=float("-inf"))
                b_mass = tl.exp2(b_mass - tl.maximum(tl.max(b_mass, 0), -1.0e30))
                total = tl.sum(b_mass, 0)
                weight = tl.where(rows_end == stop, 2.0, 1.0)
                b_sum += b_mass * (weight / tl.where(total == 0.0, 1.0, total))
                weights += weight
        b_sum = b_sum * (1.0 / tl.maximum(weights, 1.0))
        goal = goal_p * tl.sum(b_sum, 0) - tl.sum(tl.where(m_forced, b_sum, 0.0), 0)
        b_sum = tl.where(m_early, b_sum, -1.0)
        # bisection over the bits of the level, to 1 part in 8000; everything is below the upper end
        low = tl.zeros([], tl.int32)
        high = tl.zeros([], tl.int32) + 0x3F801000
        for _ in tl.range(0, STEPS):
            middle = (low + high) // 2
            level = middle.to(tl.float32, bitcast=True)
            enough = tl.sum(tl.where(b_sum >= level, b_sum, 0.0), 0) >= goal
            if HAS_FLOOR:
                enough = enough & (tl.sum((b_sum >= level).to(tl.int32), 0) + forced >= min_blocks)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        low = tl.where(goal_p >= 1.0, 0, low)
        # ranks chunk by chunk: a prefix sum over all blocks would not fit into registers; the shares wait in the
        # tile's first row of masses, which has been read
        p_shares = p_mass + i_tile * parts * blocks
        tl.store(p_shares + o_j, b_sum, mask=o_j < blocks)
        tl.debug_barrier()
        level = low.to(tl.float32, bitcast=True)
        p_list = p_indices + i_row.to(tl.int64) * stride_ih + i_t.to(tl.int64) * stride_it
        count = tl.zeros([], tl.int32)
        for i_c in tl.range(0, (stop + PLACES * BLOCK_N - 1) // (PLACES * BLOCK_N)):
            o_c = i_c * PLACES + tl.arange(0, PLACES)
            m_list = (o_c * BLOCK_N < stop) & ((o_c + 1) * BLOCK_N > first)
            m_kept = ((o_c * BLOCK_N < first + num_sinks) & (num_sinks > 0)) | (o_c >= begin // BLOCK_N - RECENT)
            b_share = tl.load(p_shares + o_c, mask=m_list, other=-1.0)
            b_taken = (m_list & (m_kept | (b_share >= level))).to(tl.int32)
            o_rank = count + tl.cumsum(b_taken, 0) - 1
            tl.store(p_list + o_rank, o_c, mask=b_taken > 0)
            count += tl.sum(b_taken, 0)
        tl.store(p_counts + i_row.to(tl.int64) * stride_ch + i_t, count)

    def select_tile_blocks(
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        *,
        index_heads: torch.Tensor,
        top_p: float,
        min_tokens: int,
        num_sinks: int,
        q_start: int,
        start: torch.Tensor | None,
        indices: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        """`tile_blocks_reference` as lists, for rows on one side of slot FAR.

        `indices` and `counts`, of `empty_lists` or a range of their tiles, receive them. Stores fp32 masses, as many as
        `mass_bytes` says: the caller bounds the tiles of one call.
        """
        batch, heads, q_len, dim = index_query.shape
        device, end = index_query.device, q_start + q_len
        first_tile, tiles = tile_range(q_start, q_len)
        group = group_rows(q_start)
        blocks, groups = ceil_div(end, BLOCK), tiles * TILE // group
        sampled = _sampled(index_query, representing_rows(q_start, q_len, device), q_start).contiguous()
        mass = torch.empty(batch, heads, groups, blocks, dtype=torch.float32, device=device)
        launch = MASS_LAUNCH
        per_program = launch["columns"] * launch["steps"]
        grid = (ceil_div(groups, launch["rows"]), ceil_div(blocks, per_program), batch * heads)
        with torch.cuda.device_of(index_query):
            _block_mass_kernel[grid](
                sampled,
                index_key,
                index_heads,
                start,
                mass,
                *index_key.stride()[:3],
                heads,
                groups,
                blocks,
                first_tile,
                end,
                HAS_START=start is not None,
                DIM=dim,
                BLOCK_R=max(16, next_power_of_2(dim)),
                BLOCK_G=launch["rows"],
                BLOCK_N=BLOCK,
                TILE_ROWS=TILE,
                GROUP_ROWS=group,
                CELL_COUNT=CELLS,
                COLUMNS=launch["columns"],
                STEPS=launch["steps"],
                KEYS=min(launch["keys"], 4 * BLOCK),
                PRECISION="ieee",
                num_warps=launch["warps"],
                num_stages=launch["stages"],
            )
            size = next_power_of_2(blocks)
            _select_kernel[(tiles, batch * heads)](
                mass,
                start,
                indices,
                counts,
                indices.stride(2),
                indices.stride(1),
                counts.stride(1),
                heads,
                tiles,
                blocks,
                first_tile,
                q_start,
                end,
                num_sinks,
                ceil_div(min_tokens, BLOCK),
                tile_p(top_p),
                HAS_START=start is not None,
                HAS_FLOOR=min_tokens > 0,
                SIZE=size,
                PLACES=min(size, CHUNK),
                TILE_ROWS=TILE,
                GROUP_ROWS=group,
                BLOCK_N=BLOCK,
                RECENT=RECENT_BLOCKS,
                STEPS=20,
                num_warps=16 if size >= 8192 else 8 if size >= 2048 else 4,
            )
