"""Suites over arms: which samples are scored, and which figures come out.

`ppl`, `kl` and `sparsity` share one forward per text block and arm, `passkey` takes one per document, `ruler`
generates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..limits import check_limits
from ..training.data import Document, pack_documents
from .prompts import Example
from .questions import QARecord
from .results import Key, RecordStore, ResultRow, result_row
from .scoring import (
    Arm,
    Record,
    emulate,
    generate_answers,
    passkey_rows,
    profile_prefill,
    score_answer,
    score_passkey,
    score_text,
)
from .tasks import TASKS, generate, passkey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SUITES = ("ruler", "ppl", "kl", "passkey", "sparsity")
# tasks of lm-eval, see harness_tasks.py: part of a plan, but not scored here
HARNESS = "lm-eval"
_TEXT = {
    "ppl": {"perplexity": "nll", "kl": "kl", "top1_agreement": "top1_agreement"},
    "kl": {"kl": "kl", "top1_agreement": "top1_agreement"},
}
SPARSITY_FIGURES = (
    "selected_fraction",
    "active_tokens",
    "oracle_tokens",
    "tokens_over_oracle",
    "kept_mass",
    "compute_sparsity",
    "memory_sparsity",
    "prefill_read",
    "prefill_kept_mass",
    "prefill_kept_low",
)
_FULL_SIZE = 4096
BATCH_TOKENS = 131_072


@dataclass(frozen=True)
class Plan:
    """What to score.

    Attributes:
        suites: names in `SUITES`, or `HARNESS`. lengths: tokens of a sample.
        tasks: RULER-style tasks, names in `TASKS`.
        samples: prompts of each task, and passkey documents. blocks: text blocks.
        rows: scored rows of a text block. seed: of samples and resampling.
        gap: every passkey fact lies at least so far back.
        batch_tokens: prompts of `ruler` are answered together up to so many tokens.

    Raises:
        ValueError: unknown suites or tasks, or numbers out of range.
    """

    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(name for name in TASKS if name != "qa")
    samples: int = 10
    blocks: int = 8
    rows: int = 512
    seed: int = 0
    gap: int = 0
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        known_suites = (*SUITES, HARNESS)
        for what, names, known in (("suite", self.suites, known_suites), ("task", self.tasks, tuple(TASKS))):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ValueError(f"no {what} {', '.join(unknown) or 'was given'}; there are {', '.join(known)}")
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths must be at least 64 tokens each, got {list(self.lengths)}")
        check_limits(self, samples=(1, inf), blocks=(1, inf), batch_tokens=(1, inf))
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2, one to score and its next token, got {self.rows}")

    @property
    def scores_text(self) -> bool:
        return bool({"ppl", "kl", "sparsity"} & set(self.suites))


def task_options(task: str, length: int, qa_data: Sequence[QARecord] | None) -> dict[str, Any]:
    """Options of a task: below 4,096 tokens the lists of words shrink with the length."""
    share = min(length / _FULL_SIZE, 1.0)
    if task == "common_words":
        seldom = 3 if share == 1 else 2
        return {"common": max(round(10 * share), 3), "often": max(round(30 * share), 6), "seldom": seldom}
    if task == "frequent_words":
        return {"kinds": max(round(200 * share), 10)}
    if task == "qa":
        return {"qa_data": list(qa_data or ())}
    return {}


class Evaluation:
    """Scores arms on the samples of a plan, keeping what is done in a store.

    Args:
        arms: what to compare; names must differ. reference: the measure of `kl` and of differences.
        emulated: names of arms that are left out of `ruler`.
        tokenizer: of all arms. documents: held-out text. store: see `RecordStore`.
        qa_data: for task `qa`.

    Raises:
        ValueError: an arm cannot take part in a suite of the plan.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        reference: Arm,
        plan: Plan,
        *,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        store: RecordStore,
        emulated: Sequence[str] = (),
        qa_data: Sequence[QARecord] | None = None,
        progress: bool = True,
    ) -> None:
        self.arms, self.reference, self.plan, self.store = list(arms), reference, plan, store
        self.tokenizer, self.documents, self.qa_data = tokenizer, documents, qa_data
        self._packed: dict[int, torch.Tensor] = {}
        self._haystack = [document.text for document in documents if document.text]
        self._progress = progress
        self._generating = [arm for arm in self.arms if arm.name not in emulated]
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms must have different names, got {names}")
        still = [arm.name for arm in self._generating if not arm.variant.generates]
        if "ruler" in plan.suites and still:
            raise ValueError(
                f"{', '.join(still)}: such selectors exist in decode emulation only and cannot generate, which suite "
                "ruler needs: name them in --emulated instead of --variants, or leave ruler out"
            )
        if "qa" in plan.tasks and not qa_data and "ruler" in plan.suites:
            raise ValueError("task qa needs --qa-data: a SQuAD .json file, or .jsonl of question, answers and context")
        self._sparse = {id(arm.model): arm for arm in self.arms if arm.variant.is_checkpoint}
        for arm in self.arms:
            if arm.variant.needs_equal and id(arm.model) not in self._sparse:
                raise ValueError(f"{arm.name} takes its budget from the variant 'sparse': list that too")

    def keys(self) -> list[Key]:
        """All records that the plan asks for."""
        plan = self.plan
        found: list[Key] = []
        for length in plan.lengths:
            sources: list[tuple[str, str, int, list[Arm]]] = []
            if plan.scores_text:
                sources.append(("text", "block", len(self._blocks(length)), self.arms))
            if "passkey" in plan.suites:
                sources.append(("passkey", "document", plan.samples, self.arms))
            if "ruler" in plan.suites:
                sources += [("ruler", task, plan.samples, self._generating) for task in plan.tasks]
            for suite, task, count, arms in sources:
                found += [(suite, task, length, arm.name, sample) for sample in range(count) for arm in arms]
        return found

    def is_complete(self) -> bool:
        """Whether the store has all records."""
        return all(key in self.store for key in self.keys())

    def run(self) -> None:
        """Score whatever the store does not have yet."""
        plan = self.plan
        with tqdm(total=len(self.keys()), desc="evaluate", disable=not self._progress) as bar:
            for length in plan.lengths:
                if plan.scores_text:
                    self._text(length, bar)
                if "passkey" in plan.suites:
                    self._passkey(length, bar)
                if "ruler" in plan.suites:
                    for task in plan.tasks:
                        self._ruler(length, task, bar)

    def _missing(self, suite: str, task: str, length: int, sample: int, arms: Sequence[Arm], bar) -> list[Arm]:
        """Arms that have no record, those that take their budget from another arm last."""
        missing = [arm for arm in arms if (suite, task, length, arm.name, sample) not in self.store]
        bar.update(len(arms) - len(missing))
        return sorted(missing, key=lambda arm: arm.variant.needs_equal)

    def _equal(self, arm: Arm, suite: str, task: str, length: int, sample: int) -> float | None:
        if not arm.variant.needs_equal:
            return None
        sparse = self._sparse[id(arm.model)]
        return self.store[suite, task, length, sparse.name, sample].selected_tokens

    def _blocks(self, length: int) -> torch.Tensor:
        """Text blocks `[N, length]`; fewer than planned if there is less text."""
        if length not in self._packed:
            count, seed = self.plan.blocks, self.plan.seed
            blocks = pack_documents(
                self.documents, self.tokenizer, length, limit=count, blocks_per_document=2, seed=seed
            )
            if len(blocks) < count:
                logger.warning("the text gives %d blocks of %d tokens, not %d", len(blocks), length, count)
            self._packed[length] = blocks.input_ids
        return self._packed[length]

    def _text(self, length: int, bar) -> None:
        rows = min(self.plan.rows, length - 1)
        for sample, ids in enumerate(self._blocks(length)):
            missing = self._missing("text", "block", length, sample, self.arms, bar)
            if not missing:
                continue
            reference = emulate(self.reference, ids, rows)
            for arm in missing:
                own = reference
                if arm is not self.reference:
                    own = emulate(arm, ids, rows, equal=self._equal(arm, "text", "block", length, sample))
                record = score_text(own, reference.logits, ids)
                if "sparsity" in self.plan.suites:
                    record = Record({**record.sums, **profile_prefill(arm, ids[: length - rows])}, record.heads)
                self.store.put(("text", "block", length, arm.name, sample), record)
                bar.update()

    def _passkey(self, length: int, bar) -> None:
        plan = self.plan
        gap = min(plan.gap, length // 2)
        for sample in range(plan.samples):
            missing = self._missing("passkey", "document", length, sample, self.arms, bar)
            if not missing:
                continue
            block = passkey(
                self.tokenizer, length=length, gap=gap, seed=_seed(plan, sample), haystack_texts=self._haystack
            )
            ids, rows = torch.tensor(block.input_ids), passkey_rows(block)
            for arm in missing:
                equal = self._equal(arm, "passkey", "document", length, sample)
                record = score_passkey(emulate(arm, ids, rows, equal=equal), block)
                self.store.put(("passkey", "document", length, arm.name, sample), record)
                bar.update()

    def _ruler(self, length: int, task: str, bar) -> None:
        plan = self.plan
        batch = max(plan.batch_tokens // length, 1)
        for first in range(0, plan.samples, batch):
            numbers = range(first, min(first + batch, plan.samples))
            wanted = {n: self._missing("ruler", task, length, n, self._generating, bar) for n in numbers}
            if not any(wanted.values()):
                continue
            examples = {n: self._example(task, length, n) for n in numbers if wanted[n]}
            for arm in self._generating:
                todo = [n for n in examples if arm in wanted[n]]
                # qa prompts, and only they, may differ in length
                for group in _by_length(todo, examples):
                    answers = generate_answers(arm, [examples[n] for n in group], self.tokenizer)
                    for n, answer in zip(group, answers, strict=True):
                        record = score_answer(arm, examples[n], answer)
                        self.store.put(("ruler", task, length, arm.name, n), record)
                        bar.update()

    def _example(self, task: str, length: int, sample: int) -> Example:
        return generate(
            task,
            tokenizer=self.tokenizer,
            length=length,
            seed=_seed(self.plan, sample),
            haystack_texts=self._haystack,
            **task_options(task, length, self.qa_data),
        )

    def _records(self, suite: str, task: str, length: int, arm: Arm) -> list[Record]:
        count = self.plan.blocks if suite == "text" else self.plan.samples
        keys = [(suite, task, length, arm.name, sample) for sample in range(count)]
        return [self.store[key] for key in keys if key in self.store]

    def rows(self) -> list[ResultRow]:
        """Figures of all that is in the store, suite by suite in the plan's order."""
        found = []
        for suite in self.plan.suites:
            for length in () if suite == HARNESS else self.plan.lengths:
                found += self._suite_rows(suite, length)
        return found

    def _suite_rows(self, suite: str, length: int) -> list[ResultRow]:
        if suite in _TEXT:
            return self._figures(suite, length, "text", "block", _TEXT[suite])
        if suite == "passkey":
            return self._figures(suite, length, "passkey", "document", {"accuracy": "accuracy"})
        if suite == "ruler":
            by_task = [self._figures(suite, length, "ruler", task, {task: "score"}) for task in self.plan.tasks]
            return [row for rows in by_task for row in rows] + self._averages(length)
        sources = [("text", "text", "block")]
        if "passkey" in self.plan.suites:
            sources.append(("passkey", "passkey", "document"))
        if "ruler" in self.plan.suites:
            sources += [(task, "ruler", task) for task in self.plan.tasks]
        rows = []
        for name, kind, task in sources:
            figures = {f"{name}/{figure}": figure for figure in SPARSITY_FIGURES}
            rows += self._figures(suite, length, kind, task, figures)
        return rows

    def _figures(self, suite: str, length: int, kind: str, task: str, figures: dict[str, str]) -> list[ResultRow]:
        reference = self._records(kind, task, length, self.reference)
        rows = []
        for shown, figure in figures.items():
            for arm in self.arms:
                base = reference if arm is not self.reference and reference else None
                records = self._records(kind, task, length, arm)
                row = result_row((suite, shown, length, arm.name), figure, records, base, seed=self.plan.seed)
                if row is not None:
                    rows.append(row)
        return rows

    def _averages(self, length: int) -> list[ResultRow]:
        """Mean over tasks, sample by sample."""

        def averaged(arm: Arm) -> list[Record]:
            by_task = [self._records("ruler", task, length, arm) for task in self.plan.tasks]
            return [_average(records) for records in zip(*by_task, strict=True)]

        reference = averaged(self.reference)
        rows = []
        for arm in self._generating:
            base = reference if arm is not self.reference and reference else None
            row = result_row(("ruler", "average", length, arm.name), "score", averaged(arm), base, seed=self.plan.seed)
            if row is not None:
                rows.append(row)
        return rows

    def heads(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Mean selected tokens of each retrieval head on the text: by variant, length and layer."""
        found: dict[str, dict[str, dict[str, list[float]]]] = {}
        for arm in self.arms:
            for length in self.plan.lengths:
                records = [r for r in self._records("text", "block", length, arm) if r.heads]
                if records:
                    layers = {
                        layer: torch.tensor([r.heads[layer] for r in records]).mean(0).tolist()
                        for layer in records[0].heads
                    }
                    found.setdefault(arm.name, {})[str(length)] = layers
        return found


def _seed(plan: Plan, sample: int) -> int:
    return 10_000 * plan.seed + sample


def _by_length(numbers: Sequence[int], examples: dict[int, Example]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for n in numbers:
        groups.setdefault(len(examples[n].prompt_ids), []).append(n)
    return list(groups.values())


def _average(records: Sequence[Record]) -> Record:
    names = set.intersection(*(set(record.sums) for record in records))
    sums = {name: [record.sums[name][0] / record.sums[name][1] for record in records] for name in sorted(names)}
    return Record({name: (sum(values), float(len(values))) for name, values in sums.items()})
