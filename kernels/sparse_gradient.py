"""Gradients of tile-wise sparse prefill in memory linear in the length (what stage 2 trains retrieval heads through).

The operation of `sparse_prefill.py`; its block lists are constants: no gradient reaches the index. Nothing of rows x
keys is kept: the backward makes the lists again and takes scores again, a tile of rows and its listed keys at a time,
so that its work is the selected part of dense attention's. With p = softmax(s) over the listed keys that a row sees
and, if there is one, the learned sink's column, and g the gradient of the output:

    delta(m) = sum_n p(m, n) (g(m) . v(n))          ds = p (g . v - delta)         d logit = -sum_m p_sink(m) delta(m)
    dv = p^T g        dq = scale ds' k        dk = scale ds'^T q        ds' = ds (1 - (s / softcap)^2), or ds
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from .common import index_tensor, masked_softmax, soft_cap, starts
from .tile_blocks import BLOCK, TILE, tile_range

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
# query rows of one call of the selector, their lists `[B, n, tiles, blocks]` and counts `[B, n, tiles]`
Lists = Iterable[tuple[slice, torch.Tensor, torch.Tensor]]


def as_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending lists and their counts of a bool mask `[..., blocks]`; what follows a list is arbitrary."""
    return (~chosen).to(torch.uint8).argsort(dim=-1, stable=True), chosen.sum(-1)


def _blocks(tensor: torch.Tensor, end: int) -> torch.Tensor:
    """Slots below `end` of `[B, H, N, D]` as `[B, H, blocks + 1, BLOCK, D]`: the last block, and what pads, is zero."""
    padded = F.pad(tensor[:, :, :end], (0, 0, 0, -end % BLOCK + BLOCK))
    return padded.unflatten(2, (-1, BLOCK))


def sparse_gradient_tiled(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_logits: torch.Tensor | None,
    lists: Lists,
    *,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    scale: float,
    q_start: int,
    start: torch.Tensor | None,
    softcap: float | None,
) -> Gradients:
    """Gradients of query, key, value and `sink_logits`, fp32 inside; `grad` `[B, M, Hq, D]`.

    Reads the lists' lengths back to the host, once for each call of the selector.
    """
    batch, _, q_len, dim = query.shape
    device, end = query.device, q_start + q_len
    at, of = index_tensor(heads, device), index_tensor(kv_heads, device)
    first_slot = starts(start, batch, device)[:, None, None, None]
    logits = None if sink_logits is None else sink_logits.float()[at]
    grad_query = torch.zeros(query.shape, device=device)
    grad_logits = None if logits is None else torch.zeros_like(logits)
    key_blocks, value_blocks = _blocks(key, end), _blocks(value, end)
    blocks = key_blocks.shape[2] - 1
    by_head = torch.zeros(2, batch, len(heads), blocks + 1, BLOCK, dim, device=device)
    row = torch.arange(batch, device=device)[:, None, None]
    place = torch.arange(len(heads), device=device)[:, None]
    offset = torch.arange(BLOCK, device=device)
    for rows, indices, counts in lists:
        first_tile, tiles = tile_range(q_start + rows.start, rows.stop - rows.start)
        compiling = torch.compiler.is_compiling()
        widths = [indices.shape[3]] * tiles if compiling else counts.amax((0, 1)).tolist()
        for tile, width in enumerate(widths):
            begin = max((first_tile + tile) * TILE - q_start, rows.start)
            part = slice(begin, min((first_tile + tile + 1) * TILE - q_start, rows.stop))
            listed = torch.arange(width, device=device) < counts[:, :, tile, None]
            # [B, n, width]; lists that are shorter than the tile's longest end in the block of zeros
            block = torch.where(listed, indices[:, :, tile, :width].long(), blocks)
            slot = (block[..., None] * BLOCK + offset).flatten(2)[:, :, None]
            q_slot = torch.arange(q_start + part.start, q_start + part.stop, device=device)[:, None]
            mask = (slot <= q_slot) & (slot >= first_slot)
            q, g = query[:, at, part].float(), grad[:, part][:, :, at].transpose(1, 2).float()
            # [B, n, width * BLOCK, D]
            k, v = (x[row, of[:, None], block].flatten(2, 3).float() for x in (key_blocks, value_blocks))
            scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)).mul_(scale), softcap)
            weights = masked_softmax(scores, mask, sink_logits=logits)
            slope = torch.matmul(g, v.transpose(-1, -2))
            delta = torch.linalg.vecdot(weights, slope)
            if grad_logits is not None:
                grad_logits -= ((1 - weights.sum(-1)) * delta).sum((0, 2))
            slope = slope.sub_(delta[..., None]).mul_(weights)
            if softcap is not None:
                slope.mul_(1 - (scores / softcap).square())
            grad_query[:, at, part] = torch.matmul(slope, k) * scale
            # a tile lists a block once: sums come in the order of the tiles
            for into, left, right in ((0, slope, q * scale), (1, weights, g)):
                found = torch.matmul(left.transpose(-1, -2), right).unflatten(2, (-1, BLOCK))
                by_head[into][row, place, block] += found
    grad_key, grad_value = (torch.zeros(x.shape, device=device) for x in (key, value))
    for into, part in zip((grad_key, grad_value), by_head.flatten(3, 4)[:, :, :, :end], strict=True):
        # heads of one KV head add up in a fixed order
        into[:, :, :end].transpose(0, 1).index_put_((of,), part.transpose(0, 1), accumulate=True)
    found = None
    if sink_logits is not None and grad_logits is not None:
        found = torch.zeros_like(sink_logits).index_copy_(0, at, grad_logits.to(sink_logits.dtype))
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), found


class _SparseAttention(torch.autograd.Function):
    """Writes the listed heads of `out`; keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx, query, key, value, sink_logits, out, index_query, index_key, attend, lists, options):
        ctx.save_for_backward(query, key, value, sink_logits, index_query, index_key, options["start"])
        ctx.lists = lists
        ctx.options = {name: option for name, option in options.items() if name != "start"}
        attend(query, key, value, index_query, index_key, out=out, sink_logits=sink_logits, start=options["start"])
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, sink_logits, index_query, index_key, start = ctx.saved_tensors
        lists = ctx.lists(index_query, index_key, start=start)
        found = sparse_gradient_tiled(grad, query, key, value, sink_logits, lists, start=start, **ctx.options)
        before = None
        if ctx.needs_input_grad[4]:
            before = grad.index_fill(2, index_tensor(ctx.options["heads"], grad.device), 0)
        return *found, before, None, None, None, None, None


def sparse_attention_with_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    out: torch.Tensor,
    sink_logits: torch.Tensor | None,
    attend: Callable[..., Any],
    lists: Callable[..., Lists],
    **options: Any,
) -> torch.Tensor:
    """As `sparse_prefill_attention`, differentiable in memory O(length).

    Args:
        attend: computes the forward; called with the five tensors, `out`, `sink_logits` and `start`.
        lists: gives the forward's lists again; called with index queries, index keys and `start`.
        **options: `heads`, `kv_heads`, `scale`, `q_start`, `start` and `softcap`.
    """
    index_query, index_key = index_query.detach(), index_key.detach()
    return _SparseAttention.apply(query, key, value, sink_logits, out, index_query, index_key, attend, lists, options)
