"""What a config from a file must pass before any object is built from it: its version, and the sizes it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMAT_VERSION = 1
# from a version to the next: plain values in, plain values out
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_NUMBER = 1 << 40
MAX_ITEMS = 1 << 20
MAX_DEPTH = 32
_SIZES = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "num_labels": 1 << 16,
}


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a stored config of an older format to the present one, step by step.

    Values without a version, or with one that is not of the past, come back as they are.

    Raises:
        ValueError: the version is older than any this code can bring forward.
    """
    migrated = dict(values)
    version = migrated.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool):
        return migrated
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise ValueError(
                f"RTPurboConfig: this checkpoint has format_version {version}, the oldest that this code reads is "
                f"{min([*MIGRATIONS, FORMAT_VERSION])}"
            )
        migrated = MIGRATIONS[version](migrated)
        version += 1
        migrated["format_version"] = version
    return migrated


def check_base_values(values: Mapping[str, Any]) -> None:
    """Refuse a base config whose numbers would build something absurd: some configs fill lists of that length.

    Raises:
        ValueError: a size out of its range, a number beyond 2^40, or values nested too deeply; the message names it.
    """
    budget = [MAX_ITEMS]
    _check(values, "base_config", 0, budget)


def _check(value: Any, path: str, depth: int, budget: list[int]) -> None:
    budget[0] -= 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise ValueError(f"RTPurboConfig: {path} is nested too deeply or holds too many values")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # id2label of a config in memory has integers
            if not isinstance(key, (str, int)):
                raise ValueError(f"RTPurboConfig: {path} has the key {key!r}, expected a string")
            _check_size(key, inner, path)
            _check(inner, f"{path}.{key}", depth + 1, budget)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check(inner, path, depth + 1, budget)
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError(f"RTPurboConfig: {path} is {value!r:.40}, beyond 2^40")


def _check_size(key: str | int, value: Any, path: str) -> None:
    # None means that the family derives the size, a list gives one per layer
    if key not in _SIZES or value is None or isinstance(value, (list, tuple)):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _SIZES[key]:
        raise ValueError(f"RTPurboConfig: {path}.{key} must be an integer in [1, {_SIZES[key]}], got {value!r:.40}")
