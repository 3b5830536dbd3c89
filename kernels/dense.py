"""Dense causal attention for a subset of query heads (retrieval heads at prefill; PAPER section 1).

    out_h(m) = sum_{n <= m} softmax_n(scale * q_h(m) . k(n)) v(n)
"""

from __future__ import annotations

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts


def dense_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `dense_attention`, in fp32, one tile of rows at a time."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(kv_len, device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * kv_len):
        high = min(q_start + rows.stop, kv_len)
        q_slots = torch.arange(q_start + rows.start, q_start + rows.stop, device=device)
        # [B, 1, rows, keys]
        mask = (slots[:high] <= q_slots[:, None]) & (slots[:high] >= first_slot[:, None, None])
        q, k = query[:, heads, rows].float(), key[:, kv_heads, :high].float()
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        logits = None if sink_logits is None else sink_logits[heads]
        weights = masked_softmax(scores, mask[:, None], sink_logits=logits)
        tile = torch.matmul(weights, value[:, kv_heads, :high].float())
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out
