"""Attention of retrieval heads on each row's own top-p set (PAPER sections 3 to 5).

    out_h(m) = sum_{n in S_h(m)} softmax_n(scale * q_h(m) . k(n)) v(n)

with `S_h(m)` from `top_p.py`. This is the row-by-row form: the contract of the decode kernels, of
`retrieval_prefill="sparse"`, and the differentiable form that stage 2 trains with (the set is a constant there).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts
from .top_p import index_scores_reference, top_p_set_reference


@dataclass(frozen=True)
class SelectionTile:
    """What a selector other than the index may look at: one tile of R rows against all N keys, for n heads.

    `query` `[B, n, R, D]` and `key` `[B, n, N, D]` are rotated, fp32; `scores` `[B, n, R, N]` are the scaled (and
    soft-capped) true scores; `index_query`, `index_key` `[B, n, R|N, r]`; `valid` `[B, 1, R, N]` is what a row may see;
    `slots` `[B, R]` are the rows' own slots, `start` `[B]` or None as everywhere.
    """

    query: torch.Tensor
    key: torch.Tensor
    scores: torch.Tensor
    index_query: torch.Tensor
    index_key: torch.Tensor
    valid: torch.Tensor
    slots: torch.Tensor
    start: torch.Tensor | None
    scale: float


Selector = Callable[[SelectionTile], torch.Tensor]


def indexed_attention_reference(
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
    block_size: int,
    scale: float,
    out: torch.Tensor,
    q_slots: torch.Tensor,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    on_selection: Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    selector: Selector | None = None,
) -> torch.Tensor:
    """Select by index scores, then attend exactly, one tile of rows at a time; fp32 inside.

    Args:
        query: `[B, Hq, M, D]`, rotated. `key`, `value`: `[B, F, N, D]`, rotated, slot-ordered.
        index_query: `[B, n, M, r]`, one head for each listed head. `index_key`: `[B, I, N, r]`.
        heads: int64 `[n]` query heads to compute. `kv_heads`: `[n]` their rows in `key`.
        index_heads: `[n]` their rows in `index_key`.
        top_p, min_tokens, block_size: the selection, see `top_p_set_reference`.
        scale: softmax scale of the exact attention (the index scores carry their own).
        out: `[B, M, Hq, D]`; the listed heads are written, the others left alone.
        q_slots: int64 `[M]` or `[B, M]`, the slot of each query row.
        on_selection: called per tile with (rows, selected mask, valid mask, exact weights without selection);
            for measurements only, since it computes the dense weights as well.
        selector: returns the bool mask `[B, n, R, N]` to attend to in place of the index (a subset of `valid`).
    """
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(kv_len, device=device)
    q_slots = q_slots.expand(batch, q_len)
    logits = None if sink_logits is None else sink_logits[heads]
    for rows in row_tiles(q_len, heads.numel() * batch * kv_len):
        # [B, 1, rows, keys]
        valid = (slots <= q_slots[:, rows, None]) & (slots >= first_slot[:, None, None])
        valid = valid[:, None]
        q, k = query[:, heads, rows].float(), key[:, kv_heads].float()
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        with torch.no_grad():
            if selector is None:
                index = index_scores_reference(index_query[:, :, rows], index_key, heads=index_heads)
                chosen = top_p_set_reference(
                    index, valid, top_p=top_p, min_tokens=min_tokens, block_size=block_size, start=start
                )
            else:
                index = index_query[:, :, rows], index_key[:, index_heads]
                chosen = selector(SelectionTile(q, k, scores, *index, valid, q_slots[:, rows], start, scale))
        if on_selection is not None:
            with torch.no_grad():
                on_selection(rows, chosen, valid, masked_softmax(scores, valid, sink_logits=logits))
        weights = masked_softmax(scores, chosen, sink_logits=logits)
        mixed = torch.matmul(weights, value[:, kv_heads].float())
        out[:, rows, heads] = mixed.transpose(1, 2).to(out.dtype)
    return out
