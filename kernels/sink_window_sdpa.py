"""Sink + window attention out of `scaled_dot_product_attention`, a tile of rows at a time.

The same operation as `sink_window.py`, for CPUs and for training: its memory is linear in the length, forward and
backward, since no tile's scores are kept. No soft-cap and no learned sink logits: the library call has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .common import starts

TILE = 512


def sink_window_attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int,
    kv_start: int,
    start: torch.Tensor | None,
    sink_key: torch.Tensor,
    sink_value: torch.Tensor,
) -> torch.Tensor:
    """As `sink_window_attention`; `sink_key` and `sink_value` `[B, Hkv, S, D]` are given by the caller."""
    batch, _, q_len, _ = query.shape
    device, kv_len = query.device, key.shape[2]
    first_slot = starts(start, 1 if start is None else batch, device)
    sink_key, sink_value = sink_key[:, kv_heads], sink_value[:, kv_heads]
    sink_pos = torch.arange(sink_key.shape[2], device=device)
    query = query[:, heads]
    # rows on padding see nothing and may come out as NaN: they are set to zero, as in the reference
    for first in range(0, q_len, TILE):
        last = min(first + TILE, q_len)
        low = max(q_start + first - window + 1 - kv_start, 0)
        high = min(q_start + last - kv_start, kv_len)
        k = torch.cat([sink_key, key[:, kv_heads, low:high]], 2)
        v = torch.cat([sink_value, value[:, kv_heads, low:high]], 2)
        # [B or 1, rows], [B or 1, keys]: logical positions
        q_pos = torch.arange(q_start + first, q_start + last, device=device) - first_slot[:, None]
        k_pos = torch.arange(kv_start + low, kv_start + high, device=device) - first_slot[:, None]
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        in_window = (distance >= 0) & (distance < window) & (k_pos >= num_sinks)[:, None, :]
        mask = torch.cat([q_pos[:, :, None] >= sink_pos, in_window], -1)[:, None]
        tile = F.scaled_dot_product_attention(query[:, :, first:last], k, v, attn_mask=mask, scale=scale)
        if start is not None:
            tile = torch.where((q_pos >= 0)[:, None, :, None], tile, 0.0)
        out[:, first:last, heads] = tile.transpose(1, 2).to(out.dtype)
    return out
