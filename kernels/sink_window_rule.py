"""What a call of sink + window attention asks for besides its tensors; each of its forms takes one `SinkWindow`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .common import starts


class SinkWindow(NamedTuple):
    """The rule of one call, as in `sink_window_attention`, whose arguments these are.

    A tuple, as a frozen dataclass takes longer to make than some of the checks of a launch.
    """

    window: int
    num_sinks: int
    scale: float
    q_start: int = 0
    kv_start: int = 0
    start: torch.Tensor | None = None
    sink_key: torch.Tensor | None = None
    sink_value: torch.Tensor | None = None
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether the sinks lie in tensors of their own."""
        return self.sink_key is not None

    @property
    def special(self) -> bool:
        """Whether scores are capped or the softmax has learned sinks: no library does that."""
        return self.softcap is not None or self.sink_logits is not None

    def flags(self) -> dict[str, bool]:
        """The constants that leave out of a kernel what the call does not need."""
        return {
            "HAS_START": self.start is not None,
            "HAS_SINKS": self.num_sinks > 0,
            "SINKS_APART": self.apart,
            "SOFTCAP": self.softcap is not None,
            "HAS_LOGITS": self.sink_logits is not None,
        }

    def check(self) -> None:
        """Raise ValueError, saying what was given, if the rule contradicts itself."""
        if (self.sink_key is None) != (self.sink_value is None):
            raise ValueError("sink_key and sink_value must be given together")
        if self.window < 1 or self.num_sinks < 0 or self.scale <= 0:
            given = f"{self.window}, {self.num_sinks}, {self.scale}"
            raise ValueError(f"expected window >= 1, num_sinks >= 0, scale > 0, got {given}")
        if self.sink_key is None and self.num_sinks > 0 and self.kv_start > 0:
            raise ValueError(f"keys from slot {self.kv_start} on do not hold the sinks: give sink_key and sink_value")
        if self.sink_key is not None and self.sink_key.shape[2] > self.num_sinks:
            raise ValueError(f"sink_key holds {self.sink_key.shape[2]} tokens, more than num_sinks={self.num_sinks}")


def gather_sinks(
    key: torch.Tensor, value: torch.Tensor, *, num_sinks: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `num_sinks` real tokens of each row, `[B, Hkv, S, D]`; row 0 of `key` must be slot 0."""
    num_sinks = min(num_sinks, key.shape[2])
    if start is None:
        return key[:, :, :num_sinks], value[:, :, :num_sinks]
    slots = starts(start, key.shape[0], key.device)[:, None] + torch.arange(num_sinks, device=key.device)
    slots = slots.clamp_max(key.shape[2] - 1)[:, None, :, None]
    return (
        key.gather(2, slots.expand(-1, key.shape[1], -1, key.shape[3])),
        value.gather(2, slots.expand(-1, value.shape[1], -1, value.shape[3])),
    )
