"""Question answering over one right document among distractors, from data that the user gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prompts import Prompt, Workbench


@dataclass(frozen=True)
class QARecord:
    """A question, the answers that count (any one), and the document that holds them."""

    question: str
    answers: tuple[str, ...]
    context: str


def _squad_rows(data: Any) -> Iterator[dict[str, Any]]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                texts = [answer["text"] for answer in item["answers"]]
                yield {"question": item["question"], "answers": texts, "context": paragraph["context"]}


def load_qa(path: str | Path) -> list[QARecord]:
    """Question-answer records from a SQuAD `.json` file, or a `.jsonl` file of `question`, `answers`, `context`.

    Questions without an answer are left out.

    Raises:
        ValueError: the file does not exist, is in another format, or holds no answerable question.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of questions")
    records: list[QARecord] = []
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows: Iterator[dict[str, Any]] = (json.loads(line) for line in text.splitlines() if line.strip())
        else:
            rows = _squad_rows(json.loads(text))
        for row in rows:
            answers = row["answers"]
            if isinstance(answers, dict):
                answers = answers["text"]
            answers = (answers,) if isinstance(answers, str) else tuple(dict.fromkeys(answers))
            if answers:
                records.append(QARecord(row["question"], answers, row["context"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: expected SQuAD JSON, or JSON lines with question, answers and context ({error!r})"
        ) from error
    if not records:
        raise ValueError(f"{path}: no question has an answer")
    return records


def qa(bench: Workbench, *, qa_data: Sequence[QARecord]) -> Prompt:
    """One question; its document lies at `depth` among other questions' documents, then text of the haystack."""
    if not qa_data:
        raise ValueError("qa needs qa_data: records with question, answers and context, e.g. from load_qa(path)")
    record = qa_data[bench.rng.randrange(len(qa_data))]
    head = bench.ids("Answer the question at the end from the documents below. Give only the answer.\n")
    tail = bench.ids(f"\n\nQuestion: {record.question}\nAnswer:")
    gold = bench.ids(f"\n\nDocument:\n{record.context}")
    max_new_tokens = 32
    room = bench.room(head, tail, gold, max_new_tokens=max_new_tokens)
    others = sorted({r.context for r in qa_data if not any(a.lower() in r.context.lower() for a in record.answers)})
    bench.rng.shuffle(others)
    documents: list[list[int]] = []
    used = 0
    for context in others:
        if used >= room:
            break
        documents.append(bench.ids(f"\n\nDocument:\n{context}")[: room - used])
        used += len(documents[-1])
    if used < room:
        title = bench.ids("\n\nDocument:\n")[: room - used]
        documents.append(title + (bench.haystack_ids(room - used - len(title)) if room - used > len(title) else []))
    depth = bench.rng.random() if bench.depth is None else bench.depth
    place = round(depth * len(documents))
    body = [token for ids in [*documents[:place], gold, *documents[place:]] for token in ids]
    return Prompt(head, body, tail, record.answers, max_new_tokens, match="any")
