"""Sink + window attention out of `scaled_dot_product_attention`, a tile of rows at a time.

The same operation as `sink_window.py`, for CPUs and for training: its memory is linear in the length, forward and
backward, since no tile's scores are kept. No soft-cap and no learned sink logits: the library call has none.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from .common import starts
from .sink_window_rule import SinkWindow

TILE = 512


def _visible(q_pos: torch.Tensor, k_pos: torch.Tensor, sinks: int, num_sinks: int, window: int) -> torch.Tensor:
    """Bool `[B, rows, sinks + keys]` of logical positions `[B, rows]` and `[B, keys]`."""
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    in_window = (distance >= 0) & (distance < window) & (k_pos >= num_sinks)[:, None, :]
    in_sinks = q_pos[:, :, None] >= torch.arange(sinks, device=q_pos.device)
    return torch.cat([in_sinks, in_window], -1)


@lru_cache(maxsize=16)
def _tile_mask(
    rows: int,
    keys: int,
    q_first: int,
    k_first: int,
    sinks: int,
    num_sinks: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The additive mask `[1, 1, rows, sinks + keys]` of an unpadded tile: the same for all layers and inner tiles."""
    with torch.inference_mode(False), torch.no_grad():
        q_pos = torch.arange(q_first, q_first + rows, device=device)[None]
        k_pos = torch.arange(k_first, k_first + keys, device=device)[None]
        seen = _visible(q_pos, k_pos, sinks, num_sinks, window)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _groups(heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """`(KV heads, query heads)` of each call: KV heads with equally many readers, and these readers in their order."""
    readers: dict[int, list[int]] = {}
    for head, kv_head in zip(heads, kv_heads, strict=True):
        readers.setdefault(kv_head, []).append(head)
    by_count: dict[int, tuple[list[int], list[int]]] = {}
    for kv_head, listed in sorted(readers.items()):
        group = by_count.setdefault(len(listed), ([], []))
        group[0].append(kv_head)
        group[1].extend(listed)
    return list(by_count.values())


def _rows(indices: list[int]) -> slice | list[int]:
    """A slice where one does: it picks without a copy."""
    first, last = indices[0], indices[-1] + 1
    return slice(first, last) if indices == list(range(first, last)) else indices


def sink_window_attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    rule: SinkWindow,
) -> torch.Tensor:
    """As `sink_window_attention`; the rule has its sinks apart, `[B, Hkv, S, D]`."""
    if rule.sink_key is None or rule.sink_value is None or rule.special:
        raise ValueError("expected sinks in tensors of their own (gather_sinks), no soft-cap and no sink logits")
    batch, _, q_len, _ = query.shape
    device, kv_len, sinks = query.device, key.shape[2], rule.sink_key.shape[2]
    window, num_sinks, q_start, kv_start = rule.window, rule.num_sinks, rule.q_start, rule.kv_start
    first_slot = starts(rule.start, batch, device)[:, None]
    groups = _groups(heads, kv_heads)
    for first in range(0, q_len, TILE):
        last = min(first + TILE, q_len)
        low = max(q_start + first - window + 1 - kv_start, 0)
        high = min(q_start + last - kv_start, kv_len)
        real = None
        if rule.start is None:
            # beyond the sinks only the distance between rows and keys matters: inner tiles share one mask
            shift = max(min(kv_start + low, q_start + first) - num_sinks, 0)
            where = q_start + first - shift, kv_start + low - shift
            mask = _tile_mask(last - first, high - low, *where, sinks, num_sinks, window, query.dtype, device)
        else:
            q_pos = torch.arange(q_start + first, q_start + last, device=device) - first_slot
            k_pos = torch.arange(kv_start + low, kv_start + high, device=device) - first_slot
            mask = _visible(q_pos, k_pos, sinks, num_sinks, window)[:, None]
            real = (q_pos >= 0)[:, None, :, None]
        for kv_group, group in groups:
            at, count = _rows(kv_group), len(kv_group)
            # KV heads go to the batch axis, so that their readers share them without a copy
            k, v = (
                torch.cat([sink[:, at], rest[:, at, low:high]], 2)
                .flatten(0, 1)[:, None]
                .expand(-1, len(group) // count, -1, -1)
                for sink, rest in ((rule.sink_key, key), (rule.sink_value, value))
            )
            q = query[:, _rows(group), first:last].reshape(batch * count, -1, last - first, query.shape[3])
            seen = mask if rule.start is None else mask.repeat_interleave(count, 0)
            tile = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=rule.scale)
            tile = tile.reshape(batch, len(group), last - first, -1)
            if real is not None:
                # rows on padding see nothing and may come out as NaN: zero, as in the reference
                tile = torch.where(real, tile, 0.0)
            out[:, first:last, _rows(group)] = tile.transpose(1, 2).to(out.dtype)
    return out
