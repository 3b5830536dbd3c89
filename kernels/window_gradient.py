"""Sink + window attention with gradients in memory linear in the length (what stage 2 trains through; PAPER section 6).

The operation of `sink_window.py` over a whole sequence; a window as long as the sequence makes it dense. Nothing of
rows x keys is kept: the backward takes scores again, a tile at a time. With p = softmax(s) over the keys that a row
sees and, if there is one, the learned sink's column, and g the gradient of the output:

    delta(m) = sum_n p(m, n) (g(m) . v(n))          ds = p (g . v - delta)         d logit = -sum_m p_sink(m) delta(m)
    dv = p^T g        dq = scale ds' k        dk = scale ds'^T q        ds' = ds (1 - (s / softcap)^2), or ds

On CUDA devices in half precision the Triton kernels of `window_gradient_triton.py` run, else tiles of rows in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .common import HAS_TRITON, index_tensor, masked_softmax, row_tiles, soft_cap, starts
from .window_gradient_triton import MAX_HEAD_DIM, MAX_SINKS, window_gradient_triton

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def window_gradient_tiled(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_logits: torch.Tensor | None,
    *,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    window: int,
    num_sinks: int,
    scale: float,
    start: torch.Tensor | None,
    softcap: float | None,
) -> Gradients:
    """Gradients of query, key, value and `sink_logits`, fp32 inside, one tile of rows at a time.

    `grad` `[B, M, Hq, D]`; all else as in `sink_window_attention` of a whole sequence.
    """
    batch, _, length, _ = query.shape
    device = query.device
    at, of = index_tensor(heads, device), index_tensor(kv_heads, device)
    first_slot = starts(start, batch, device)[:, None, None]
    logits = None if sink_logits is None else sink_logits.float()[at]
    grad_query = torch.zeros(query.shape, device=device)
    by_head = torch.zeros(2, batch, len(heads), length, query.shape[3], device=device)
    grad_logits = None if logits is None else torch.zeros_like(logits)
    # sinks are the first real tokens: some slots from the lowest start on
    sinks_end = 0 if num_sinks == 0 else min(int(first_slot.max()) + num_sinks, length)
    every = torch.arange(length, device=device)
    for rows in row_tiles(length, len(heads) * batch * min(window + sinks_end + 256, length)):
        low = max(rows.start - window + 1, 0)
        seen = every[: rows.stop] if low <= sinks_end else torch.cat([every[:sinks_end], every[low : rows.stop]])
        distance = every[rows, None] - seen
        mask = (distance >= 0) & (seen >= first_slot)
        mask &= (distance < window) | (seen < first_slot + num_sinks)
        q, g = query[:, at, rows].float(), grad[:, rows][:, :, at].transpose(1, 2).float()
        # [B, n, keys, D]
        k, v = (x.index_select(2, seen)[:, of].float() for x in (key, value))
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)).mul_(scale), softcap)
        weights = masked_softmax(scores, mask[:, None], sink_logits=logits)
        slope = torch.matmul(g, v.transpose(-1, -2))
        delta = torch.linalg.vecdot(weights, slope)
        if grad_logits is not None:
            # a row that sees nothing has delta 0
            grad_logits -= ((1 - weights.sum(-1)) * delta).sum((0, 2))
        slope = slope.sub_(delta[..., None]).mul_(weights)
        if softcap is not None:
            slope.mul_(1 - (scores / softcap).square())
        grad_query[:, at, rows] = torch.matmul(slope, k) * scale
        by_head[0].index_add_(2, seen, torch.matmul(slope.transpose(-1, -2), q) * scale)
        by_head[1].index_add_(2, seen, torch.matmul(weights.transpose(-1, -2), g))
    grad_key, grad_value = (torch.zeros(x.shape, device=device) for x in (key, value))
    for into, part in zip((grad_key, grad_value), by_head, strict=True):
        # sums in a fixed order, as index_add_ with repeated places on a GPU does not
        into.transpose(0, 1).index_put_((of,), part.transpose(0, 1), accumulate=True)
    found = None
    if sink_logits is not None and grad_logits is not None:
        found = torch.zeros_like(sink_logits).index_copy_(0, at, grad_logits.to(sink_logits.dtype))
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), found


def gradient_kernels_fit(query: torch.Tensor, num_sinks: int) -> bool:
    """Whether the Triton kernels take these sizes."""
    return HAS_TRITON and query.shape[3] <= MAX_HEAD_DIM and num_sinks <= MAX_SINKS


class _WindowAttention(torch.autograd.Function):
    """Writes the listed heads of `out`; keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx, query, key, value, sink_logits, out, attend, fused, options):
        ctx.save_for_backward(query, key, value, sink_logits, options["start"])
        ctx.fused = fused
        ctx.options = {name: option for name, option in options.items() if name != "start"}
        attend(query, key, value, out=out, sink_logits=sink_logits, **options)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, sink_logits, start = ctx.saved_tensors
        compute = window_gradient_triton if ctx.fused else window_gradient_tiled
        found = compute(grad, query, key, value, sink_logits, start=start, **ctx.options)
        before = None
        if ctx.needs_input_grad[4]:
            before = grad.index_fill(2, index_tensor(ctx.options["heads"], grad.device), 0)
        return *found, before, None, None, None


def window_attention_with_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    out: torch.Tensor,
    sink_logits: torch.Tensor | None,
    attend: Callable[..., Any],
    fused: bool,
    **options: Any,
) -> torch.Tensor:
    """As `sink_window_attention` of a whole sequence, differentiable in memory O(length).

    Args:
        attend: computes the forward; called as `sink_window_attention` is, and without gradients.
        fused: the backward in Triton (see `gradient_kernels_fit`); else in torch.
        **options: `window`, `num_sinks`, `scale`, `start` and `softcap`.
    """
    listed, rows = (tuple(x.tolist() if isinstance(x, torch.Tensor) else x) for x in (heads, kv_heads))
    options |= {"heads": listed, "kv_heads": rows}
    return _WindowAttention.apply(query, key, value, sink_logits, out, attend, fused, options)
