"""The result file of a benchmark that is run in parts: written after every row, so that a run cut off loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import Row, write

SAME = ("device", "versions", "preset")
IDENTITY = ("shape", "layers", "geometry", "batch")


def _key(row: Row) -> tuple:
    return (row.case, row.length, row.ratio, *(row.extra.get(name) for name in IDENTITY))


class Results:
    """Rows on their way to `path`.json and .csv (`path` has no suffix), beside those that earlier parts left there.

    Each row names the commit that it was measured at; the file's own is that of the last part.

    Raises:
        ValueError: the file holds rows of another device, preset or of other versions.
    """

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.path, self.meta = path, meta
        self.kept: list[Row] = []
        self.new: list[Row] = []
        file = path.with_name(path.name + ".json")
        if file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            for name in SAME:
                if stored["meta"].get(name) != meta.get(name):
                    raise ValueError(
                        f"{file.name} was measured with another {name} ({stored['meta'].get(name)!r}, now "
                        f"{meta.get(name)!r}): choose another --name or --output, or move the file away"
                    )
            self.kept = [Row.from_record(record) for record in stored["rows"]]
            for row in self.kept:
                row.extra.setdefault("commit", stored["meta"].get("commit"))
            before = stored["meta"].get("commands", [stored["meta"].get("command")])
            self.meta = {**meta, "commands": [*before, meta.get("command")]}

    @property
    def rows(self) -> list[Row]:
        """Earlier parts' rows that were not measured again, then this run's."""
        again = {_key(row) for row in self.new}
        return [row for row in self.kept if _key(row) not in again] + self.new

    def add(self, row: Row) -> None:
        """Take a row, in place of an earlier one of the same case, and store everything so far."""
        row.extra["commit"] = self.meta.get("commit")
        self.new = [other for other in self.new if _key(other) != _key(row)] + [row]
        write(self.rows, self.path, meta=self.meta, figure=False)

    def close(self) -> list[Row]:
        """Store everything with its figure; all rows of the file."""
        write(self.rows, self.path, meta=self.meta)
        return self.rows
