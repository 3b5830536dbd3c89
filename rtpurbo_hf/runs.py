"""Output folders of long runs: whose they are, so that an interrupted run goes on and another one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTE = "run.json"


def claim(output: Path, record: dict[str, Any]) -> None:
    """Leave a note in `output` of what runs there.

    Raises:
        ValueError: the folder holds another run's note, or files and no note.
    """
    note = output / NOTE
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
            raise ValueError(f"{output} holds a run with other settings: choose another --output, or remove it")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no run of ours: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
