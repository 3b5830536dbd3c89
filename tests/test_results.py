"""Committed measurements say how they were made, and the commands that make them again are there and can be read."""

import json
import re
import shlex
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import typer

from rtpurbo_hf.cli import app

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
RECORDS = sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*/report.json")])
PROGRAMS = ("rtpurbo ", "python -m rtpurbo_hf.")


def documented():
    """The commands of docs/results.md."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), re.DOTALL)
    return [
        shlex.join(shlex.split(line)) for block in blocks for line in block.replace("\\\n", "").splitlines() if line
    ]


def problems(record):
    """What a record lacks to be made again."""
    found = record.get("meta") or record.get("environment") or {}
    if not (isinstance(found.get("device"), str) and found["device"]):
        yield "device"
    if not all((found.get("versions") or {}).get(name) for name in ("torch", "transformers", "python")):
        yield "versions"
    if not re.fullmatch(r"[0-9a-f]{40}", str(found.get("commit"))):
        yield "commit"
    if not str(found.get("command")).startswith(PROGRAMS):
        yield "command"
    try:
        datetime.fromisoformat(str(found.get("date")))
    except ValueError:
        yield "date"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_result_names_device_versions_commit_and_command(path):
    assert list(problems(json.loads(path.read_text(encoding="utf-8")))) == []


def test_what_is_missing_is_named():
    good = json.loads(RECORDS[0].read_text(encoding="utf-8"))["meta"]
    assert list(problems({"meta": {**good, "commit": "unknown"}})) == ["commit"]
    assert list(problems({"meta": {**good, "versions": {"torch": None}, "command": "x.py"}})) == ["versions", "command"]
    assert list(problems({"rows": []})) == ["device", "versions", "commit", "command", "date"]


def test_every_result_is_listed():
    listed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    names = [path.name if path.is_dir() else path.stem for path in RESULTS.iterdir()]
    assert len(names) > 5
    assert [name for name in names if name not in listed] == []


def leaf(words):
    """The command that the words name, with the words parsed as its options."""
    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(command.name, words)


def test_documented_commands_can_be_read():
    commands = documented()
    assert len(commands) > 8
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "rtpurbo"
        context = leaf(words)
        assert context.params["output"] is not None
    with pytest.raises(Exception, match="No such option"):
        leaf(["bench", "kernels", "--presets", "paper"])


def test_the_makefile_runs_the_documented_commands():
    if shutil.which("make") is None:
        pytest.skip("no make")
    lines = []
    for target in ("demo", "results"):
        command = ["make", "-n", "--always-make", target, "RTPURBO=rtpurbo", "BIN="]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        lines += [
            line.removeprefix("/") for line in done.stdout.splitlines() if line.startswith(("rtpurbo", "/rtpurbo"))
        ]
    assert sorted(set(map(shlex.join, map(shlex.split, lines)))) == sorted(documented())
