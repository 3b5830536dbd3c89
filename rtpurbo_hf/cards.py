"""Model cards from a report: metadata that the Hub understands, figures that exist, numbers that were measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .modeling.push_rtpurbo import is_hub_id
from .report import _ROWS, VARIANTS
from .wheels import WHEEL_WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

    from .modeling.configuration_rtpurbo import RTPurboConfig

TAGS = ("rtpurbo", "sparse-attention", "long-context", "kv-cache")
MAX_REPORT_BYTES = 16 * 2**20
_CAPTIONS = (
    ("heads", "Retrieval score of every query head; the chosen ones are marked"),
    ("loss", "Loss of the index training"),
    ("kernels", "The kernels against their peers: speed-up and share of the roofline by length"),
    ("prefill", "Prefill time against dense attention"),
    ("decode", "Decode time against dense attention"),
    ("speed", "Speed against dense attention"),
    ("memory", "Memory of the KV cache against a dense one"),
    ("kv", "Memory of the KV cache against a dense one"),
)
_SETTINGS = (
    ("context", "Tokens of context"),
    ("sliding_window", "Window of local heads"),
    ("num_sink_tokens", "Sink tokens"),
    ("index_dim", "Index dimensions"),
    ("index_rotary_dim", "of which rotated"),
    ("index_top_p", "Attention mass to select"),
    ("index_min_tokens", "Tokens selected at least"),
    ("index_block_size", "Tokens in a selected block"),
    ("steps", "Training steps of the index"),
)
_METRICS = (
    ("perplexity", "perplexity", "Perplexity", "held-out-text", "Held-out text"),
    ("retrieval_accuracy", "exact_match", "Exact match", "key-value-retrieval", "Key-value retrieval"),
    ("top1_agreement", "top1_agreement", "Top-1 agreement with dense", "held-out-text", "Held-out text"),
    ("kl", "kl_divergence", "KL(dense || RTPurbo), nats", "held-out-text", "Held-out text"),
)


@dataclass(frozen=True)
class License:
    """Terms of the base model, as the Hub's metadata states them: an identifier, or `other` with name and link."""

    id: str
    name: str | None = None
    link: str | None = None


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a `report.json` and check what a card takes from it.

    Raises:
        ValueError: no such file, too large, not a JSON object, or a field of another type; the message names it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ValueError(f"{path} is larger than {MAX_REPORT_BYTES} bytes: this is no report of ours")
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); `rtpurbo adapt` writes one") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({type(error).__name__}: {error})") from error
    check_report(report)
    return report


def check_report(report: Any) -> None:
    """Raise a `ValueError` that names the first field of `report` with another type than a card expects."""
    if not isinstance(report, dict):
        raise ValueError(f"a report is a JSON object, got {type(report).__name__}")
    if not isinstance(report.get("model"), str) or not report["model"]:
        raise ValueError(f"report: 'model' must name the base model, got {report.get('model')!r:.80}")
    for name in ("settings", "seconds", "environment", "stage1", *VARIANTS):
        if not isinstance(report.get(name, {}), dict):
            raise ValueError(f"report: {name!r} must be an object, got {report[name]!r:.80}")


def _number(value: Any) -> float | int | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _line(value: Any, limit: int = 500) -> str:
    """A value from a report as one line of text that leaves Markdown tables and code fences whole."""
    text = re.sub(r"\s+", " ", re.sub(r"[\x00-\x1f\x7f]", " ", str(value))).strip()
    return text.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")[:limit]


def base_model_id(report: Mapping[str, Any], config: RTPurboConfig | None = None) -> str | None:
    """Hub id of the base model, where config or report tell one."""
    named = [None if config is None else config.base_model_name_or_path, report.get("upstream"), report.get("model")]
    for name in named:
        if name in WHEEL_WEIGHTS:
            return WHEEL_WEIGHTS[name].upstream
        if is_hub_id(name) and not Path(str(name)).exists():
            return name
    return None


def inherited_license(report: Mapping[str, Any]) -> License | None:
    """The base model's licence, where the report states it or a wheel carries the base; else None."""
    stated = report.get("license")
    if isinstance(stated, str) and stated:
        return License(stated)
    weights = WHEEL_WEIGHTS.get(report.get("model", ""))
    return None if weights is None else License(weights.license)


def eval_results(report: Mapping[str, Any]) -> list[Any]:
    """`EvalResult` entries of the numbers that the report really holds."""
    from huggingface_hub import EvalResult

    measured = report.get("rtpurbo", {})
    results = []
    for key, metric, name, dataset, title in _METRICS:
        value = _number(measured.get(key))
        if value is not None:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=title,
                    metric_type=metric,
                    metric_name=name,
                    metric_value=value,
                )
            )
    return results


def card_data(
    report: Mapping[str, Any],
    *,
    title: str,
    config: RTPurboConfig | None = None,
    license: License | None = None,
    datasets: Sequence[str] = (),
    shape: str | None = None,
) -> ModelCardData:
    """The card's metadata. Entries that nothing tells are left out."""
    from huggingface_hub import ModelCardData

    terms = license or inherited_license(report)
    base = base_model_id(report, config)
    data = report.get("data")
    named = [*datasets, *([data] if isinstance(data, str) else data if isinstance(data, list) else [])]
    results = eval_results(report)
    extra: dict[str, Any] = {}
    if base is not None and shape is not None:
        extra["base_model_relation"] = "adapter" if shape == "adapter" else "finetune"
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        datasets=sorted({name for name in named if is_hub_id(name)}) or None,
        license=None if terms is None else terms.id,
        license_name=None if terms is None else terms.name,
        license_link=None if terms is None else terms.link,
        model_name=title if results else None,
        eval_results=results or None,
        **extra,
    )


def figure_caption(name: str) -> str:
    """What a figure shows, by its file name."""
    stem = Path(name).stem.lower()
    return next((caption for key, caption in _CAPTIONS if key in stem), stem.replace("_", " ").replace("-", " "))


def _table(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for key, title, form in _ROWS:
        values = [_number(report.get(variant, {}).get(key)) for variant in VARIANTS]
        if any(value is not None for value in values):
            rows.append([title.replace("|", "\\|"), *("" if value is None else form.format(value) for value in values)])
    ours, dense = _number(report.get("kv_bytes")), _number(report.get("kv_bytes_dense"))
    if ours is not None and dense:
        rows.append(["KV cache, bytes", f"{dense:,}", "", f"{ours:,} ({ours / dense:.1%})"])
    for key, title in (
        ("selected_fraction", "Tokens selected by retrieval heads"),
        ("kept_mass", "True attention mass kept"),
    ):
        value = _number(report.get(key))
        if value is not None:
            rows.append([title, "100%", "", f"{value:.1%}"])
    return rows


def _settings(report: Mapping[str, Any], config: RTPurboConfig | None) -> list[tuple[str, str]]:
    found = []
    for key, title in _SETTINGS:
        value = getattr(config, key, None) if config is not None and key not in ("context", "steps") else None
        value = _number(report.get("settings", {}).get(key)) if value is None else value
        if value is not None:
            found.append((title, f"{value:,}"))
    return found


def _made(report: Mapping[str, Any]) -> dict[str, Any] | None:
    environment = report.get("environment", {})
    facts = []
    for key, title in (("commit", "Commit"), ("date", "Date"), ("device", "Device")):
        if environment.get(key) not in (None, "", "unknown"):
            facts.append((title, _line(environment[key])))
    versions = environment.get("versions")
    if isinstance(versions, dict):
        known = ", ".join(f"{_line(name, 40)} {_line(value, 40)}" for name, value in versions.items() if value)
        facts.append(("Versions", known))
    for key, title in (("data", "Data"), ("seed", "Seed")):
        if report.get(key) is not None:
            facts.append((title, _line(report[key])))
    weights = WHEEL_WEIGHTS.get(report.get("model", ""))
    source = report.get("base_file") or (weights and weights.filename)
    if source:
        facts.append(("Base weights in training and figures", f"dequantised from {_line(source)}"))
    seconds = _number(report.get("seconds", {}).get("total"))
    if seconds is not None:
        facts.append(("Seconds in all", f"{seconds:.0f}"))
    command = environment.get("command")
    if not facts and not command:
        return None
    return {
        "command": _line(command, 2000).replace("\\|", "|").replace("&lt;", "<") if command else None,
        "facts": facts,
    }


def _template() -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here / "hub_cards", here.parent / "hub_cards"):
        if (folder / "model_card.md.jinja").is_file():
            return folder / "model_card.md.jinja"
    raise RuntimeError("the card template hub_cards/model_card.md.jinja is missing: install rtpurbo-hf again")


def render_card(
    report: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    config: RTPurboConfig | None = None,
    figures: Iterable[str] = (),
    license: License | None = None,
    datasets: Sequence[str] = (),
    shape: str | None = None,
) -> ModelCard:
    """The model card of an adaptation.

    Args:
        report: what `rtpurbo adapt` wrote to report.json; only `model` must be there.
        repo_id: where the card will lie, for the loading example.
        config: of the checkpoint; it tells the base model and the settings better than the report.
        figures: paths of pictures relative to the card, in order; only what is listed is shown.
        license: of the base model; None takes what the report tells, and nothing if it tells none.
        datasets: Hub ids of the training data, beside those that the report names.
        shape: `"adapter"` or `"full"`; None says nothing of it.

    Raises:
        ValueError: a malformed report. RuntimeError: jinja2 is not installed.
    """
    from huggingface_hub import ModelCard

    check_report(report)
    settings = report.get("settings", {})
    context = _number(settings.get("context"))
    chosen, total = _number(report.get("retrieval_heads")), _number(report.get("query_heads"))
    rows, questions = _number(report.get("rows")), _number(report.get("questions"))
    window = config.sliding_window if config is not None else _number(settings.get("sliding_window"))
    title = repo_id.rpartition("/")[2] if repo_id else f"{_line(Path(report['model']).name, 80)}-RTPurbo"
    base = base_model_id(report, config)
    data = card_data(report, title=title, config=config, license=license, datasets=datasets, shape=shape)
    try:
        return ModelCard.from_template(
            data,
            template_path=str(_template()),
            title=title,
            model=_line(Path(report["model"]).name, 80),
            base={"name": base, "url": f"https://huggingface.co/{base}"} if base else None,
            repo_id=repo_id or "OWNER/NAME",
            heads=f"{chosen} of {total} query heads" if chosen is not None and total is not None else None,
            window=window,
            shape=shape,
            settings=_settings(report, config),
            rows=_table(report),
            counts=f"Scored: {rows} rows of text, {questions} questions." if rows and questions is not None else None,
            figures=[{"path": path, "caption": figure_caption(path)} for path in figures],
            made=_made(report),
            context=f"{context:,}" if context is not None and _table(report) else None,
        )
    except ImportError as error:
        raise RuntimeError("model cards need jinja2: pip install 'rtpurbo-hf[report]'") from error
