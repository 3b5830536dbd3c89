"""Which query rows a stage-1 step looks at.

A draw depends on the seed, the step and the document's tokens, and on nothing else: not on batch size, gradient
accumulation, the number of processes or workers, or what was drawn before. So a resumed run draws the same rows.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EVALUATION_STEP = -1
CACHE_STEP = -2


def document_key(input_ids: torch.Tensor) -> int:
    """A number that stands for a document's tokens."""
    return zlib.crc32(input_ids.to(torch.int64).cpu().contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Rows:
    """Sampled rows of a batch, -1 where a document has fewer: `slots` and `is_needle` `[B, R]`."""

    slots: torch.Tensor
    is_needle: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """fp32 `[B, R]`: the mean over a document's rows, then the mean over documents."""
        real = (self.slots >= 0).float()
        return real / real.sum(1, keepdim=True).clamp_min(1) / real.shape[0]

    def part(self, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and weights of every `count`-th row from `index` on, `[B, ceil(R / count)]`.

        Weights are `count` times those of the whole: the mean over parts is the loss of all rows. Taking turns gives
        each part early and late rows alike, which see few and many keys.
        """
        pad = (0, -self.slots.shape[1] % count)
        slots = torch.nn.functional.pad(self.slots, pad, value=-1)
        weight = torch.nn.functional.pad(self.weight, pad) * count
        return slots[:, index::count], weight[:, index::count]

    def to(self, device: torch.device) -> Rows:
        return Rows(self.slots.to(device), self.is_needle.to(device))

    @classmethod
    def stack(cls, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
        """Pad the (slots, is_needle) of each document to one length."""
        width = max(slots.numel() for slots, _ in rows)
        slots = torch.full((len(rows), width), -1, dtype=torch.long)
        needle = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (own, is_needle) in enumerate(rows):
            slots[i, : own.numel()] = own
            needle[i, : own.numel()] = is_needle
        return cls(slots, needle)


@dataclass(frozen=True)
class RowSampler:
    """How many rows are drawn, and from where.

    Args:
        count: random rows of a document; -1 takes every row.
        needle_count: at most so many rows out of its needle rows, in addition; -1 takes them all.
        first_row: part of the document, from its start, that random rows are not drawn from.
        seed: another draw.
    """

    count: int
    needle_count: int
    first_row: float
    seed: int

    def __post_init__(self) -> None:
        for name, low in (("count", 1), ("needle_count", 0)):
            value = getattr(self, name)
            if value != -1 and value < low:
                raise ValueError(f"the number of sampled rows ({name}) must be -1 or at least {low}, got {value}")
        if not 0 <= self.first_row < 1:
            raise ValueError(f"first_row must be in [0, 1), got {self.first_row}")

    def text_rows(self, first: int, last: int) -> torch.Tensor:
        """Slots that random rows are drawn from, for a document whose tokens fill [first, last)."""
        skipped = 0 if self.count == -1 else int(self.first_row * (last - first))
        return torch.arange(first + skipped, last)

    def draw(
        self, text: torch.Tensor, needle: torch.Tensor, *, step: int, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the concatenation of `text` and `needle` (candidate slots), and which are needle rows."""
        digest = hashlib.sha256(f"{self.seed}:{step}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        plain = _choose(text.numel(), self.count, generator)
        special = _choose(needle.numel(), self.needle_count, generator)
        if self.count == -1:
            # every row is there already
            special = special[:0]
        chosen = torch.cat([plain, special + text.numel()])
        return chosen, chosen >= text.numel()


def _choose(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    if count == -1 or count >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator)[:count].sort().values


def token_span(attention_mask: torch.Tensor | None, length: int) -> tuple[int, int]:
    """First slot and last slot + 1 of a document's tokens, from its mask `[L]`."""
    if attention_mask is None:
        return 0, length
    real = attention_mask.bool().nonzero().flatten()
    return (int(real[0]), int(real[-1]) + 1) if real.numel() else (0, 0)
