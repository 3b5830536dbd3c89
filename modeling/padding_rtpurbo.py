"""Padding masks and position ids, reduced to one number a row: the slot of its first real token."""

from __future__ import annotations

import torch


def left_padding(mask: torch.Tensor | None, batch: int, length: int) -> tuple[torch.Tensor | None, bool]:
    """The first real slot of each row and whether some row is padded on the right.

    Args:
        mask: `[B, L]`, nonzero for real tokens, over the cache and this forward; None: all real.
        batch, length: the shape that it must have.

    Returns:
        int64 `[B]`, or None when no row is padded on the left; a row of padding only starts behind its end. And a bool.

    Raises:
        ValueError: not 2-D, of another length, or with padding between real tokens.
    """
    if mask is None:
        return None, False
    if isinstance(mask, dict) or mask.ndim != 2:
        given = "a dict of masks" if isinstance(mask, dict) else f"a {mask.ndim}-D mask"
        raise ValueError(
            f"an RTPurbo model takes a 2-D padding mask [batch, length], got {given}: causality and "
            "windows are built in"
        )
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask must cover cached and new tokens, shape {(batch, length)}, got {tuple(mask.shape)}"
        )
    real = mask.bool()
    # argmax is not defined for bool tensors on every device
    start = torch.where(real.any(1), real.int().argmax(1), length)
    end = length - torch.where(real.any(1), real.flip(1).int().argmax(1), 0)
    holes = (end - start).clamp_min(0) != real.sum(1)
    if torch.compiler.is_compiling():
        return start, False
    has_left, has_right, has_holes = torch.stack([(start > 0).any(), (end < length).any(), holes.any()]).tolist()
    if has_holes:
        raise ValueError(
            "attention_mask has padding between real tokens; an RTPurbo model needs each row's real tokens in one piece"
        )
    return (start if has_left else None), has_right


def check_continued(held: torch.Tensor | None, start: torch.Tensor | None, cached: int) -> None:
    """Refuse a mask that says something else about cached tokens than the mask that they came with.

    Args:
        held, start: first real slot of each row `[B]` by then, and by the new mask; None: 0.
        cached: tokens in the cache; a row may begin anywhere behind them, if all of them were padding.

    Raises:
        ValueError: they differ.
    """
    if (held is None and start is None) or torch.compiler.is_compiling():
        return
    pair = [part for part in (held, start) if part is not None]
    known, told = (torch.zeros_like(pair[0]) if part is None else part.to(pair[0].device) for part in (held, start))
    if not bool(((told == known) | (told >= cached)).all()):
        raise ValueError(
            "attention_mask must cover cached tokens as well, padding included: by this one rows begin at "
            f"{told.tolist()}, the cached rows begin at {known.tolist()}"
        )


def check_positions(position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse packed sequences: positions that start again inside a row.

    Raises:
        ValueError: consecutive real tokens do not have consecutive positions.
    """
    if position_ids is None or position_ids.ndim != 2 or torch.compiler.is_compiling():
        return
    steps = position_ids[:, 1:] - position_ids[:, :-1]
    expected = steps == 1
    if mask is not None:
        expected = expected | ~(mask[:, 1:].bool() & mask[:, :-1].bool())
    if not bool(expected.all()):
        raise ValueError(
            "position_ids jump inside a row: packed sequences are not supported; pass one sequence a row, "
            "padded on the left"
        )
