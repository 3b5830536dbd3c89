"""Texts of this machine as `.jsonl` files, one for each source: the same documents for a machine that lacks them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .training.corpora import SYSTEM_SOURCES, parts_at_blank_lines

MIN_CHARS = 1000


def corpus_documents(source: str, chars: int) -> Iterator[tuple[str, str]]:
    """`(id, text)` of a source's texts, joined in their order and cut at blank lines into about `chars` characters.

    Raises:
        ValueError: no such source, or parts of less than 1,000 characters.
    """
    if source not in SYSTEM_SOURCES:
        raise ValueError(f"no source {source!r}; there are {', '.join(SYSTEM_SOURCES)}")
    if chars < MIN_CHARS:
        raise ValueError(f"parts must have at least {MIN_CHARS} characters, got {chars}")
    joined = "\n\n".join(text.strip() for _, text in SYSTEM_SOURCES[source]())
    if not joined:
        return
    parts = parts_at_blank_lines(joined, chars)
    # the last part may be a few lines
    for number, part in enumerate(parts[:-1] if len(parts) > 1 else parts):
        yield f"{source}/{number:04d}", part


def write_corpus(output: str | Path, *, chars: int, sources: tuple[str, ...] | None = None) -> dict[Path, int]:
    """Write `SOURCE.jsonl` (rows of `id` and `text`) for each source that this machine has.

    Args:
        output: folder. chars: characters of a document, about. sources: names; None: all.

    Returns:
        The files written, with their numbers of documents.

    Raises:
        ValueError: a source that does not exist, parts too short, or nothing was found.
    """
    folder = Path(output)
    written: dict[Path, int] = {}
    for source in sources or tuple(SYSTEM_SOURCES):
        rows = [json.dumps({"id": id, "text": text}) for id, text in corpus_documents(source, chars)]
        if rows:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{source}.jsonl"
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")
            written[path] = len(rows)
    if not written:
        raise ValueError("this machine has none of these texts; see `rtpurbo_hf.training.corpora` for their packages")
    return written
