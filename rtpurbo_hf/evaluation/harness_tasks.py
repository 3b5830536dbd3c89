"""Tasks of EleutherAI's lm-evaluation-harness by name, answered by our models through its own `HFLM`.

The package `lm_eval` is optional. Every document's metrics are kept in the store, so that a task that was answered is
not answered again, and intervals and paired differences are those of the other suites.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import RecordStore, ResultRow, result_row
from .scoring import Arm, Record
from .suites import HARNESS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DOCUMENTS = "documents"
_SUMMARY = -1
_LENGTH = 0
# of standard errors that lm-eval resamples; where documents give the figure, intervals are our own
_ITERATIONS = 1000
# How an aggregate follows from the sums of documents: mean, perplexity of log-likelihoods, bits of them.
_FORMS = ((1.0, False), (-1.0, True), (-1 / math.log(2), False))


@dataclass(frozen=True)
class HarnessPlan:
    """Which tasks, and how they are asked.

    Attributes:
        tasks: names that lm-eval knows: tasks, groups or tags.
        limit: documents of each task; None: all. shots: examples before each question; None: the task's own number.
        include: folder with further task files (YAML).

    Raises:
        ValueError: no task, or numbers out of range.
        RuntimeError: the package lm_eval is not installed.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    include: Path | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("--lm-eval: no task was given; e.g. --lm-eval arc_easy,hellaswag")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1 document, got {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"--shots must be 0 or more, got {self.shots}")
        if self.include is not None and not Path(self.include).is_dir():
            raise ValueError(f"--lm-eval-include {self.include}: there is no such folder")
        if importlib.util.find_spec("lm_eval") is None:
            raise RuntimeError("--lm-eval needs the package lm_eval: pip install lm-eval (or 'rtpurbo-hf[eval]')")

    def name(self, task: str) -> str:
        """A task with what changes its documents or prompts: its name in the store."""
        parts = [task, "" if self.limit is None else f"limit={self.limit}"]
        parts.append("" if self.shots is None else f"shots={self.shots}")
        return "?".join(filter(None, parts))

    def described(self) -> dict[str, Any]:
        """For the results' meta data."""
        return {"tasks": list(self.tasks), "limit": self.limit, "shots": self.shots, "version": version("lm_eval")}


class HarnessTasks:
    """Scores arms on the tasks of a plan, keeping what is done in the store.

    Args:
        arms: see `Evaluation`; all of them generate. reference: the measure of differences.
        plan: what is asked. tokenizer: of all arms. store: see `RecordStore`.
        length: longer prompts are cut from the left. batch_tokens: prompts are answered together up to so many tokens.
        seed: of few-shot examples and resampling.

    Raises:
        ValueError: lm-eval knows no task of a name, or an arm cannot generate.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        reference: Arm,
        plan: HarnessPlan,
        *,
        tokenizer: PreTrainedTokenizerBase,
        store: RecordStore,
        length: int,
        batch_tokens: int,
        seed: int = 0,
    ) -> None:
        from lm_eval.tasks import TaskManager

        still = [arm.name for arm in arms if not arm.variant.generates]
        if still:
            raise ValueError(
                f"{', '.join(still)}: such selectors exist in decode emulation only, which lm-eval does not run: name "
                "them in --emulated instead of --variants"
            )
        self._arms, self._reference, self._plan, self._store = list(arms), reference, plan, store
        self._tokenizer, self._length, self._seed = tokenizer, length, seed
        self._batch = max(batch_tokens // length, 1)
        include = None if plan.include is None else str(plan.include)
        # reading lm-eval's own thousands of task files takes long, and is not needed for tasks of the user's
        self._manager = TaskManager(include_path=include, include_defaults=include is None)
        if any(not self._manager.match_tasks([task]) for task in plan.tasks):
            self._manager = TaskManager(include_path=include)
        unknown = [task for task in plan.tasks if not self._manager.match_tasks([task])]
        if unknown:
            raise ValueError(
                f"--lm-eval: lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
                "--lm-eval-include adds a folder of task files"
            )

    def run(self) -> None:
        """Answer what the store does not have yet."""
        for arm in self._arms:
            for task in self._plan.tasks:
                if (HARNESS, self._plan.name(task), _LENGTH, arm.name, _SUMMARY) not in self._store:
                    self._answer(arm, task)

    def _answer(self, arm: Arm, task: str) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logger.info("lm-eval: %s, %s", arm.name, task)
        with arm.variant.applied(arm.model):
            harness = HFLM(
                pretrained=arm.model,
                tokenizer=self._tokenizer,
                batch_size=self._batch,
                max_length=self._length,
                device=str(arm.model.device),
            )
            found = simple_evaluate(
                harness,
                tasks=[task],
                num_fewshot=self._plan.shots,
                limit=self._plan.limit,
                task_manager=self._manager,
                log_samples=True,
                bootstrap_iters=_ITERATIONS,
                random_seed=self._seed,
                numpy_random_seed=self._seed,
                torch_random_seed=self._seed,
                fewshot_random_seed=self._seed,
            )
        documents = _documents(found["samples"])
        place = (HARNESS, self._plan.name(task), _LENGTH, arm.name)
        for number, sums in enumerate(documents):
            self._store.put((*place, number), Record(sums))
        # last: its presence says that the task was answered
        self._store.put((*place, _SUMMARY), Record(_aggregates(found["results"], len(documents))))

    def rows(self) -> list[ResultRow]:
        """A row for each metric that lm-eval reports, task by task; its length is 0, as prompts have their own."""
        return [row for task in self._plan.tasks for row in self._rows(task)]

    def _rows(self, task: str) -> Iterator[ResultRow]:
        reference = self._records(task, self._reference)
        figures = [name for arm in self._arms for name in self._records(task, arm)[0].sums if name != _DOCUMENTS]
        for figure in dict.fromkeys(figures):
            for arm in self._arms:
                summary, *documents = self._records(task, arm)
                if figure not in summary.sums:
                    continue
                value, error = summary.sums[figure]
                place = (HARNESS, figure, _LENGTH, arm.name)
                base = None if arm is self._reference or not reference else reference
                own = [record for record in documents if figure in record.sums]
                form = _form(own, figure, value)
                if form is None:
                    yield _plain_row(place, value, error, base[0].sums.get(figure) if base else None, len(own))
                    continue
                others = None if base is None else [record for record in base[1:] if figure in record.sums]
                row = result_row(
                    place,
                    figure,
                    _scaled(own, figure, form[0]),
                    None if others is None else _scaled(others, figure, form[0]),
                    seed=self._seed,
                    exponential=form[1],
                )
                if row is not None:
                    yield row

    def _records(self, task: str, arm: Arm) -> list[Record]:
        """The summary, and a record for each document; nothing where the arm was not scored."""
        place = (HARNESS, self._plan.name(task), _LENGTH, arm.name)
        if (*place, _SUMMARY) not in self._store:
            return []
        summary = self._store[(*place, _SUMMARY)]
        return [summary, *(self._store[(*place, n)] for n in range(int(summary.sums[_DOCUMENTS][0])))]


def _figure(task: str, metric: str, filter_name: str) -> str:
    return f"{task}/{metric}" if filter_name == "none" else f"{task}/{metric},{filter_name}"


def _documents(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, tuple[float, float]]]:
    """Metrics of the n-th document of every task as pairs; those that are no numbers are left out."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for task, answers in samples.items():
        places: dict[Any, int] = {}
        for answer in sorted(answers, key=lambda answer: answer["doc_id"]):
            number = places.setdefault(answer["doc_id"], len(places))
            for metric in answer["metrics"]:
                pair = _pair(answer[metric])
                if pair is not None:
                    found.setdefault(number, {})[_figure(task, metric, answer["filter"])] = pair
    return [found.get(number, {}) for number in range(max(found, default=-1) + 1)]


def _pair(value: Any) -> tuple[float, float] | None:
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(value, list | tuple):
            top, bottom = value
            return float(top), float(bottom)
        return float(value), 1.0
    return None


def _aggregates(results: dict[str, dict[str, Any]], documents: int) -> dict[str, tuple[float, float]]:
    """What lm-eval itself reports: `{figure: (value, standard error or 0)}`, and how many documents are stored."""
    found: dict[str, tuple[float, float]] = {_DOCUMENTS: (float(documents), 1.0)}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            found[_figure(task, metric, filter_name)] = (
                float(value),
                float(error) if isinstance(error, int | float) else 0.0,
            )
    return found


def _form(records: Sequence[Record], figure: str, value: float) -> tuple[float, bool] | None:
    """Which of the known forms gives lm-eval's own aggregate from the documents; None: another one."""
    bottom = sum(record.sums[figure][1] for record in records)
    if not records or not bottom:
        return None
    ratio = sum(record.sums[figure][0] for record in records) / bottom
    for factor, exponential in _FORMS:
        with contextlib.suppress(OverflowError):
            if math.isclose(math.exp(factor * ratio) if exponential else factor * ratio, value, rel_tol=1e-6):
                return factor, exponential
    return None


def _scaled(records: Sequence[Record], figure: str, factor: float) -> list[Record]:
    return [Record({figure: (factor * record.sums[figure][0], record.sums[figure][1])}) for record in records]


def _plain_row(
    place: tuple[str, str, int, str], value: float, error: float, base: tuple[float, float] | None, count: int
) -> ResultRow:
    """Groups, and metrics that are no ratio of sums: lm-eval's value and standard error (0: none), unpaired."""
    half = 1.96 * error
    if base is None:
        return ResultRow(*place, value, value - half, value + half, None, None, None, None, count)
    delta, half_delta = value - base[0], 1.96 * math.hypot(error, base[1])
    return ResultRow(
        *place, value, value - half, value + half, delta, delta - half_delta, delta + half_delta, None, count
    )
