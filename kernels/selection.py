"""The set of blocks that each query row of a decode step reads, as lists: the form, and how the reference makes it.

The lists hold *logical* block numbers: block b is the logical positions b * block_size to (b + 1) * block_size - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .common import ceil_div, starts
from .top_p import index_scores_reference, top_p_set_reference


class Selection(NamedTuple):
    """The selected blocks of every query row of a decode step.

    indices: int32 `[B, n, M, K]`, ascending logical block numbers; only the first `counts` of a row count.
    counts: int32 `[B, n, M]`.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def selection_mask(
    selection: Selection,
    *,
    num_slots: int,
    block_size: int,
    q_slots: torch.Tensor,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bool mask `[B, n, M, num_slots]` of the slots that a selection stands for (for tests and reports).

    Args:
        q_slots: int64 `[M]`, the slot of each query row: nothing after it is seen.
        start: `[B]` slot of the first real token; None: no padding.
    """
    indices, counts = selection
    batch, device = indices.shape[0], indices.device
    blocks = ceil_div(num_slots, block_size)
    listed = torch.arange(indices.shape[-1], device=device) < counts[..., None]
    # entries past the count go to a column that is dropped
    column = torch.where(listed, indices.long(), blocks)
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=device).scatter_(-1, column, True)
    slots = torch.arange(num_slots, device=device)
    position = slots - starts(start, batch, device)[:, None]
    block = position.clamp_min(0).div(block_size, rounding_mode="floor")[:, None, None]
    picked = chosen.gather(-1, block.expand(*counts.shape, num_slots))
    return picked & (position >= 0)[:, None, None] & (slots <= q_slots[:, None])


def select_top_p_reference(
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
) -> Selection:
    """The contract of `select_top_p`: the exact smallest set, in fp32; reads `length` on the host."""
    batch, _, q_len, _ = index_query.shape
    end, device = int(length), index_query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(end, device=device)
    keys = index_key[:, list(index_heads), :end].float()
    if index_scale is not None:
        keys = keys * index_scale[:, list(index_heads), :end, None].float()
    scores = index_scores_reference(index_query, keys)
    q_slots = torch.arange(end - q_len, end, device=device)
    # [B, 1, M, slots]
    valid = ((slots <= q_slots[:, None]) & (slots >= first_slot[:, None, None]))[:, None]
    chosen = top_p_set_reference(scores, valid, top_p=top_p, min_tokens=min_tokens, block_size=block_size, start=start)
    blocks = max(ceil_div(end, block_size), 1)
    position = (slots - first_slot[:, None]).clamp_min(0)
    block = position.div(block_size, rounding_mode="floor")[:, None, None].expand_as(chosen)
    taken = torch.zeros(*chosen.shape[:-1], blocks, dtype=torch.uint8, device=device)
    taken.scatter_reduce_(-1, block, chosen.to(torch.uint8), "amax")
    rank = taken.cumsum(-1)
    counts = rank[..., -1].to(torch.int32)
    # blocks that are not taken all write to a last column that is dropped
    target = torch.where(taken.bool(), rank - 1, blocks)
    numbers = torch.arange(blocks, dtype=torch.int32, device=device).expand_as(target)
    indices = torch.zeros(*counts.shape, blocks + 1, dtype=torch.int32, device=device)
    return Selection(indices.scatter_(-1, target, numbers)[..., :blocks], counts)
