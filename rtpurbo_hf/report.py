"""The report of an adaptation: one JSON, one Markdown table, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VARIANTS = ("dense", "streaming", "rtpurbo")
_ROWS = (
    ("perplexity", "Perplexity (held-out text, decode emulation)", "{:.3f}"),
    ("retrieval_accuracy", "Key-value retrieval, exact match", "{:.1%}"),
    ("top1_agreement", "Top-1 agreement with dense", "{:.1%}"),
    ("kl", "KL to the dense model, nats", "{:.4f}"),
)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['model']}: dense against RTPurbo",
        "",
        f"{report['settings']['context']} tokens, window {report['settings']['sliding_window']}, "
        f"{report['retrieval_heads']} of {report['query_heads']} query heads retrieve.",
        "",
        "| | dense | streaming (no retrieval heads) | RTPurbo |",
        "|---|---|---|---|",
    ]
    for key, title, form in _ROWS:
        cells = [form.format(report[variant][key]) for variant in VARIANTS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    share = report["kv_bytes"] / report["kv_bytes_dense"]
    further = _stages(report) if "after_stage1" in report else []
    lines += [
        f"| KV cache, bytes | {report['kv_bytes_dense']:,} | | {report['kv_bytes']:,} ({share:.1%}) |",
        f"| Tokens selected by retrieval heads | 100% | | {report['selected_fraction']:.1%} |",
        f"| True attention mass kept | 100% | | {report['kept_mass']:.1%} |",
        "",
        *further,
        f"Scored: {report['rows']} rows of text, {report['questions']} questions. "
        f"Device: {report['environment']['device']}. Seconds: {report['seconds']['total']:.0f} in all "
        f"({', '.join(f'{name} {value:.0f}' for name, value in report['seconds'].items() if name != 'total')}).",
        "",
        f"Made with `{report['environment']['command']}`, commit {report['environment']['commit']}.",
        "",
        "![retrieval heads](heads.png)",
        "",
        "![stage 1](losses.png)",
        "",
    ]
    return "\n".join(lines)


def _stages(report: dict[str, Any]) -> list[str]:
    """RTPurbo's figures along the way, against the original dense model."""
    steps = {"before_stage1": "before stage 1", "after_stage1": "after stage 1"}
    if "after_stage2" in report:
        steps |= {"after_stage2": "after stage 2", "rtpurbo": "index refreshed"}
    else:
        steps["rtpurbo"] = "after stage 2"
    lines = [f"| RTPurbo | {' | '.join(steps.values())} |", "|---" * (len(steps) + 1) + "|"]
    share = ("selected_fraction", "Tokens selected by retrieval heads", "{:.1%}")
    for key, title, form in (*_ROWS, share, ("kept_mass", "True attention mass kept", "{:.1%}")):
        cells = [form.format(report[step][key]) for step in steps]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.md` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
