"""Index scores and the dynamic top-p set of a query (PAPER sections 3 and 4).

    s_h(m, n) = iq_h(m) . ik(n)                 index keys are stored projected and, where they rotate, rotated
    S_h(m)    = the smallest set of positions n <= m whose softmax(s_h(m, .)) mass reaches p

by whole blocks of `block_size` logical positions (1: single tokens), ties broken towards later positions, and never
fewer than `min_tokens` tokens (or all, if there are fewer). Nothing else is forced into the set.
"""

from __future__ import annotations

import torch

from .common import ceil_div, starts


def index_scores_reference(
    index_query: torch.Tensor, index_key: torch.Tensor, *, heads: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 scores `[B, H, M, N]` of index queries `[B, H, M, r]` and keys `[B, K, N, r]`.

    `heads` maps each query head to its row of `index_key` (keys shared by a KV group); None: one key head each.
    """
    if heads is not None:
        index_key = index_key[:, heads]
    return torch.matmul(index_query.float(), index_key.float().transpose(-1, -2))


def _threshold(mass: torch.Tensor, weight: torch.Tensor | None, top_p: float, min_tokens: int):
    """The lowest mass that belongs to the set, and how many entries of exactly that mass it takes; `[..., 1]` each."""
    size = mass.shape[-1]
    width = min(size, max(256, min_tokens))
    while True:
        values, order = mass.topk(width, dim=-1)
        # entries outside the row's sight carry mass -1, to rank last; they add nothing
        values = values.clamp_min(0)
        total = values.cumsum(-1)
        tokens = torch.ones_like(values) if weight is None else weight.expand_as(mass).gather(-1, order)
        count = tokens.cumsum(-1)
        # entry i is in the set iff what stands before it has not reached both goals yet
        wanted = ((total - values) < top_p) | ((count - tokens) < min_tokens)
        if width == size or not bool(wanted[..., -1].any()):
            break
        width = min(size, width * 8)
    last = wanted.sum(-1, keepdim=True).clamp_min(1) - 1
    level = values.gather(-1, last)
    needed = last + 1 - (values > level).sum(-1, keepdim=True)
    return level, needed


def top_p_set_reference(
    scores: torch.Tensor,
    valid: torch.Tensor,
    *,
    top_p: float,
    min_tokens: int = 0,
    block_size: int = 1,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bool mask `[B, H, M, N]` of the selected slots.

    Args:
        scores: fp32 index scores `[B, H, M, N]` (natural-log units, scale included).
        valid: bool, broadcastable: the keys that the row may see (causal, not padding).
        top_p: mass to reach, in (0, 1]; 1 selects everything valid.
        min_tokens: floor on the number of tokens.
        block_size: selection granularity in tokens, aligned to logical positions.
        start: `[B]` slot of the first real token of each row; None: no padding.
    """
    valid = valid.expand_as(scores)
    if top_p >= 1.0:
        return valid.clone()
    scores = scores.masked_fill(~valid, float("-inf"))
    mass = torch.exp(scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min))
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if block_size == 1:
        # -1 keeps keys outside the row's sight below a valid key of zero mass
        return _select(mass.masked_fill(~valid, -1.0), None, top_p, min_tokens) & valid
    batch, size = scores.shape[0], scores.shape[-1]
    blocks = ceil_div(size, block_size)
    position = torch.arange(size, device=scores.device) - starts(start, batch, scores.device)[:, None]
    # padding goes to block 0 with no mass and no tokens
    block = position.clamp_min(0).div(block_size, rounding_mode="floor")[:, None, None, :].expand_as(scores)
    shape = (*scores.shape[:-1], blocks)
    block_mass = torch.zeros(shape, device=scores.device).scatter_add_(-1, block, mass)
    tokens = torch.zeros(shape, device=scores.device).scatter_add_(-1, block, valid.float())
    chosen = _select(block_mass.masked_fill(tokens == 0, -1.0), tokens, top_p, min_tokens) & (tokens > 0)
    return chosen.gather(-1, block) & valid


def _select(mass: torch.Tensor, weight: torch.Tensor | None, top_p: float, min_tokens: int) -> torch.Tensor:
    level, needed = _threshold(mass, weight, top_p, min_tokens)
    tied = mass == level
    rank_from_end = tied.flip(-1).cumsum(-1).flip(-1)
    return (mass > level) | (tied & (rank_from_end <= needed))
