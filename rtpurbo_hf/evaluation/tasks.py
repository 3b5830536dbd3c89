"""Retrieval tasks made offline from local text, for any tokenizer and any length.

`generate` makes a question whose answer must be generated (RULER's kinds of task, worded anew); `score` marks it as
RULER does. `passkey` makes a document with eight facts and eight questions that one forward pass answers: an answer
counts when every one of its tokens is the arg max, which is greedy exact match, at a fraction of the cost.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..training.needles import EVALUATION_KEYS, NeedleBlock, NeedleMixer
from .aggregation import common_words, frequent_words, variable_tracking
from .needles import niah_multikey, niah_multiquery, niah_multivalue, niah_single
from .prompts import Example, Prompt, Workbench
from .questions import QARecord, load_qa, qa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Example", "QARecord", "exact_matches", "generate", "load_qa", "passkey", "score"]

TASKS: dict[str, Callable[..., Prompt]] = {
    function.__name__: function
    for function in (
        niah_single,
        niah_multikey,
        niah_multivalue,
        niah_multiquery,
        variable_tracking,
        common_words,
        frequent_words,
        qa,
    )
}


def generate(
    task: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float | None = None,
    seed: int = 0,
    haystack_texts: Sequence[str],
    **options: Any,
) -> Example:
    """One example of a task.

    Args:
        task: a name in `TASKS`.
        tokenizer: the model's tokenizer.
        length: tokens of the prompt and the generated answer together.
        depth: where the (first) item asked for lies in the body, 0 to 1; None draws it. Lists of words have no depth.
        seed: the same arguments and seed give the same example.
        haystack_texts: real documents that the body is cut from.
        options: what the task function takes by keyword (`distractors`, `values`, `queries`, `hops`, `qa_data`, ...).

    Raises:
        ValueError: unknown task or option, depth outside [0, 1], too short a length, too little text.
    """
    function = TASKS.get(task)
    if function is None:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{task} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    if "qa_data" in known and "qa_data" not in options:
        raise ValueError("qa needs qa_data: records with question, answers and context, e.g. from load_qa(path)")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")
    if not haystack_texts:
        raise ValueError("haystack_texts is empty; give real documents, e.g. the texts of load_texts('system')")
    bench = Workbench(tokenizer, length, depth, random.Random(f"{task}:{length}:{depth}:{seed}"), haystack_texts)
    prompt = function(bench, **options)
    ids = (*bench.lead, *prompt.head, *prompt.body, *prompt.tail)
    return Example(task, ids, prompt.answers, length, depth, seed, prompt.max_new_tokens, prompt.match)


def score(example: Example, generated_text: str) -> float:
    """Score of a generated answer, 0 to 1, as in RULER: case is ignored and an answer counts when it occurs.

    Returns:
        The fraction of the answers that occur, or with `match="any"` 1 if one of them does.
    """
    text = generated_text.lower()
    found = [answer.lower() in text for answer in example.answers]
    return float(any(found)) if example.match == "any" else sum(found) / len(found)


def passkey(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    gap: int,
    seed: int,
    haystack_texts: Sequence[str],
    facts: int = 8,
    questions: int | None = None,
) -> NeedleBlock:
    """A document of exactly `length` tokens with facts, then questions with their answers (teacher forced).

    Args:
        tokenizer: the model's tokenizer.
        length: tokens, leading ones included.
        gap: every fact ends at least so many tokens before the first question; give the sliding window.
        seed: the same arguments and seed give the same document.
        haystack_texts: real documents.
        facts: facts stated, of up to eight different wordings.
        questions: facts asked; None asks all.

    Returns:
        A `NeedleBlock`; run the model on `input_ids` and hand the arg max at `answer_rows` to `exact_matches`.
    """
    bench = Workbench(tokenizer, length, None, random.Random(f"passkey:{length}:{seed}"), haystack_texts)
    ids = bench.lead + bench.haystack_ids(bench.positive(length - len(bench.lead), "any text"))
    mixer = NeedleMixer(tokenizer, facts=facts, questions=questions, keys=EVALUATION_KEYS)
    return mixer.insert(ids, seed=f"passkey:{seed}", gap=gap)


def exact_matches(block: NeedleBlock, predicted: Sequence[int]) -> list[bool]:
    """Which answers are right: all tokens of an answer are predicted.

    Args:
        block: the document.
        predicted: arg-max token at each row of `block.answer_rows`, in that order.

    Raises:
        ValueError: another number of predictions than rows.
    """
    rows = block.answer_rows
    if len(predicted) != len(rows):
        raise ValueError(f"{len(predicted)} predictions for {len(rows)} answer rows")
    by_row = dict(zip(rows, (int(token) for token in predicted), strict=True))
    return [
        all(by_row[row - 1] == block.input_ids[row] for row in range(start, stop)) for start, stop in block.answer_spans
    ]
