"""What every benchmark shares: timing, machine ceilings, result rows, and the files they are written to."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Case = Callable[[], Any]
GRAPH_CALLS = 32


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the 10th and 90th percentile of the repeats."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass
class Row:
    """One measured configuration.

    Attributes:
        case: name of the comparison. length: keys. ratio: share of retrieval heads, None if meaningless.
        ms, peer_ms: ours and the peer's median, milliseconds; peer_ms None where there is no peer.
        roofline: share (0 to 1) of the ceiling measured in the same run (FLOPs or bytes); None: not counted.
        extra: what else belongs to the row; without `checked(...)` in it there is no speed-up.
    """

    case: str
    length: int
    ratio: float | None
    ms: float
    peer_ms: float | None = None
    roofline: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """peer_ms / ms, or None without a peer or without a passed check."""
        if self.peer_ms is None or self.extra.get("check") != "ok":
            return None
        return self.peer_ms / self.ms

    def record(self) -> dict[str, Any]:
        """The row as stored; without a passed check it keeps no peer time: no speed-up can be read off."""
        good = self.extra.get("check") == "ok"
        fixed = {
            "case": self.case,
            "length": self.length,
            "ratio": self.ratio,
            "ms": self.ms,
            "peer_ms": self.peer_ms if good else None,
            "roofline": self.roofline,
            "speedup": self.speedup,
        }
        return fixed | {name: value for name, value in self.extra.items() if name not in fixed}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        """The row that `record()` was made of, as far as it was stored."""
        extra = dict(record)
        fixed = {name: extra.pop(name) for name in ("case", "length", "ratio", "ms", "peer_ms", "roofline")}
        extra.pop("speedup", None)
        return cls(**fixed, extra=extra)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """`||out - expected|| / ||expected||` in fp32; NaN and inf anywhere give inf."""
    out, expected = out.float(), expected.float()
    if not bool(torch.isfinite(out).all()):
        return math.inf
    return float((out - expected).norm() / expected.norm().clamp_min(1e-30))


def checked(error: float, tolerance: float) -> dict[str, Any]:
    """The entries of `Row.extra` that say whether the result was right in this run."""
    good = math.isfinite(error) and error <= tolerance
    return {"check": "ok" if good else "red", "checked_error": error, "tolerance": tolerance}


def input_sets(num_bytes: float) -> int:
    """How many copies of the inputs to rotate so that L2 does not serve them: three times its size."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(64, math.ceil(3 * cache / max(num_bytes, 1))))


def capture(cases: Sequence[Case], *, warmup: int = 3) -> torch.cuda.CUDAGraph:
    """One CUDA graph that runs every case in order, captured after `warmup` runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            for case in cases:
                case()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case in cases:
            case()
    return graph


def measure(
    fn: Case | Sequence[Case],
    *,
    graph: bool = False,
    warmup: int = 3,
    repeats: int = 20,
    budget_ms: float | None = None,
) -> Timing:
    """Time one call with CUDA events.

    Args:
        fn: the call, or one call for each of several input sets (`input_sets` says how many), in rotation.
        graph: capture the calls in a CUDA graph, in rotation until it holds `GRAPH_CALLS` of them, as a model's layers
            follow one another, and time its replays: no launch overhead of each call, little of the graph's.
        warmup: untimed rounds before the timed ones (compilation, clocks); 0 suits second-long calls.
        repeats: timed rounds. budget_ms: stop early, after two rounds or more, once they took this long.
    """
    cases = [fn] if callable(fn) else list(fn)
    if not cases or repeats < 1:
        raise ValueError(f"measure needs at least one call and one repeat, got {len(cases)} and {repeats}")
    share = 1
    if graph:
        cases = cases * math.ceil(GRAPH_CALLS / len(cases))
        share = len(cases)
        cases = [capture(cases, warmup=1).replay]
    for turn in range(warmup):
        cases[turn % len(cases)]()
    torch.cuda.synchronize()
    samples: list[float] = []
    if budget_ms is None:
        events = []
        for turn in range(repeats):
            events.append(_timed(cases[turn % len(cases)]))
        torch.cuda.synchronize()
        samples = [first.elapsed_time(last) / share for first, last in events]
    else:
        for turn in range(repeats):
            first, last = _timed(cases[turn % len(cases)])
            last.synchronize()
            samples.append(first.elapsed_time(last) / share)
            if len(samples) >= 2 and sum(samples) * share >= budget_ms:
                break
    samples.sort()
    tenth = len(samples) // 10
    return Timing(statistics.median(samples), samples[tenth], samples[-1 - tenth])


def _timed(call: Case) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    return first, last


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy of 2 GiB, reads and writes counted; measured once."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), repeats=10)
    return 2 * source.numel() / timing.median_ms * 1e3


@functools.cache
def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product of random matrices; measured once."""
    size = 8192
    left, right = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(left)
    timing = measure(lambda: torch.mm(left, right, out=out), warmup=5, repeats=20)
    return 2 * size**3 / timing.median_ms * 1e3


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _command() -> str:
    """The command line, absolute paths cut to their last part."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"
    return " ".join([program, *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])])


def environment() -> dict[str, Any]:
    """Where and with what a result was measured; `RTPURBO_COMMIT` names the commit where there is no git."""
    here = str(Path(__file__).resolve().parent)
    commit = os.environ.get("RTPURBO_COMMIT") or _output_of("git", "-C", here, "rev-parse", "HEAD")
    driver = None
    if torch.cuda.is_available():
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    packages = ("torch", "triton", "transformers", "fa3-fwd", "flash-attn", "rtpurbo-hf")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": driver},
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def table(rows: Sequence[Row], *, extra: Sequence[str] = ("geometry", "batch", "peer", "check")) -> str:
    """The rows as aligned text: fixed columns, then the named entries of `extra` that any row has."""
    shown = [name for name in extra if any(name in row.extra for row in rows)]
    lines = [["case", "length", "ratio", "ms", "peer ms", "speed-up", "roofline", *shown]]
    for row in rows:
        fixed = (row.case, row.length, row.ratio, row.ms, row.peer_ms, row.speedup, row.roofline)
        lines.append([_cell(value) for value in (*fixed, *(row.extra.get(name) for name in shown))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _place(row: Row) -> str:
    """What a row was measured on: geometry, batch, share of retrieval heads."""
    parts = [str(row.extra.get("geometry", ""))]
    if row.extra.get("batch", 1) != 1:
        parts.append(f"batch {row.extra['batch']}")
    if row.ratio is not None:
        parts.append(f"{row.ratio:.0%}")
    return " ".join(part for part in parts if part)


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Speed-up and share of the roofline by length, where rows have them; needs matplotlib.

    One line for a case on what it was measured on, the same in both panels: colours are cases, or where there are
    several places these, with a mark for each case.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    known = (("speed-up over the peer", "speedup"), ("share of the measured ceiling", "roofline"))
    panels = [panel for panel in known if any(getattr(row, panel[1]) is not None for row in rows)] or known[:1]
    cases, places = (list(dict.fromkeys(names)) for names in ([r.case for r in rows], [_place(r) for r in rows]))
    by_place = len({(row.case, _place(row)) for row in rows}) > 10
    colour = {name: f"C{i % 10}" for i, name in enumerate(places if by_place else cases)}
    mark = {name: "os^vDPX*<>"[i % 10] for i, name in enumerate(cases if by_place else places)}
    size = (6.5 * len(panels), 5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, name) in zip(axes[0], panels, strict=True):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            value = getattr(row, name)
            if value is not None:
                lines.setdefault((row.case, _place(row)), []).append((row.length, value))
        for (case, place), points in lines.items():
            coloured, marked = (place, case) if by_place else (case, place)
            style = {"color": colour[coloured], "marker": mark[marked], "label": f"{case} {place}".strip()}
            axis.plot(*zip(*sorted(points), strict=True), markersize=5, **style)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if by_place:
            shown = [Line2D([], [], color=colour[each], label=each) for each in places]
            drawn = {case for case, _ in lines}
            shown += [
                Line2D([], [], color="grey", marker=mark[each], linestyle="", label=each)
                for each in cases
                if each in drawn
            ]
            axis.legend(handles=shown, fontsize=7)
        elif lines:
            axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(
    rows: Sequence[Row], path: str | Path, *, meta: dict[str, Any] | None = None, figure: bool = True
) -> list[Path]:
    """Write `path`.json (`{"meta", "rows"}`), .csv and, with matplotlib and `figure`, .png; `path` has no suffix."""
    base = Path(path)
    base.parent.mkdir(parents=True, exist_ok=True)
    meta = environment() if meta is None else meta
    records = [row.record() for row in rows]
    files = [base.with_name(base.name + ".json"), base.with_name(base.name + ".csv")]
    files[0].write_text(json.dumps({"meta": meta, "rows": records}, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for record in records for name in record))
    with files[1].open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(records)
    if figure and _version("matplotlib") is not None:
        files.append(base.with_name(base.name + ".png"))
        plot(rows, files[-1], title=f"{meta.get('device')}, commit {str(meta.get('commit'))[:12]}")
    return files
