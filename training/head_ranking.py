"""From scores to retrieval heads: ranking over the whole model, and how far rankings agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..modeling.families_rtpurbo import full_attention_modules
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM

GRANULARITIES = ("head", "kv_head")
RULES = ("score", "even")
PAPER_RATIO = 0.15
_FEW_LAYERS = 0.25

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Agreement:
    """Over all pairs of documents: Spearman's rank correlation of the scores, and the shared part of the top sets."""

    rank_correlation: float
    rank_correlation_min: float
    overlap: float
    overlap_min: float


def default_ratio(model: RTPurboForCausalLM) -> float:
    """0.15, or 1 for a base that leaves at most a quarter of its layers with full attention: these already do all the
    far looking, and windowing any of them costs more than indexing it."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    full = len(full_attention_modules(model.model))
    return 1.0 if full <= _FEW_LAYERS * layers and full < layers else PAPER_RATIO


def default_retrieval_heads(model: RTPurboForCausalLM, scores: Scores) -> tuple[tuple[int, ...], ...]:
    """The heads that the default ratio of this base takes."""
    return rank_heads(scores, default_ratio(model))


def rank_heads(
    scores: Scores,
    ratio: float,
    *,
    granularity: str = "head",
    num_kv_heads: int | None = None,
    above: float | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Per layer, the heads with the highest scores of the whole model; ties go to the earlier layer and head.

    Args:
        scores: per layer, one score a query head, or nothing.
        ratio: part of all scored heads to take, in (0, 1]; rounded down, at least one head (or KV group).
        granularity: `"head"`, or `"kv_head"`: whole KV groups by their mean score, while they fit.
        num_kv_heads: KV heads of a layer, for `"kv_head"`.
        above: only heads (or groups, by their best head) whose score is above this are taken, so there may be fewer
            than `ratio` asks for, but never none; None: all may be.

    Raises:
        ValueError: ratio outside (0, 1], unknown granularity, or `"kv_head"` without a fitting `num_kv_heads`.
    """
    if isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
    # the epsilon keeps 0.15 * 20 at 3
    target = max(1, int(ratio * sum(map(len, scores)) + 1e-9))
    groups: list[tuple[bool, float, int, tuple[int, ...]]] = []
    for layer, row in enumerate(scores):
        size = 1
        if granularity == "kv_head" and row:
            if not num_kv_heads or len(row) % num_kv_heads:
                raise ValueError(f"num_kv_heads must divide the {len(row)} heads of a layer, got {num_kv_heads}")
            size = len(row) // num_kv_heads
        for first in range(0, len(row), size):
            members = tuple(range(first, first + size))
            low = above is not None and max(row[h] for h in members) <= above
            groups.append((low, -sum(row[h] for h in members) / size, layer, members))
    groups.sort()
    groups = [group for group in groups if not group[0]] or groups[:1]
    chosen: list[list[int]] = [[] for _ in scores]
    taken = 0
    for *_, layer, members in groups:
        if taken and taken + len(members) > target:
            break
        chosen[layer] += members
        taken += len(members)
    return tuple(tuple(sorted(listed)) for listed in chosen)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks with ties averaged, fp64."""
    _, inverse, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[inverse]


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's rank correlation of two score vectors; 1 when either is constant and both are equal, else 0."""
    a, b = (_ranks(x) - _ranks(x).mean() for x in (first, second))
    norm = a.norm() * b.norm()
    if norm == 0:
        return float(torch.equal(first, second))
    return float((a @ b) / norm)


def agreement(per_document: Sequence[Scores], top: int) -> Agreement:
    """Agreement of at least two documents' scores; `top` is the size of the compared sets."""
    flat = [torch.tensor([s for row in scores for s in row], dtype=torch.float64) for scores in per_document]
    sets = [set(v.argsort(descending=True, stable=True)[:top].tolist()) for v in flat]
    pairs = list(combinations(range(len(flat)), 2))
    correlations = [rank_correlation(flat[i], flat[j]) for i, j in pairs]
    overlaps = [len(sets[i] & sets[j]) / top for i, j in pairs]
    return Agreement(
        rank_correlation=sum(correlations) / len(pairs),
        rank_correlation_min=min(correlations),
        overlap=sum(overlaps) / len(pairs),
        overlap_min=min(overlaps),
    )
