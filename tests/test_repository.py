"""What must never be committed: paths of one machine, registry hosts, credentials, large files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A "~" splits each word, so that this file does not hold what it looks for.
FOREIGN = {
    "a path of one machine": r"/(?:ro~ot|wo~rk|ho~me/[a-z]\w*)/",
    "a registry host": r"(?:py~pi|python~hosted|download\.py~torch|deb\.deb~ian|npm~js)\.org",
    "a local registry": r"file:/~//opt/",
    "a credential": r"\b(?:h~f_[A-Za-z0-9]{30,}|gh~[pousr]_[A-Za-z0-9]{30,}|AK~IA[0-9A-Z]{16})\b",
}
FOREIGN = {what: pattern.replace("~", "") for what, pattern in FOREIGN.items()}
LARGEST = 5 * 2**20


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", FOREIGN)
def test_tracked_files_hold_nothing_of_one_machine(tracked, what):
    pattern = re.compile(FOREIGN[what])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked
        for number, line in enumerate(path.read_bytes().decode("utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what} is in\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", "/wo~rk/main/x"),
        ("a path of one machine", "/ro~ot/.cache"),
        ("a registry host", "https://py~pi.org/simple"),
        ("a registry host", "files.python~hosted.org"),
        ("a local registry", "file:/~//opt/x"),
        ("a credential", "h~f_" + "a1" * 17),
    ],
)
def test_the_patterns_find_what_they_are_for(what, text):
    assert re.search(FOREIGN[what], text.replace("~", ""))


def test_tracked_files_are_small(tracked):
    large = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size / 2**20:.1f} MiB" for p in tracked if p.stat().st_size > LARGEST
    ]
    assert not large, "\n".join(large)


def test_build_output_is_not_tracked(tracked):
    names = [path.relative_to(ROOT).parts for path in tracked]
    assert not [parts for parts in names if {"__pycache__", ".venv", "build", "dist"} & set(parts)]
