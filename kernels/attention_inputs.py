"""What every prefill attention does with its arguments first."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def host_list(heads: torch.Tensor | Sequence[int]) -> tuple[int, ...]:
    """The numbers of a head list; of one on a device this waits for the device."""
    return tuple(heads.tolist() if isinstance(heads, torch.Tensor) else heads)


def check_attention_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    out: torch.Tensor,
    start: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
) -> None:
    """Raise ValueError, saying what was given, if the arguments that prefill attention shares do not fit."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "expected query [B, Hq, M, D] and key, value [B, Hkv, N, D] of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, num_heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"query and key must share batch and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if out.shape != (batch, q_len, num_heads, head_dim):
        raise ValueError(f"out must be [B, M, Hq, D] = {(batch, q_len, num_heads, head_dim)}, got {tuple(out.shape)}")
    if len(heads) != len(kv_heads):
        raise ValueError(f"heads and kv_heads must be of one length, got {len(heads)} and {len(kv_heads)}")
    for name, values, size in (("heads", heads, num_heads), ("kv_heads", kv_heads, key.shape[1])):
        if not isinstance(values, torch.Tensor) and len(values) and not 0 <= min(values) <= max(values) < size:
            raise ValueError(f"{name} must be in [0, {size}), got {tuple(values)}")
    if start is not None and start.shape != (batch,):
        raise ValueError(f"start must be [B] = ({batch},), got {tuple(start.shape)}")
    if sink_logits is not None and sink_logits.shape != (num_heads,):
        raise ValueError(f"sink_logits must be [Hq] = ({num_heads},), got {tuple(sink_logits.shape)}")
