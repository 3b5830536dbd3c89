"""Selectors that the index is measured against: fixed top-k, the true scores, and bounds on pages of keys."""

from __future__ import annotations

import torch

from ..kernels.append import quantize_index
from ..kernels.indexed import SelectionTile, Selector
from ..kernels.top_p import index_scores_reference, top_p_set_reference

PAGE_SIZE = 16
_ALMOST_NOTHING = 1e-9


def top_k(tokens: int, *, block_size: int = 1) -> Selector:
    """The `tokens` best keys by index score, whatever mass they hold."""

    def select(tile: SelectionTile) -> torch.Tensor:
        scores = index_scores_reference(tile.index_query, tile.index_key)
        return top_p_set_reference(
            scores, tile.valid, top_p=_ALMOST_NOTHING, min_tokens=tokens, block_size=block_size, start=tile.start
        )

    return select


def rounded_index(*, top_p: float, min_tokens: int, block_size: int) -> Selector:
    """The index itself, its keys rounded to 8 bits a token as an 8-bit index store holds them."""

    def select(tile: SelectionTile) -> torch.Tensor:
        whole, scale = quantize_index(tile.index_key, torch.float32)
        scores = index_scores_reference(tile.index_query, whole.float() * scale[..., None])
        return top_p_set_reference(
            scores, tile.valid, top_p=top_p, min_tokens=min_tokens, block_size=block_size, start=tile.start
        )

    return select


def oracle(top_p: float) -> Selector:
    """The smallest set that holds `top_p` of the true attention mass."""

    def select(tile: SelectionTile) -> torch.Tensor:
        return top_p_set_reference(tile.scores, tile.valid, top_p=top_p)

    return select


def page_bounds(tile: SelectionTile, *, page_size: int = PAGE_SIZE) -> torch.Tensor:
    """Upper bounds `[B, n, R, P]` on the scaled scores in each page, from its keys' elementwise minima and maxima.

    A row's own page counts its keys up to the row, as at a decode step; pages after it have no meaning.
    """
    batch, heads, length, size = tile.key.shape
    pages = -(-length // page_size)
    last = tile.key[:, :, -1:].expand(-1, -1, pages * page_size - length, -1)
    paged = torch.cat([tile.key, last], 2).view(batch, heads, pages, page_size, size)
    highest, lowest = paged.cummax(3).values, paged.cummin(3).values
    positive, negative = tile.query.clamp_min(0), tile.query.clamp_max(0)
    bounds = positive @ highest[..., -1, :].transpose(-1, -2) + negative @ lowest[..., -1, :].transpose(-1, -2)
    rows = tile.slots[:, None, :, None].expand(batch, heads, tile.slots.shape[1], size)
    highest, lowest = highest.flatten(2, 3).gather(2, rows), lowest.flatten(2, 3).gather(2, rows)
    own = (positive * highest + negative * lowest).sum(-1, keepdim=True)
    page = (tile.slots // page_size)[:, None, :, None].expand_as(own)
    return bounds.scatter(-1, page, own) * tile.scale


def quest(*, top_p: float | None = None, tokens: int | None = None, page_size: int = PAGE_SIZE) -> Selector:
    """Whole pages by their bounds: as many as reach `top_p` of the bounds' softmax, or as hold about `tokens` keys."""
    if (top_p is None) == (tokens is None):
        raise ValueError(f"quest takes either top_p or tokens, got {top_p} and {tokens}")

    def select(tile: SelectionTile) -> torch.Tensor:
        bounds = page_bounds(tile, page_size=page_size)
        first = torch.arange(bounds.shape[-1], device=bounds.device) * page_size
        visible = (first <= tile.slots[..., None])[:, None]
        least = 0 if tokens is None else max(round(tokens / page_size), 1)
        mass = _ALMOST_NOTHING if top_p is None else top_p
        pages = top_p_set_reference(bounds, visible, top_p=mass, min_tokens=least)
        return pages.repeat_interleave(page_size, -1)[..., : tile.key.shape[2]] & tile.valid

    return select
