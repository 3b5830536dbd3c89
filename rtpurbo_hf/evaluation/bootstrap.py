"""Bootstrap intervals of ratio estimates, the same resamples for all variants.

A figure is `f(sum a / sum b)` over samples (text blocks, documents, prompts): samples are drawn again with replacement,
never rows, because rows of one text are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Draws of one number of samples; figures from the same object are paired.

    Args:
        samples: how many samples there are.
        seed: of the draws.
        resamples: number of draws.

    Raises:
        ValueError: no sample, or no draw.
    """

    def __init__(self, samples: int, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        if samples < 1 or resamples < 1:
            raise ValueError(f"samples and resamples must be at least 1, got {samples} and {resamples}")
        self.samples = samples
        drawn = np.random.default_rng(seed).integers(samples, size=(resamples, samples))
        # how often each sample was drawn: sums over a resample become one matrix product
        self._counts = np.stack([np.bincount(row, minlength=samples) for row in drawn]).astype(np.float64)

    def _estimates(self, sums: np.ndarray, exponential: bool) -> tuple[float, np.ndarray]:
        whole = sums.sum(0)
        draws = self._counts @ sums
        with np.errstate(divide="ignore", invalid="ignore"):
            value, values = whole[0] / whole[1], draws[:, 0] / draws[:, 1]
        return (float(np.exp(value)), np.exp(values)) if exponential else (float(value), values)

    def _checked(self, sums: Sequence[Sequence[float]]) -> np.ndarray:
        array = np.asarray(sums, dtype=np.float64)
        if array.shape != (self.samples, 2):
            raise ValueError(f"expected {self.samples} pairs (numerator, denominator), got shape {array.shape}")
        return array

    def ratio(self, sums: Sequence[Sequence[float]], *, exponential: bool = False) -> Interval:
        """`sum a / sum b` of pairs `[(a, b), ...]`, one for each sample; with `exponential` its exponential."""
        value, values = self._estimates(self._checked(sums), exponential)
        return _interval(value, values)

    def difference(
        self,
        sums: Sequence[Sequence[float]],
        reference: Sequence[Sequence[float]],
        *,
        exponential: bool = False,
    ) -> Interval:
        """Paired difference to a reference; with `exponential` the relative one, `value / reference - 1`."""
        value, values = self._estimates(self._checked(sums), exponential)
        base, bases = self._estimates(self._checked(reference), exponential)
        if exponential:
            return _interval(value / base - 1, values / bases - 1)
        return _interval(value - base, values - bases)


def _interval(value: float, values: np.ndarray) -> Interval:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Interval(value, value, value)
    low, high = np.quantile(finite, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value, float(low), float(high))
