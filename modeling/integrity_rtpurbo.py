"""Read weight files with suspicion: what is damaged, missing or of another shape is an error naming file and key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEXER_FILE = "rtpurbo_indexer.safetensors"
_DIGEST = "sha256:"


def is_indexer_key(key: str) -> bool:
    return ".indexer." in key


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each CPU tensor's bytes, as safetensors metadata: the format itself has no check sums."""
    return {_DIGEST + key: _digest(tensor) for key, tensor in tensors.items()}


def load_indexer_file(path: str | Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read an indexer file and compare it with the parameters that it must fill.

    Raises:
        ValueError: unreadable file, a missing or unexpected key, a wrong shape, a value that is not finite, or bytes
            that do not have the digest stored with them; the message names file and key.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): download or save it again") from error
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit this config's retrieval_heads: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, the config asks for {tuple(expected[key].shape)}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} holds values that are not finite floating-point numbers")
        if stored.get(_DIGEST + key, "") not in ("", _digest(tensor)):
            raise ValueError(f"{path}: {key} does not have the digest stored with it: download or save it again")
    return tensors


def check_indexers(tensors: Mapping[str, torch.Tensor], source: object) -> None:
    """Raise a `ValueError` if a loaded indexer holds a value that is not finite."""
    for key, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {key} holds values that are not finite floating-point numbers")


def shard_files(path: Path) -> list[Path]:
    """The files that a weight index names, beside it; `path` itself where it is a weight file.

    Raises:
        ValueError: the index is malformed, or names a file outside its own folder.
    """
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of weight files ({type(error).__name__}): save it again") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}: only .safetensors files beside the index are read")
    return [path.parent / name for name in names]


def explain_damage(files: Iterable[Path], shapes: Mapping[str, torch.Size]) -> None:
    """Raise a `ValueError` that names what is wrong with `files`, if anything is; `shapes` are the model's own."""
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}): download or save it again") from error
        for key, shape in found.items():
            if key in shapes and shapes[key] != shape:
                raise ValueError(f"{path}: {key} has shape {tuple(shape)}, the config asks for {tuple(shapes[key])}")
