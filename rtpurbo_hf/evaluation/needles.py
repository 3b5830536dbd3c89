"""Needle tasks: numbers hidden in real text, asked for at the end (RULER's NIAH family, in our own words)."""

from __future__ import annotations

from ..training.needles import EVALUATION_KEYS
from .prompts import Prompt, Workbench

_ADJECTIVES = "amber brass copper crimson emerald golden ivory marble purple scarlet silver velvet violet wooden".split
_HEAD = "Secret numbers are hidden in the following text. Remember them; there is a question at the end.\n\n"


def _keys(bench: Workbench, count: int) -> list[str]:
    pairs = [f"{adjective} {noun}" for adjective in _ADJECTIVES() for noun in EVALUATION_KEYS]
    if not 1 <= count <= len(pairs):
        raise ValueError(f"between 1 and {len(pairs)} keys can be drawn, {count} were asked")
    return bench.rng.sample(pairs, count)


def _values(bench: Workbench, count: int) -> list[str]:
    return [str(value) for value in bench.rng.sample(range(1_000_000, 10_000_000), count)]


def _sentence(key: str, value: str) -> str:
    return f"The {key} has the secret number {value}."


def _needle_prompt(
    bench: Workbench, items: list[str], question: str, answers: list[str], max_new_tokens: int
) -> Prompt:
    head, tail = bench.ids(_HEAD), bench.ids(question)
    body = bench.scatter(items, bench.room(head, tail, max_new_tokens=max_new_tokens))
    return Prompt(head, body, tail, tuple(answers), max_new_tokens)


def niah_multikey(bench: Workbench, *, distractors: int = 3) -> Prompt:
    """One number is asked for by its key; `distractors` other keys have numbers too."""
    if distractors < 0:
        raise ValueError(f"distractors must not be negative, got {distractors}")
    keys, values = _keys(bench, distractors + 1), _values(bench, distractors + 1)
    items = [_sentence(key, value) for key, value in zip(keys, values, strict=True)]
    question = f"\n\nQuestion: what is the secret number of the {keys[0]}?\nAnswer: The {keys[0]} has the secret number"
    return _needle_prompt(bench, items, question, values[:1], 24)


def niah_single(bench: Workbench) -> Prompt:
    """One number, one key."""
    return niah_multikey(bench, distractors=0)


def niah_multivalue(bench: Workbench, *, values: int = 4) -> Prompt:
    """One key has several numbers; all are asked for."""
    if values < 1:
        raise ValueError(f"values must be at least 1, got {values}")
    key = _keys(bench, 1)[0]
    numbers = _values(bench, values)
    question = (
        f"\n\nQuestion: what are all {values} secret numbers of the {key}?\nAnswer: The {key} has the secret numbers"
    )
    return _needle_prompt(bench, [_sentence(key, n) for n in numbers], question, numbers, 16 + 16 * values)


def niah_multiquery(bench: Workbench, *, queries: int = 4) -> Prompt:
    """Several keys, each with a number; all are asked for at once."""
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    keys, numbers = _keys(bench, queries), _values(bench, queries)
    items = [_sentence(key, number) for key, number in zip(keys, numbers, strict=True)]
    named = ", ".join(f"the {key}" for key in keys)
    question = f"\n\nQuestion: what are the secret numbers of {named}?\nAnswer: The {keys[0]} has the secret number"
    return _needle_prompt(bench, items, question, numbers, 16 + 32 * queries)
