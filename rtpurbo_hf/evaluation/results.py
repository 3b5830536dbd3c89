"""Records as they come in, result rows made of them, and the files: JSON, Markdown, PNG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bootstrap import Bootstrap, Interval
from .scoring import Record

PARTIAL_FILE = "partial.jsonl"
Key = tuple[str, str, int, str, int]


class RecordStore:
    """Records by (suite, task, length, variant, sample), appended to a file so that a rerun goes on.

    Args:
        path: the file; its first line holds the settings.
        settings: everything that changes a record.

    Raises:
        ValueError: the file holds records of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._records: dict[Key, Record] = {}
        settings = json.loads(json.dumps(settings))
        if path.exists():
            self._read(settings)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")

    def _read(self, settings: dict[str, Any]) -> None:
        text = self._path.read_text(encoding="utf-8")
        # an interrupted write leaves half a line at the end
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole, encoding="utf-8")
        first, *lines = whole.splitlines() or ["{}"]
        found = json.loads(first).get("settings", {})
        other = sorted(name for name in {**found, **settings} if found.get(name) != settings.get(name))
        if other and not lines:
            # a run that ended before its first result
            self._path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        elif other:
            raise ValueError(
                f"{self._path} holds results of other settings ({', '.join(other)}): choose another --output, "
                "or remove it"
            )
        for line in lines:
            row = json.loads(line)
            suite, task, length, variant, sample = row["key"]
            sums = {name: (pair[0], pair[1]) for name, pair in row["sums"].items()}
            self._records[suite, task, length, variant, sample] = Record(sums, row["heads"])

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __getitem__(self, key: Key) -> Record:
        return self._records[key]

    def put(self, key: Key, record: Record) -> None:
        """Keep a record, at once on disk as well."""
        self._records[key] = record
        line = json.dumps({"key": key, **asdict(record)})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


@dataclass(frozen=True)
class ResultRow:
    """One figure of one variant, with its 95 % interval over `n` samples.

    `delta`, `delta_low`, `delta_high`: paired difference to the reference (relative for perplexity); None for the
    reference itself and where it has no such figure. `selected_fraction`: of retrieval heads, None without selection.
    """

    suite: str
    task: str
    length: int
    variant: str
    value: float
    low: float
    high: float
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    selected_fraction: float | None
    n: int


def result_row(
    place: tuple[str, str, int, str],
    figure: str,
    records: Sequence[Record],
    reference: Sequence[Record] | None,
    *,
    seed: int = 0,
    exponential: bool = False,
) -> ResultRow | None:
    """The row of one figure, or None where the records do not have it.

    Args:
        place: suite, task, length, variant. figure: name in `Record.sums`; `"nll"` becomes a perplexity.
        records: of the same samples as `reference`, which is None for the reference itself.
        exponential: the figure is the exponential of the quotient, as `"nll"` always is, and differences are relative.
    """
    if not records or any(figure not in record.sums for record in records):
        return None
    draws = Bootstrap(len(records), seed=seed)
    exponential = exponential or figure == "nll"
    sums = [record.sums[figure] for record in records]
    found = draws.ratio(sums, exponential=exponential)
    delta: Interval | None = None
    if reference is not None and len(reference) == len(records) and all(figure in record.sums for record in reference):
        base = [record.sums[figure] for record in reference]
        delta = draws.difference(sums, base, exponential=exponential)
    selected = None
    if all("selected_fraction" in record.sums for record in records):
        selected = draws.ratio([record.sums["selected_fraction"] for record in records]).value
    return ResultRow(
        *place,
        found.value,
        found.low,
        found.high,
        None if delta is None else delta.value,
        None if delta is None else delta.low,
        None if delta is None else delta.high,
        selected,
        len(records),
    )


def _order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _interval(value: float, low: float, high: float) -> str:
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _table(rows: Sequence[ResultRow], cells: dict[tuple[str, str], str], title: str) -> list[str]:
    """Figures down, variants that have any across."""
    variants = [v for v in _order(row.variant for row in rows) if any(name == v for _, name in cells)]
    lines = ["", f"| {title} | n | {' | '.join(variants)} |", "|---" * (len(variants) + 2) + "|"]
    for task in _order(row.task for row in rows if any(row.task == name for name, _ in cells)):
        count = next(row.n for row in rows if row.task == task)
        lines.append(f"| {task} | {count} | {' | '.join(cells.get((task, v), '-') for v in variants)} |")
    return lines


def markdown(rows: Sequence[ResultRow], meta: dict[str, Any]) -> str:
    """For each suite and length the figures and, but for `sparsity`, their paired differences to the reference."""
    reference = meta["reference"]
    lines = [f"# {meta['checkpoint']}: fidelity", ""]
    lines.append(f"95 % bootstrap intervals over n samples; reference: `{reference}`. {meta['device']}.")
    for suite, length in _order((row.suite, row.length) for row in rows):
        part = [row for row in rows if (row.suite, row.length) == (suite, length)]
        lines += ["", f"## {suite}, {length:,} tokens" if length else f"## {suite}"]
        lines += _table(part, {(r.task, r.variant): _interval(r.value, r.low, r.high) for r in part}, suite)
        deltas = {
            (r.task, r.variant): _interval(r.delta, r.delta_low or 0.0, r.delta_high or 0.0)
            for r in part
            if r.delta is not None and suite != "sparsity"
        }
        if deltas:
            how = "difference to the reference" + (", relative for perplexity" if suite in ("ppl", "lm-eval") else "")
            lines += _table(part, deltas, how)
    command, commit = meta.get("command"), meta.get("commit")
    return "\n".join([*lines, "", f"Made with `{command}`, commit {commit}.", ""])


_PANELS = (
    ("ppl", "perplexity", "perplexity"),
    ("ppl", "kl", "KL to the reference, nats"),
    ("passkey", "accuracy", "passkey, exact match"),
    ("ruler", "average", "RULER-style average"),
    ("sparsity", "text/selected_fraction", "selected part, retrieval heads"),
    ("sparsity", "text/tokens_over_oracle", "tokens / oracle's, equal mass"),
)


def plot(rows: Sequence[ResultRow], path: Path, *, title: str) -> None:
    """The main figures by length, a line for each variant with its interval; needs matplotlib."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any((row.suite, row.task) == panel[:2] for row in rows)]
    if not panels:
        suite, task = rows[0].suite, rows[0].task
        panels = [(suite, task, task)]
    variants = _order(row.variant for row in rows)
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (suite, task, label) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row.suite, row.task) == (suite, task)]
        lengths = sorted({row.length for row in shown})
        for number, variant in enumerate(variants):
            own = sorted((row for row in shown if row.variant == variant), key=lambda row: row.length)
            if own:
                # side by side within a length, so that intervals do not cover each other
                offset = 0.5 * (number / max(len(variants) - 1, 1) - 0.5)
                axis.errorbar(
                    [lengths.index(row.length) + offset for row in own],
                    [row.value for row in own],
                    yerr=[
                        [max(row.value - row.low, 0) for row in own],
                        [max(row.high - row.value, 0) for row in own],
                    ],
                    marker="o",
                    markersize=4,
                    linewidth=1,
                    capsize=2,
                    label=variant,
                    color=f"C{number % 10}",
                )
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_xlim(-0.5, len(lengths) - 0.5)
        axis.set_xlabel("tokens")
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def write_results(
    rows: Sequence[ResultRow], folder: Path, stem: str, *, meta: dict[str, Any], heads: dict[str, Any]
) -> list[Path]:
    """Write `stem`.json (`{"meta", "rows", "heads"}`), .md and, with matplotlib, .png."""
    import importlib.util

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    record = {"meta": meta, "rows": [asdict(row) for row in rows], "heads": heads}
    files[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    files[1].write_text(markdown(rows, meta), encoding="utf-8")
    if rows and importlib.util.find_spec("matplotlib") is not None:
        files.append(folder / f"{stem}.png")
        plot(rows, files[-1], title=f"{meta['checkpoint']}, {meta['device']}, commit {str(meta.get('commit'))[:12]}")
    return files
