"""Documents from files, Hub data sets and the texts of this machine, with ids and hashes."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpora import system_texts

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_SHUFFLE_BUFFER = 1000

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: unique within its source: `"path"` or `"path#row"`, `"dataset#row"`, `"bible/Genesis"`.
        text: the text; empty for a conversation.
        sha256: SHA-256 of the content, hexadecimal.
        source: the source that was asked for.
        messages: the turns of a conversation (`{"role", "content"}`), or None for plain text.
    """

    id: str
    text: str
    sha256: str
    source: str
    messages: tuple[dict[str, Any], ...] | None = None

    def __len__(self) -> int:
        """Number of characters."""
        if self.messages is None:
            return len(self.text)
        return sum(len(str(message.get("content", ""))) for message in self.messages)


def _digest(id: str, content: str) -> str:
    try:
        return hashlib.sha256(content.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(f"{id}: this text cannot be written as UTF-8 ({error}); repair or remove it") from error


def _document(id: str, row: Any, source: str, text_field: str) -> Document:
    if isinstance(row, str):
        return Document(id, row, _digest(id, row), source)
    if row.get("messages"):
        return _conversation(id, row["messages"], source)
    if text_field not in row:
        raise ValueError(
            f"{id}: there is no text field {text_field!r} and no 'messages'; the fields are {sorted(row)}. "
            "Name the right one behind the data source, as in rows.jsonl@content or owner/name@content"
        )
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{id}: the field {text_field!r} must be text, got {type(text).__name__}")
    # a missing text, as tables have it, is an empty one
    return _document(id, text or "", source, text_field)


def _conversation(id: str, turns: Any, source: str) -> Document:
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{id}: 'messages' must be a list of turns with 'role' and 'content', got {turns!r:.80}")
    messages = tuple(dict(message) for message in turns)
    for message in messages:
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"{id}: a message needs 'role' and 'content', this one has {sorted(message)}")
    content = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return Document(id, "", _digest(id, content), source, messages)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, less the byte-order mark that some editors write."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict | str):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield row


def _parquet_rows(path: Path, text_field: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in (text_field, "messages") if name in file.schema_arrow.names]
        if not columns:
            raise ValueError(
                f"{path}: no column {text_field!r} or 'messages'; it has {file.schema_arrow.names}. Name the right one "
                f"behind the data source, as in {path.name}@content"
            )
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _file_documents(path: Path, source: str, text_field: str) -> Iterator[Document]:
    if path.suffix in (".txt", ".md"):
        yield _document(str(path), "".join(_lines(path)), source, text_field)
        return
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, text_field)
    for index, row in enumerate(rows):
        yield _document(f"{path}#{index}", row, source, text_field)


def _local_files(source: str) -> list[Path] | None:
    """Files that a path, folder or glob names; None if it is not local."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: files of kind {path.suffix!r} cannot be read; expected {', '.join(SUFFIXES)}")
        files = [path]
    elif glob.has_magic(source):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise ValueError(f"{source}: no file has such a name")
        files = [p for p in found if p.suffix in SUFFIXES]
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: there is no such file or folder")
    else:
        return None
    if not files:
        raise ValueError(f"{source}: no file ends in {', '.join(SUFFIXES)}")
    return files


def _hub_documents(source: str, split: str | None, text_field: str, seed: int) -> Iterator[Document]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    stream = load_dataset(name, config or None, split=split or "train", streaming=True)
    for index, row in enumerate(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
        yield _document(f"{source}#{index}", row, source, text_field)


def _named_field(source: str, text_field: str) -> tuple[str, str]:
    """The source and its text field, which it may name itself: `rows.jsonl@content`."""
    name, _, field = source.rpartition("@")
    if name and field.isidentifier() and not Path(source).expanduser().exists():
        return name, field
    return source, text_field


def _one_source(source: str, split: str | None, text_field: str, seed: int) -> Iterable[Document]:
    source, text_field = _named_field(source, text_field)
    if source == "system":
        documents = [_document(id, text, source, text_field) for id, text in system_texts()]
    else:
        files = _local_files(source)
        if files is None:
            if "/" not in source:
                raise ValueError(
                    f"data source {source!r} is neither 'system', nor a local file, folder or glob, nor a Hub name "
                    "('owner/name' or 'owner/name:config'; '@FIELD' behind it names the text)"
                )
            return _hub_documents(source, split, text_field, seed)
        if split is not None:
            raise ValueError(f"split={split!r} is for Hub data sets; {source!r} is local")
        documents = [d for path in files for d in _file_documents(path, source, text_field)]
    random.Random(seed).shuffle(documents)
    return documents


def load_texts(
    source: Source,
    *,
    split: str | None = None,
    text_field: str = "text",
    min_chars: int = 1,
    max_chars: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> list[Document]:
    """Documents of one or several sources, in an order that the seed decides.

    Args:
        source: `"system"` (long texts on this machine), a `.txt`, `.md`, `.jsonl` or `.parquet` file, a folder or
            glob of such files, a Hub data set (`"HuggingFaceFW/fineweb"`, `"owner/name:config"`; streamed), or a
            list of these, which are taken in turn. A row with `"messages"` is a conversation. `"rows.jsonl@content"`
            names the text's field for this source.
        split: split of a Hub data set, `"train"` unless told.
        text_field: name of the text in `.jsonl`, `.parquet` and Hub rows of sources that name none.
        min_chars: shorter documents are left out.
        max_chars: longer documents are left out; None keeps them.
        seed: the order; local sources are shuffled whole, a stream through a buffer of 1,000 rows.
        limit: at most so many documents; needed for an endless stream, and None takes all.

    Returns:
        Documents with different contents: a repeated one is kept once.

    Raises:
        ValueError: the source does not exist or cannot be read, or no document is left (with what was found).
        OSError: a Hub data set cannot be reached.
    """
    names = [str(source)] if isinstance(source, str | Path) else [str(name) for name in source]
    if not names or not all(name.strip() for name in names):
        raise ValueError("no data source was given; expected 'system', a path, or a Hub data set's name")
    streams = [iter(_one_source(name, split, text_field, seed)) for name in names]
    kept: list[Document] = []
    seen: set[str] = set()
    dropped = repeated = 0
    for document in (d for turn in itertools.zip_longest(*streams) for d in turn if d is not None):
        if len(document) < min_chars or (max_chars is not None and len(document) > max_chars):
            dropped += 1
        elif document.sha256 in seen:
            repeated += 1
        else:
            seen.add(document.sha256)
            kept.append(document)
            if limit is not None and len(kept) >= limit:
                break
    if not kept:
        span = f"at least {min_chars}" + (f" and at most {max_chars}" if max_chars is not None else "")
        raise ValueError(f"{', '.join(names)}: no document has {span} characters ({dropped} of other lengths)")
    logger.info(
        "%s: %d documents, %d characters (%d of other lengths, %d repeated left out)",
        ", ".join(names), len(kept), sum(map(len, kept)), dropped, repeated,
    )  # fmt: skip
    return kept


def documents_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents' hashes in their order: names a data set in records and cards."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.sha256.encode("ascii"))
    return digest.hexdigest()


def split_documents(
    documents: Sequence[Document], *, held_out: int | float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split by document into `(rest, held out)`.

    A document's side depends on its content and the seed only, so that adding documents does not move the others
    when `held_out` is a fraction. Of a few documents a fraction may choose none: then it is the one drawn first.

    Args:
        documents: documents with different contents.
        held_out: a number of documents (int), or a fraction below 1 (float).
        seed: another split.

    Raises:
        ValueError: `held_out` is not positive, or leaves nothing on one side.
    """

    def draw(document: Document) -> float:
        digest = hashlib.sha256(f"{seed}:{document.sha256}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    if isinstance(held_out, float) and held_out < 1:
        chosen = {d.sha256 for d in documents if draw(d) < held_out}
        if not chosen and held_out > 0 and len(documents) > 1:
            chosen = {min(documents, key=draw).sha256}
    else:
        chosen = {d.sha256 for d in sorted(documents, key=draw)[: max(int(held_out), 0)]}
    rest = [d for d in documents if d.sha256 not in chosen]
    kept = [d for d in documents if d.sha256 in chosen]
    if not rest or not kept:
        raise ValueError(
            f"held_out={held_out} of {len(documents)} documents leaves {len(rest)} and {len(kept)}; "
            "both sides need at least one document: give more of them, or another seed, which draws others"
        )
    return rest, kept
