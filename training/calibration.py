"""Which heads retrieve: offline calibration with a repeated needle (PAPER section 2).

A needle is written into a document twice, early and at the very end. Heads whose rows at the second copy look at the
first one are retrieval heads. The first copy starts after at least 64 ordinary tokens: nearer to the start, the mass
that every head puts on the attention sinks would count as retrieval, and the wrong heads would win.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling.families_rtpurbo import head_counts
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .head_ranking import GRANULARITIES, RULES, Agreement, agreement, default_ratio, rank_heads
from .plots import plot_heads
from .retrieval_scores import retrieval_scores

__all__ = ["MIN_PREFIX", "Calibration", "Needle", "calibrate", "draw_needle", "place_needle", "plot_heads"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MIN_PREFIX = 64
_NEEDLE_LENGTH = 32

Scores = tuple[tuple[float, ...], ...]
Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Needle:
    """The repeated span: its token ids, the slot where its first copy starts, and where it comes from."""

    token_ids: tuple[int, ...]
    start: int
    description: str


@dataclass(frozen=True)
class Calibration:
    """Retrieval scores of all heads, the heads chosen by them, and everything that they depend on.

    Attributes:
        scores: per layer of the base, the score of each query head, in [0, 1]; empty for layers that are not converted.
        retrieval_heads: per layer, the chosen query heads, ascending.
        ratio: part of the scored heads that was asked for, in (0, 1].
        granularity: `"head"`, or `"kv_head"`: KV groups are taken as a whole.
        num_kv_heads: KV heads of a layer.
        seed: of the needle. needle: what was repeated, and where.
        positions: for each document (first slot, last slot + 1) of the first copy, then of the second.
        document_hashes: SHA-256 of each document's token ids, before the needle. context: tokens in each document.
        agreement: how far documents agree on the ranking; None with a single document.
        model_name, model_revision: the base model.
        rule: `"score"`, heads by their scores alone (the paper); `"even"`, only those of them that score more than even
            attention.
        format_version: version of this record.
    """

    scores: Scores
    retrieval_heads: Heads
    ratio: float
    granularity: str
    num_kv_heads: int
    seed: int
    needle: Needle
    positions: tuple[tuple[int, int, int, int], ...]
    document_hashes: tuple[str, ...]
    context: tuple[int, ...]
    agreement: Agreement | None = None
    model_name: str | None = None
    model_revision: str | None = None
    rule: str = "score"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check(self)

    def select(
        self, ratio: float | None = None, *, granularity: str | None = None, rule: str | None = None
    ) -> Calibration:
        """The same scores, other heads; what is None stays as it is.

        Raises:
            ValueError: ratio outside (0, 1], or an unknown granularity or rule.
        """
        ratio = self.ratio if ratio is None else ratio
        granularity = self.granularity if granularity is None else granularity
        rule = self.rule if rule is None else rule
        _need(rule in RULES, "rule", f"one of {RULES}", rule)
        heads = rank_heads(
            self.scores,
            ratio,
            granularity=granularity,
            num_kv_heads=self.num_kv_heads,
            above=self.even if rule == "even" and ratio < 1 else None,
        )
        return dataclasses.replace(self, retrieval_heads=heads, ratio=ratio, granularity=granularity, rule=rule)

    @property
    def even(self) -> float:
        """What even attention gives to the needle: who scores no more retrieves nothing, however far it looks."""
        return len(self.needle.token_ids) * len(self.context) / sum(self.context)

    def save(self, path: str | Path) -> None:
        """Write a JSON file; it appears whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: not JSON, a field that is missing or unknown, or a value out of its range; names the field.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable calibration file: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: expected an object, got {type(record).__name__}")
        try:
            return cls(**_from_json(record))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _from_json(record: dict[str, Any]) -> dict[str, Any]:
    version: Any = record.get("format_version")
    _need(_whole(version) and version >= 1, "format_version", "a positive integer", version)
    if version > FORMAT_VERSION:
        raise ValueError(f"format_version {version} is newer than this code, which reads up to {FORMAT_VERSION}")
    fields = _known_fields(Calibration, record, "")
    values = {**record}
    for name in ("scores", "retrieval_heads", "positions"):
        rows = values[name]
        _need(isinstance(rows, list) and all(isinstance(row, list) for row in rows), name, "a list of lists", rows)
        values[name] = tuple(map(tuple, rows))
    for name in ("document_hashes", "context"):
        _need(isinstance(values[name], list), name, "a list", values[name])
        values[name] = tuple(values[name])
    needle = values["needle"]
    _need(isinstance(needle, dict), "needle", "an object", needle)
    _known_fields(Needle, needle, "needle.")
    _need(isinstance(needle["token_ids"], list), "needle.token_ids", "a list", needle["token_ids"])
    values["needle"] = Needle(**{**needle, "token_ids": tuple(needle["token_ids"])})
    if values.get("agreement") is not None:
        _need(isinstance(values["agreement"], dict), "agreement", "an object or null", values["agreement"])
        _known_fields(Agreement, values["agreement"], "agreement.")
        values["agreement"] = Agreement(**values["agreement"])
    return {name: values[name] for name in fields if name in values}


def _known_fields(kind: type, record: dict[str, Any], prefix: str) -> list[str]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(record) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in record)
    if unknown or missing:
        name = (unknown or missing)[0]
        raise ValueError(f"field {prefix + name!r} is {'unknown' if unknown else 'missing'}")
    return list(fields)


def _need(condition: bool, field: str, expected: str, given: Any) -> None:
    if not condition:
        shown = repr(given)
        raise ValueError(f"{field} must be {expected}, got {shown if len(shown) < 80 else shown[:77] + '...'}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(record: Calibration) -> None:
    scores, heads = record.scores, record.retrieval_heads
    _need(bool(scores) and any(scores), "scores", "a list per layer with at least one scored layer", scores)
    widths = {len(row) for row in scores if row}
    _need(len(widths) == 1, "scores", "equally many heads in each scored layer", sorted(widths))
    width = widths.pop()
    for layer, row in enumerate(scores):
        bad = [s for s in row if not _number(s) or not -1e-6 <= s <= 1 + 1e-5]
        _need(not bad, f"scores[{layer}]", "finite numbers in [0, 1]", bad[:1])
    _need(len(heads) == len(scores), "retrieval_heads", f"one list for each of {len(scores)} layers", len(heads))
    for layer, (listed, row) in enumerate(zip(heads, scores, strict=True)):
        name = f"retrieval_heads[{layer}]"
        _need(all(map(_whole, listed)), name, "integers", listed)
        _need(all(0 <= h < len(row) for h in listed), name, f"heads in [0, {len(row)})", listed)
        _need(len(set(listed)) == len(listed), name, "without duplicates", listed)
        _need(list(listed) == sorted(listed), name, "ascending", listed)
    _need(_number(record.ratio) and 0 < record.ratio <= 1, "ratio", "in (0, 1]", record.ratio)
    _need(record.granularity in GRANULARITIES, "granularity", f"one of {GRANULARITIES}", record.granularity)
    kv = record.num_kv_heads
    _need(_whole(kv) and kv >= 1 and width % kv == 0, "num_kv_heads", f"a divisor of {width}", kv)
    _need(record.rule in RULES, "rule", f"one of {RULES}", record.rule)
    _need(_whole(record.seed), "seed", "an integer", record.seed)
    ids = record.needle.token_ids
    _need(bool(ids) and all(_whole(t) and t >= 0 for t in ids), "needle.token_ids", "token ids", ids)
    start = record.needle.start
    _need(_whole(start) and start >= MIN_PREFIX, "needle.start", f"at least {MIN_PREFIX}", start)
    _need(isinstance(record.needle.description, str), "needle.description", "a string", record.needle.description)
    count = len(record.document_hashes)
    _need(count >= 1, "document_hashes", "at least one hash", record.document_hashes)
    for value in record.document_hashes:
        good = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
        _need(good, "document_hashes", "SHA-256 in hexadecimal", value)
    _need(len(record.context) == count, "context", f"{count} lengths", record.context)
    _need(all(_whole(n) and n > 0 for n in record.context), "context", "positive integers", record.context)
    _need(len(record.positions) == count, "positions", f"one entry for each of {count} documents", record.positions)
    for entry, length in zip(record.positions, record.context, strict=True):
        good = len(entry) == 4 and all(map(_whole, entry))
        good = good and 0 <= entry[0] < entry[1] <= entry[2] < entry[3] == length
        _need(good, "positions", "four slots in ascending order, the last one the document's end", entry)
    if record.agreement is not None:
        for name, value in dataclasses.asdict(record.agreement).items():
            _need(_number(value) and -1 - 1e-6 <= value <= 1 + 1e-6, f"agreement.{name}", "in [-1, 1]", value)
    for name in ("model_name", "model_revision"):
        value = getattr(record, name)
        _need(value is None or isinstance(value, str), name, "a string or null", value)


def draw_needle(documents: Sequence[torch.Tensor], *, length: int = _NEEDLE_LENGTH, seed: int = 0) -> list[int]:
    """Tokens for a needle: drawn at random from those of the documents, all different, so that nothing but the first
    copy predicts the second.

    Raises:
        ValueError: the documents hold fewer different tokens than `length`.
    """
    known = sorted(set(torch.cat([d.flatten() for d in documents]).tolist()))
    if len(known) < length:
        raise ValueError(f"a needle of {length} different tokens cannot be drawn from {len(known)} different ones")
    return random.Random(seed).sample(known, length)


def place_needle(
    document: torch.Tensor, needle: Sequence[int], start: int, *, special: Sequence[int] = ()
) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Write the needle into a document twice, without changing its length: the document's tail makes room.

    Args:
        document: int64 `[N]`. start: slot of the first copy. special: ids that do not count as ordinary tokens.

    Returns:
        The new document, and (start, stop) of the first copy, then of the second, which ends the document.

    Raises:
        ValueError: fewer than 64 ordinary tokens before the first copy, or a document that is too short.
    """
    before = document[:start]
    ordinary = int((~torch.isin(before, torch.tensor(list(special), dtype=before.dtype))).sum())
    if ordinary < MIN_PREFIX:
        raise ValueError(
            f"the needle must start after at least {MIN_PREFIX} ordinary tokens, else the attention sinks count as "
            f"retrieval; {ordinary} stand before slot {start}. Choose a later needle_start"
        )
    n, length = len(needle), document.numel()
    if length < start + 2 * n + MIN_PREFIX:
        raise ValueError(
            f"a document of {length} tokens is too short: a needle of {n} tokens at slot {start} and again at the end, "
            f"at least {MIN_PREFIX} tokens apart, needs {start + 2 * n + MIN_PREFIX}"
        )
    span = torch.tensor(list(needle), dtype=document.dtype)
    placed = torch.cat([before, span, document[start : length - 2 * n], span])
    return placed, (start, start + n, length - n, length)


def _special_ids(model: RTPurboForCausalLM) -> list[int]:
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config.base_config, name, None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def calibrate(
    model: RTPurboForCausalLM,
    documents: Sequence[torch.Tensor | Sequence[int]],
    *,
    ratio: float | None = None,
    granularity: str = "head",
    rule: str = "score",
    needle: Sequence[int] | None = None,
    needle_start: int | None = None,
    needle_description: str | None = None,
    seed: int = 0,
    chunk: int | None = None,
) -> Calibration:
    """Rank the heads of all full-attention layers over the whole model; each document costs one dense forward.

    Args:
        model: a wrapped model; its present retrieval heads do not matter.
        documents: token ids of ordinary long text, int `[N]` each; four of the length to serve are plenty.
        ratio: part of the heads to take. None: 0.15 (the paper), or all heads of a base whose own design leaves at
            most a quarter of its layers with full attention (Gemma 3).
        granularity: `"head"`, or `"kv_head"`: a KV group is taken or left as a whole, by the mean of its scores.
        rule: `"score"`, the paper's: by needle score alone, up to the ratio. `"even"`: without those that score no more
            than even attention would, so maybe fewer; a ratio of 1 takes all heads all the same.
        needle: token ids to repeat. None: 32 different tokens drawn from the documents by `seed`.
        needle_start: slot of the first copy; None: after 64 ordinary tokens.
        needle_description: for the record.
        seed: of the drawn needle.
        chunk: tokens of a forward; None takes each document in one pass.

    Raises:
        ValueError: no document, one that is too short, a needle nearer than 64 ordinary tokens to the start, scores
            that are not finite, or a ratio or granularity out of range.
    """
    if not documents:
        raise ValueError("calibration needs at least one document of token ids, got none")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    ids = [_token_ids(document, i) for i, document in enumerate(documents)]
    ratio = default_ratio(model) if ratio is None else ratio
    num_heads, num_kv_heads = head_counts(model.config)
    rank_heads(((0.0,) * num_heads,), ratio, granularity=granularity, num_kv_heads=num_kv_heads)
    _need(rule in RULES, "rule", f"one of {RULES}", rule)
    if needle is None:
        needle = draw_needle(ids, seed=seed)
        needle_description = needle_description or f"{len(needle)} different tokens of the documents, drawn by the seed"
    special = _special_ids(model)
    first = needle_start
    if first is None:
        first = max(_after_ordinary(document, special) for document in ids)
    placed = [place_needle(document, needle, first, special=special) for document in ids]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    per_document: list[Scores] = []
    for document, where in tqdm(placed, desc="calibrate", unit="doc"):
        found = retrieval_scores(model, document, span=slice(*where[:2]), rows=len(needle), chunk=chunk)
        per_document.append(tuple(tuple(found.get(layer, ())) for layer in range(layers)))
    mean = tuple(
        tuple(sum(values) / len(values) for values in zip(*rows, strict=True))
        for rows in zip(*per_document, strict=True)
    )
    bad = [layer for layer, row in enumerate(mean) if not all(map(math.isfinite, row))]
    if bad:
        raise ValueError(f"retrieval scores of layer {bad[0]} are not finite: check the model's weights and dtype")
    heads = rank_heads(mean, ratio, granularity=granularity, num_kv_heads=num_kv_heads)
    result = Calibration(
        scores=mean,
        retrieval_heads=heads,
        ratio=ratio,
        granularity=granularity,
        num_kv_heads=num_kv_heads,
        seed=seed,
        needle=Needle(tuple(map(int, needle)), first, needle_description or "given by the caller"),
        positions=tuple(where for _, where in placed),
        document_hashes=tuple(hashlib.sha256(d.numpy().tobytes()).hexdigest() for d in ids),
        context=tuple(d.numel() for d in ids),
        agreement=agreement(per_document, sum(map(len, heads))) if len(ids) > 1 else None,
        model_name=model.config.base_model_name_or_path,
        model_revision=model.config.base_model_revision,
    ).select(rule=rule)
    logger.info("%d of %d heads retrieve; %s", sum(map(len, heads)), sum(map(len, mean)), result.agreement)
    return result


def _token_ids(document: torch.Tensor | Sequence[int], index: int) -> torch.Tensor:
    ids = torch.as_tensor(document).cpu()
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"document {index}: expected token ids [N], got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.long().contiguous()


def _after_ordinary(document: torch.Tensor, special: Sequence[int]) -> int:
    ordinary = ~torch.isin(document, torch.tensor(list(special), dtype=document.dtype))
    enough = (ordinary.cumsum(0) >= MIN_PREFIX).nonzero()
    return int(enough[0]) + 1 if enough.numel() else document.numel()
