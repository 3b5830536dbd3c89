"""Settings are refused when they are made: a wrong one must not end a run after hours."""

from __future__ import annotations

import math
from typing import Any


def check_limits(settings: Any, **limits: tuple[float, float]) -> None:
    """Refuse numbers of `settings` that are not within their inclusive limits; None stands for a default.

    Raises:
        ValueError: the first such attribute, with its value and its limits.
    """
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            span = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{name} must be {span}, got {value}")


def check_rate(name: str, value: float | None) -> None:
    """Refuse a learning rate that trains nothing or everything away.

    Raises:
        ValueError: not positive, or not finite.
    """
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")
