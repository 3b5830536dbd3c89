"""Sink + window attention for a subset of query heads (local heads; PAPER section 1).

A query at logical position m sees the key at n iff `n <= m` and (`m - n < window` or `n < num_sinks`):

    out_h(m) = sum_n softmax_n(scale * q_h(m) . k(n)) v(n)      over the n it sees

Two key ranges are read: the sinks, and one contiguous run of keys. Not for single decode steps over the cache's
ring buffer: that is `decode.py`.
"""

from __future__ import annotations

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts


def gather_sinks(
    key: torch.Tensor, value: torch.Tensor, *, num_sinks: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `num_sinks` real tokens of each row, `[B, Hkv, S, D]`, out of keys whose slot 0 is the sequence's."""
    num_sinks = min(num_sinks, key.shape[2])
    if start is None:
        return key[:, :, :num_sinks], value[:, :, :num_sinks]
    slots = starts(start, key.shape[0], key.device)[:, None] + torch.arange(num_sinks, device=key.device)
    slots = slots.clamp_max(key.shape[2] - 1)[:, None, :, None]
    return (
        key.gather(2, slots.expand(-1, key.shape[1], -1, key.shape[3])),
        value.gather(2, slots.expand(-1, value.shape[1], -1, value.shape[3])),
    )


def sink_window_attention_reference(
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
    q_start: int = 0,
    kv_start: int = 0,
    start: torch.Tensor | None = None,
    sink_key: torch.Tensor | None = None,
    sink_value: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `sink_window_attention`, in fp32, one tile of rows at a time."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    if sink_key is None:
        sink_key, sink_value = gather_sinks(key, value, num_sinks=num_sinks, start=start)
    sink_key, sink_value = sink_key[:, kv_heads].float(), sink_value[:, kv_heads].float()
    sink_pos = torch.arange(sink_key.shape[2], device=device)
    width = heads.numel() * batch * min(window + 256, kv_len)
    for rows in row_tiles(q_len, width):
        low = max(q_start + rows.start - window + 1 - kv_start, 0)
        high = min(q_start + rows.stop - kv_start, kv_len)
        q = query[:, heads, rows].float()
        k = torch.cat([sink_key, key[:, kv_heads, low:high].float()], 2)
        v = torch.cat([sink_value, value[:, kv_heads, low:high].float()], 2)
        # [B, rows], [B, keys]: logical positions
        q_pos = torch.arange(q_start + rows.start, q_start + rows.stop, device=device) - first_slot[:, None]
        k_pos = torch.arange(kv_start + low, kv_start + high, device=device) - first_slot[:, None]
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        in_window = (distance >= 0) & (distance < window) & (k_pos >= num_sinks)[:, None, :]
        in_sinks = q_pos[:, :, None] >= sink_pos
        mask = torch.cat([in_sinks, in_window], -1)[:, None]
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        logits = None if sink_logits is None else sink_logits[heads]
        tile = torch.matmul(masked_softmax(scores, mask, sink_logits=logits), v)
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out
