"""Decode attention of one layer: retrieval heads over their lists, local heads over sinks + window (PAPER section 5).

    out_h(m) = sum_{n in T_h(m)} softmax_n(scale * q_h(m) . k(n)) v(n)

`T_h(m)` is the selected set of a retrieval head (`score_select.py`), or, for a local head, the sinks and the window:
n <= m and (m - n < window or n < num_sinks), in logical positions. The stores are those of `append.py`: a local head
whose KV head lies in the full store reads its sinks and window there, the others read the ring.
"""

from __future__ import annotations

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts, use_triton
from .score_select import Selection
from .workspace import DecodeWorkspace


def _gather(store: torch.Tensor, rows: list[int], slots: torch.Tensor) -> torch.Tensor:
    """fp32 `[B, n, L, D]`: the rows `slots` (`[B, L]` or `[B, n, L]`) of the listed heads of a store `[B, H, C, D]`."""
    if slots.dim() == 2:
        slots = slots[:, None].expand(-1, len(rows), -1)
    b = torch.arange(store.shape[0], device=store.device)[:, None, None]
    return store[b, torch.tensor(rows, device=store.device)[None, :, None], slots].float()


def _window_positions(
    end: int, q_len: int, window: int, num_sinks: int, first_slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical positions `[B, L]` that some row of the step sees through sinks or window, and who sees them `[B, M, L]`."""
    device = first_slot.device
    q_pos = torch.arange(end - q_len, end, device=device) - first_slot[:, None]
    span = min(window + q_len - 1, end)
    sinks = torch.arange(min(num_sinks, end), device=device).expand(first_slot.numel(), -1)
    recent = q_pos[:, -1:] - span + 1 + torch.arange(span, device=device)
    position = torch.cat([sinks, recent], 1)
    # a recent position that is a sink was already listed
    listed = torch.cat([torch.ones_like(sinks, dtype=torch.bool), recent >= num_sinks], 1)
    distance = q_pos[:, :, None] - position[:, None]
    near = (distance < window) | (position < num_sinks)[:, None]
    return position, (distance >= 0) & near & listed[:, None]


def decode_attention_reference(
    query: torch.Tensor,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    selection: Selection | None,
    *,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    window: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `decode_attention`, in fp32; reads `length` and the counts on the host."""
    batch, num_heads, q_len, _ = query.shape
    group = num_heads // len(full_slot)
    end, device = int(length), query.device
    first_slot = starts(start, batch, device)
    chosen = set(retrieval_heads)

    position, seen = _window_positions(end, q_len, window, num_sinks, first_slot)
    # what no row sees may hold anything: read position 0 instead
    position = torch.where(seen.any(1), position, 0)
    ring = max(window_key.shape[2] - num_sinks, 1)
    in_ring = torch.where(position < num_sinks, position, num_sinks + (position - num_sinks) % ring)
    places = (
        (full_key, full_value, full_slot, (position + first_slot[:, None]).clamp(0, max(end - 1, 0))),
        (window_key, window_value, window_slot, in_ring.clamp(0, max(window_key.shape[2] - 1, 0))),
    )
    for store_key, store_value, table, slots in places:
        kv_heads = [
            kv
            for kv, row in enumerate(table)
            if row >= 0 and any(kv * group + g not in chosen for g in range(group))
        ]
        if not kv_heads:
            continue
        rows = [table[kv] for kv in kv_heads]
        heads = [kv * group + g for kv in kv_heads for g in range(group)]
        local = [i for i, head in enumerate(heads) if head not in chosen]
        q = query[:, heads].float().reshape(batch, len(rows), group * q_len, -1)
        scores = soft_cap(torch.matmul(q, _gather(store_key, rows, slots).transpose(-1, -2)) * scale, softcap)
        scores = scores.reshape(batch, len(heads), q_len, -1)
        logits = None if sink_logits is None else sink_logits[heads]
        weights = masked_softmax(scores, seen[:, None], sink_logits=logits)
        weights = weights.reshape(batch, len(rows), group * q_len, -1)
        tile = torch.matmul(weights, _gather(store_value, rows, slots))
        tile = tile.reshape(batch, len(heads), q_len, -1)[:, local].transpose(1, 2)
        out[:, :, [heads[i] for i in local]] = tile.to(out.dtype)

    if retrieval_heads:
        if selection is None:
            raise ValueError(f"{len(retrieval_heads)} retrieval heads need a selection, got None")
        heads = list(retrieval_heads)
        full_rows = [full_slot[head // group] for head in heads]
        width = max(int(selection.counts.max()), 1)
        offsets = torch.arange(block_size, device=device)
        logits = None if sink_logits is None else sink_logits[heads]
        head_dim = query.shape[-1]
        for tile_rows in row_tiles(q_len, batch * len(heads) * width * block_size * head_dim, budget=1 << 27):
            blocks = selection.indices[:, :, tile_rows, :width].long()
            listed = torch.arange(width, device=device) < selection.counts[:, :, tile_rows, None]
            # [B, n, rows, L]
            slots = (blocks[..., None] * block_size + offsets).flatten(-2) + first_slot[:, None, None, None]
            q_slots = torch.arange(end - q_len, end, device=device)[tile_rows]
            mask = listed.repeat_interleave(block_size, -1) & (slots <= q_slots[:, None])
            slots = torch.where(mask, slots, 0)
            shape = (batch, len(heads), slots.shape[2], slots.shape[3], -1)
            k = _gather(full_key, full_rows, slots.flatten(2)).reshape(shape)
            v = _gather(full_value, full_rows, slots.flatten(2)).reshape(shape)
            q = query[:, heads, tile_rows].float()
            scores = soft_cap(torch.matmul(k, q[..., None])[..., 0] * scale, softcap)
            weights = masked_softmax(scores, mask, sink_logits=logits)
            tile = torch.matmul(weights[..., None, :], v)[..., 0, :]
            out[:, tile_rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


def decode_attention(
    query: torch.Tensor,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    selection: Selection | None,
    *,
    retrieval_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    window: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    use_triton(backend, query)
    return decode_attention_reference(
        query,
        full_key,
        full_value,
        window_key,
        window_value,
        selection,
        retrieval_heads=retrieval_heads,
        full_slot=full_slot,
        window_slot=window_slot,
        length=length,
        start=start,
        window=window,
        num_sinks=num_sinks,
        block_size=block_size,
        scale=scale,
        out=out,
        softcap=softcap,
        sink_logits=sink_logits,
    )
