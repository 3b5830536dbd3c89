"""The stage-1 loss: how far the index distribution is from the head's own attention (PAPER section 6).

    loss_h = mean_m KL(softmax(scale * q_h(m) . k) || softmax(iq_h(m) . ik))        over the keys n <= m

The teacher side is a constant. Gradients flow to `index_query` and `index_key` only.
"""

from __future__ import annotations

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts
from .top_p import index_scores_reference


def indexer_kl_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    index_heads: torch.Tensor,
    q_slots: torch.Tensor,
    scale: float,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Per-head loss `[n]` in nats, fp32: the mean over batch and rows; rows on padding do not count.

    Args:
        query: `[B, Hq, M, D]` rotated queries of the sampled rows. `key`: `[B, Hkv, N, D]` rotated.
        index_query: `[B, n, M, r]`. `index_key`: `[B, I, N, r]`.
        heads, kv_heads, index_heads: int64 `[n]`: query head, its row in `key`, its row in `index_key`.
        q_slots: int64 `[B, M]`, the slot of each sampled row; -1 marks a row that does not count.
    """
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(kv_len, device=device)
    counted = q_slots >= first_slot[:, None]
    total = torch.zeros(heads.numel(), device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * kv_len):
        valid = (slots <= q_slots[:, rows, None]) & (slots >= first_slot[:, None, None])
        valid = valid[:, None]
        with torch.no_grad():
            k = key[:, kv_heads].float()
            scores = torch.matmul(query[:, heads, rows].float(), k.transpose(-1, -2)) * scale
            teacher = masked_softmax(soft_cap(scores, softcap), valid)
        index = index_scores_reference(index_query[:, :, rows], index_key, heads=index_heads)
        student = torch.log_softmax(index.masked_fill(~valid, torch.finfo(torch.float32).min), -1)
        cross = torch.where(valid, teacher * student, 0.0).sum(-1)
        entropy = torch.xlogy(teacher, teacher).sum(-1)
        total = total + ((entropy - cross) * counted[:, None, rows]).sum((0, 2))
    return total / counted.sum().clamp_min(1)
