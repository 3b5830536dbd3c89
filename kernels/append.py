"""Append of a decode step's tokens to the stores of the hybrid cache (PAPER section 1).

    full store    [B, F, C, D]        slot-ordered: the token of slot t lies at t
    index store   [B, I, C, r]        slot-ordered; in 8 bits, one scale a token: x ~ scale * round(x / scale)
    window store  [B, W, S + R, D]    by logical position p: sinks p < S at p, the others at S + (p - S) % R

Padding (negative logical positions) never enters the window store. Not for the prefill, which writes whole tensors.
"""

from __future__ import annotations

import torch

from .common import starts, use_triton

INT8_MAX = 127.0


def quantize_index(index_key: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 keys `[..., r]` and their scales `[...]` (of `scale_dtype`): one token at a time, symmetric.

    The scale is rounded to `scale_dtype` before the division, so that only the keys carry a rounding error.
    """
    x = index_key.float()
    scale = (x.abs().amax(-1) / INT8_MAX).to(scale_dtype)
    step = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(x / step[..., None]).clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def append_step_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    *,
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    num_sinks: int,
    index_scale: torch.Tensor | None = None,
) -> None:
    """The contract of `append_step`; reads `length` on the host."""
    batch, _, q_len, _ = key.shape
    end = int(length)
    full = [head for head, row in enumerate(full_slot) if row >= 0]
    window = [head for head, row in enumerate(window_slot) if row >= 0]
    if full:
        rows = [full_slot[head] for head in full]
        full_key[:, rows, end - q_len : end] = key[:, full].to(full_key.dtype)
        full_value[:, rows, end - q_len : end] = value[:, full].to(full_value.dtype)
    if index_key_new is not None and index_key.shape[1]:
        if index_scale is None:
            index_key[:, :, end - q_len : end] = index_key_new.to(index_key.dtype)
        else:
            quantized, scale = quantize_index(index_key_new, index_scale.dtype)
            index_key[:, :, end - q_len : end] = quantized
            index_scale[:, :, end - q_len : end] = scale
    if window:
        ring = window_key.shape[2] - num_sinks
        slots = torch.arange(end - q_len, end, device=key.device)
        position = slots - starts(start, batch, key.device)[:, None]
        slot = torch.where(position < num_sinks, position, num_sinks + (position - num_sinks) % max(ring, 1))
        b, m = torch.nonzero(position >= 0, as_tuple=True)
        rows = [window_slot[head] for head in window]
        # advanced indices on either side of the head axis: the result is [tokens, W, D]
        row = torch.tensor(rows, device=key.device)[None]
        head = torch.tensor(window, device=key.device)[None]
        at = slot[b, m][:, None]
        window_key[b[:, None], row, at] = key[b[:, None], head, m[:, None]].to(window_key.dtype)
        window_value[b[:, None], row, at] = value[b[:, None], head, m[:, None]].to(window_value.dtype)


def append_step(
    key: torch.Tensor,
    value: torch.Tensor,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    *,
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    num_sinks: int,
    index_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    use_triton(backend, key)
    append_step_reference(
        key,
        value,
        index_key_new,
        full_key,
        full_value,
        index_key,
        window_key,
        window_value,
        full_slot=full_slot,
        window_slot=window_slot,
        length=length,
        start=start,
        num_sinks=num_sinks,
        index_scale=index_scale,
    )
