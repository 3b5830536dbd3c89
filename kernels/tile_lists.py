"""What the attention kernels on tiles' block lists are given beside q, k and v."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TileLists(NamedTuple):
    """Ascending block lists: int32 `[B, n, tiles, blocks]` and their counts `[B, n, tiles]`.

    tile, block: rows and keys that they are cut into, from slot 0; the first tile holds the call's first row.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    tile: int
    block: int

    def longest_first(self) -> torch.Tensor:
        """Flat places of all lists, so that no long one is left over at the end of a launch."""
        return self.counts.flatten().argsort(descending=True)


class ListOptions(NamedTuple):
    """The softmax's options, as in `sparse_prefill_attention`; q_start: slot of the call's first row."""

    scale: float
    q_start: int
    start: torch.Tensor | None
    softcap: float | None
    sink_logits: torch.Tensor | None

    def flags(self) -> dict[str, bool]:
        """What the kernels are specialised by."""
        return {
            "HAS_START": self.start is not None,
            "SOFTCAP": self.softcap is not None,
            "HAS_LOGITS": self.sink_logits is not None,
        }
