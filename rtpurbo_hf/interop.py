"""Head patterns of other projects: RTP-LLM's `headwise_config`, DuoAttention's pattern TSV, and a plain JSON of heads.

All readers take files from strangers: size, types, ranges, duplicates and shapes are checked before anything is built,
and whatever is wrong ends in a `ValueError` that names file and field.

Windows are counted differently. Ours and DuoAttention's (`recent_size`) count the query itself; RTP-LLM's
`swa_token_num` is the greatest distance, so that its window covers one more key than the number says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .modeling.configuration_rtpurbo import MAX_POSITIONS, RTPurboConfig
from .modeling.families_rtpurbo import full_attention_layers, head_counts
from .modeling.versions_rtpurbo import MAX_HEADS, MAX_LAYERS

MAX_FILE_BYTES = 32 * 2**20
MAX_SINKS = 1024
FORMATS = ("auto", "headwise", "duo", "json")
# RTP-LLM's own values where a file leaves them out
_HEADWISE_DEFAULTS = {"sink_token_num": 4, "swa_token_num": 8192, "seqlen_threshold": 16384}
_PLAIN = ("retrieval_heads", "sliding_window", "num_sink_tokens", "dense_below")


@dataclass(frozen=True)
class HeadPattern:
    """Which heads retrieve, and what the others see, in our terms.

    Attributes:
        retrieval_heads: per layer, the sorted query heads that keep the whole context.
        sliding_window: tokens that a local head sees, its own included; None if the source does not tell.
        num_sink_tokens: first tokens that every local head sees; None if the source does not tell.
        dense_below: length below which everything is dense (0: never); None if the source does not tell.
    """

    retrieval_heads: tuple[tuple[int, ...], ...]
    sliding_window: int | None = None
    num_sink_tokens: int | None = None
    dense_below: int | None = None

    def only(self, layers: Collection[int]) -> HeadPattern:
        """The same pattern, without heads in other layers than these."""
        kept = tuple(heads if layer in layers else () for layer, heads in enumerate(self.retrieval_heads))
        return replace(self, retrieval_heads=kept)

    def options(self) -> dict[str, Any]:
        """Fields of `RTPurboConfig` that the pattern sets; `dense_below` only where the source tells it."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return {**found, "retrieval_heads": [list(heads) for heads in self.retrieval_heads]}


def _need(condition: bool, what: str, expected: str, given: Any) -> None:
    if not condition:
        shown = repr(given)
        raise ValueError(f"{what} must be {expected}, got {shown if len(shown) < 80 else shown[:77] + '...'}")


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _shape(num_layers: int, num_heads: int) -> None:
    _need(_whole(num_layers, 1, MAX_LAYERS), "num_layers", f"an integer in [1, {MAX_LAYERS}]", num_layers)
    _need(_whole(num_heads, 1, MAX_HEADS), "num_heads", f"an integer in [1, {MAX_HEADS}]", num_heads)


def export_headwise(config: RTPurboConfig) -> dict[str, Any]:
    """The `headwise_config` entry of RTP-LLM for a model.

    Layers that this method does not convert (native sliding windows, linear attention) are left out. The engine then
    serves the head-wise part: retrieval heads dense, local heads with sinks and window; it has no index, so that
    nothing is selected within retrieval heads.

    Raises:
        ValueError: no retrieval heads are chosen yet, or a window below 2, which RTP-LLM cannot express.
    """
    if config.retrieval_heads is None:
        raise ValueError("no retrieval heads are chosen yet: calibrate first (`rtpurbo calibrate`)")
    if config.sliding_window < 2:
        raise ValueError(
            f"sliding_window = {config.sliding_window} cannot be exported: RTP-LLM's smallest window holds 2 tokens"
        )
    num_heads = head_counts(config)[0]
    exported: dict[str, Any] = {
        "sink_token_num": config.num_sink_tokens,
        "swa_token_num": config.sliding_window - 1,
        "seqlen_threshold": getattr(config, "dense_below", 0),
    }
    for layer in sorted(full_attention_layers(config.base_config)):
        chosen = set(config.retrieval_heads[layer])
        exported[str(layer)] = [int(head in chosen) for head in range(num_heads)]
    return exported


def import_headwise(record: Any, *, num_layers: int, num_heads: int) -> HeadPattern:
    """Read RTP-LLM's `headwise_config`, or a `config.json` that holds one.

    Args:
        record: parsed JSON. num_layers, num_heads: layers and query heads of the model it is for.

    A layer that is missing is all retrieval, as in RTP-LLM. Missing numbers take RTP-LLM's defaults.

    Raises:
        ValueError: another type, an unknown field, a value other than 0 or 1, or a row of another length.
    """
    _shape(num_layers, num_heads)
    _need(isinstance(record, Mapping), "headwise_config", "a JSON object", record)
    if "headwise_config" in record:
        record = record["headwise_config"]
        _need(isinstance(record, Mapping), "headwise_config", "a JSON object", record)
    numbers = {}
    for name, default in _HEADWISE_DEFAULTS.items():
        low, high = {"sink_token_num": (0, MAX_SINKS), "swa_token_num": (1, MAX_POSITIONS - 1)}.get(
            name, (0, MAX_POSITIONS)
        )
        value = record.get(name, default)
        _need(_whole(value, low, high), f"headwise_config.{name}", f"an integer in [{low}, {high}]", value)
        numbers[name] = value
    layers = {key: row for key, row in record.items() if key not in _HEADWISE_DEFAULTS}
    _need(bool(layers), "headwise_config", "an object with a list for each layer", dict(record))
    known = {str(layer) for layer in range(num_layers)}
    for key in layers:
        _need(key in known, "headwise_config: a layer", f"a decimal number in [0, {num_layers})", key)
    heads = []
    for layer in range(num_layers):
        row = layers.get(str(layer), [1] * num_heads)
        name = f"headwise_config[{layer}]"
        _need(isinstance(row, list) and len(row) == num_heads, name, f"a list of {num_heads} numbers", row)
        # other values leave rows of the engine's output unwritten
        _need(all(_whole(value, 0, 1) for value in row), name, "a list of 0 and 1", row)
        heads.append(tuple(head for head, value in enumerate(row) if value))
    return HeadPattern(
        tuple(heads),
        sliding_window=numbers["swa_token_num"] + 1,
        num_sink_tokens=numbers["sink_token_num"],
        dense_below=numbers["seqlen_threshold"],
    )


def import_duo(
    text: str,
    *,
    num_layers: int,
    num_heads: int,
    threshold: float | None = None,
    sparsity: float | None = None,
    settings: Any = None,
) -> HeadPattern:
    """Read DuoAttention's `full_attention_heads.tsv`: a line per layer, a gate value per KV head, tab-separated.

    Gates are clipped to [0, 1]. A KV head whose gate passes makes all query heads of its group retrieval heads.

    Args:
        text: the file. num_layers, num_heads: layers and query heads of the model it is for.
        threshold: gates of at least this value are kept (0.5 if neither is given).
        sparsity: or, the part of all KV heads that becomes local; ties go to the earlier layer and head, so that a file
            always gives the same heads.
        settings: parsed `config.json` beside it (`sink_size`, `recent_size`), or None.

    Raises:
        ValueError: both choices, a line of another length, something that is not a finite number, or other shapes.
    """
    _shape(num_layers, num_heads)
    if threshold is not None and sparsity is not None:
        raise ValueError("give threshold or sparsity, not both")
    for name, value in (("threshold", threshold), ("sparsity", sparsity)):
        good = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1)
        _need(good, name, "a number in [0, 1]", value)
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    _need(len(lines) == num_layers, "the pattern", f"{num_layers} lines, one per layer", len(lines))
    gates = [_gates(line, layer, num_heads) for layer, line in enumerate(lines)]
    widths = {len(row) for row in gates}
    _need(len(widths) == 1, "the pattern", "equally many values on each line", sorted(widths))
    width = widths.pop()
    _need(num_heads % width == 0, "the pattern's KV heads", f"a divisor of {num_heads} query heads", width)
    if sparsity is None:
        limit = 0.5 if threshold is None else threshold
        kept = {(i, j) for i, row in enumerate(gates) for j, gate in enumerate(row) if gate >= limit}
    else:
        order = sorted((-gate, i, j) for i, row in enumerate(gates) for j, gate in enumerate(row))
        kept = {(i, j) for _, i, j in order[: len(order) - round(sparsity * len(order))]}
    group = num_heads // width
    heads = tuple(tuple(h for h in range(num_heads) if (layer, h // group) in kept) for layer in range(num_layers))
    sinks = window = None
    if settings is not None:
        _need(isinstance(settings, Mapping), "config.json beside the pattern", "a JSON object", settings)
        sinks, window = settings.get("sink_size"), settings.get("recent_size")
        _need(sinks is None or _whole(sinks, 0, MAX_SINKS), "sink_size", f"an integer in [0, {MAX_SINKS}]", sinks)
        _need(window is None or _whole(window, 1, MAX_POSITIONS), "recent_size", "a positive integer", window)
    return HeadPattern(heads, sliding_window=window, num_sink_tokens=sinks)


def _gates(line: str, layer: int, num_heads: int) -> list[float]:
    cells = line.split("\t")
    _need(len(cells) <= num_heads, f"line {layer + 1}", f"at most {num_heads} values", len(cells))
    values = []
    for cell in cells:
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        _need(math.isfinite(value), f"line {layer + 1}", "finite numbers, separated by tabs", cell)
        values.append(min(max(value, 0.0), 1.0))
    return values


def import_plain(record: Any, *, num_layers: int, num_heads: int) -> HeadPattern:
    """Read a plain JSON of heads: a list per layer, or `{"retrieval_heads": ...}` with our config's names beside it.

    `retrieval_heads` may also be an object `{"layer": [heads]}`; layers that it leaves out have none. A
    calibration.json or a config.json of ours fits as well: other fields are left alone.

    Raises:
        ValueError: another type, a layer or head out of range, or one named twice.
    """
    _shape(num_layers, num_heads)
    options: dict[str, int] = {}
    if isinstance(record, Mapping) and "retrieval_heads" in record:
        for name, low, high in zip(_PLAIN[1:], (1, 0, 0), (MAX_POSITIONS, MAX_SINKS, MAX_POSITIONS), strict=True):
            if record.get(name) is not None:
                _need(_whole(record[name], low, high), name, f"an integer in [{low}, {high}]", record[name])
                options[name] = record[name]
        record = record["retrieval_heads"]
    if isinstance(record, Mapping):
        known = {str(layer) for layer in range(num_layers)}
        for key in record:
            _need(key in known, "retrieval_heads: a layer", f"a decimal number in [0, {num_layers})", key)
        record = [record.get(str(layer), []) for layer in range(num_layers)]
    _need(isinstance(record, (list, tuple)), "retrieval_heads", "a list per layer", record)
    _need(len(record) == num_layers, "retrieval_heads", f"{num_layers} lists, one per layer", len(record))
    heads = []
    for layer, row in enumerate(record):
        name = f"retrieval_heads[{layer}]"
        _need(isinstance(row, (list, tuple)), name, "a list of heads", row)
        _need(all(_whole(head, 0, num_heads - 1) for head in row), name, f"heads in [0, {num_heads})", row)
        _need(len(set(row)) == len(row), name, "without duplicates", row)
        heads.append(tuple(sorted(row)))
    return HeadPattern(tuple(heads), **options)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES} bytes: this is no list of heads")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} occurs twice")
        found[name] = value
    return found


def parse_json(text: str, source: object) -> Any:
    """JSON with duplicate keys, NaN and too deep nesting refused.

    Raises:
        ValueError: names `source`.
    """

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not readable JSON: {error}") from error


def load_heads(
    path: str | Path,
    *,
    num_layers: int,
    num_heads: int,
    format: str = "auto",
    threshold: float | None = None,
    sparsity: float | None = None,
) -> HeadPattern:
    """Read a head pattern of any known format from a file.

    Args:
        path: the file; for `"duo"` also the folder of `full_attention_heads.tsv` and `config.json`.
        num_layers, num_heads: layers and query heads of the model it is for.
        format: `"headwise"`, `"duo"`, `"json"`, or `"auto"`: by name and content.
        threshold, sparsity: see `import_duo`.

    Raises:
        ValueError: see the readers; the message begins with the path.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    if path.is_dir():
        path = path / "full_attention_heads.tsv"
    text = _read(path)
    size = {"num_layers": num_layers, "num_heads": num_heads}
    try:
        if format == "duo" or (format == "auto" and path.suffix == ".tsv"):
            beside = path.with_name("config.json")
            settings = parse_json(_read(beside), beside) if beside.is_file() else None
            return import_duo(text, **size, threshold=threshold, sparsity=sparsity, settings=settings)
        record = parse_json(text, path.name)
        if format == "auto":
            headwise = isinstance(record, Mapping) and (
                "headwise_config" in record or bool(set(record) & set(_HEADWISE_DEFAULTS))
            )
            format = "headwise" if headwise else "json"
        return (import_headwise if format == "headwise" else import_plain)(record, **size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
