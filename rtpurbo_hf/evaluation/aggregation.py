"""Tasks that need many places of the prompt at once: variable tracking, common words, frequent words (after RULER)."""

from __future__ import annotations

import functools
import random
import re
import string

from .prompts import Prompt, Workbench

_WORD = re.compile(r"\b[a-z]{4,10}\b")


def _names(bench: Workbench, count: int) -> list[str]:
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(bench.rng.choices(string.ascii_uppercase, k=5)))
    drawn = sorted(names)
    bench.rng.shuffle(drawn)
    return drawn


def _chain(names: list[str], value: str) -> list[str]:
    steps = zip(names[1:], names, strict=False)
    return [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for new, old in steps)]


def variable_tracking(bench: Workbench, *, hops: int = 4, chains: int = 1) -> Prompt:
    """Assignments `VAR B = VAR A` scattered in the text, in order; all names that hold one value are asked for.

    `hops` assignments follow each chain's first; `chains - 1` other chains hold other values.
    """
    if hops < 1 or chains < 1:
        raise ValueError(f"hops and chains must be at least 1, got {hops} and {chains}")
    names = _names(bench, (chains + 1) * (hops + 1))
    groups = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
    values = [str(v) for v in bench.rng.sample(range(10_000, 100_000), chains + 1)]

    def question(value: str) -> str:
        return (
            f"\n\nQuestion: which {hops + 1} variables hold the value {value}?\n"
            f"Answer: The variables that hold the value {value} are"
        )

    shown = "\n".join(_chain(groups[-1], values[-1])) + question(values[-1]) + " " + ", ".join(groups[-1]) + ".\n\n"
    head = bench.ids(f"Variable assignments are hidden in a text; follow them. An example:\n{shown}Now the text.\n\n")
    tail = bench.ids(question(values[0]))
    max_new_tokens = 12 + 8 * (hops + 1)
    items = _chain(groups[0], values[0])
    room = bench.room(head, tail, max_new_tokens=max_new_tokens)
    others = [item for group, value in zip(groups[1:-1], values[1:-1], strict=True) for item in _chain(group, value)]
    body = bench.scatter(_interleave(bench, [items, others]), room, ordered=True)
    return Prompt(head, body, tail, tuple(groups[0]), max_new_tokens)


def _interleave(bench: Workbench, groups: list[list[str]]) -> list[str]:
    """Merge lists in a drawn order that keeps each list's own order and begins with the first list's first item."""
    turns = [index for index, group in enumerate(groups) for _ in group]
    turns.remove(0)
    bench.rng.shuffle(turns)
    queues = [iter(group) for group in groups]
    return [next(queues[index]) for index in [0, *turns]]


@functools.lru_cache(maxsize=256)
def _words_of(text: str) -> frozenset[str]:
    """The words of one document, found once for all prompts made of it."""
    return frozenset(_WORD.findall(text[:400_000].lower()))


def _vocabulary(bench: Workbench, at_least: int) -> list[str]:
    words = sorted(frozenset().union(*map(_words_of, bench.haystack)))
    if len(words) < at_least:
        raise ValueError(f"the haystack has {len(words)} different words, {at_least} are needed; give more text")
    bench.rng.shuffle(words)
    return words


def common_words(bench: Workbench, *, common: int = 10, often: int = 30, seldom: int = 3) -> Prompt:
    """A numbered list in which `common` words occur `often` times and all others `seldom` times.

    Below 4,096 tokens use smaller counts: the list must hold `common * often` words at least.
    """
    if not 1 <= seldom < often or common < 1:
        raise ValueError(f"expected 1 <= seldom < often and common >= 1, got {seldom}, {often}, {common}")
    words = _vocabulary(bench, common * 4)
    targets, shown, rest = words[:common], words[common : 2 * common], words[2 * common :]
    order_seed = bench.rng.random()

    def listed(often_words: list[str], count: int, seldom_words: list[str], others: int) -> str:
        entries = [word for word in often_words for _ in range(count)]
        entries += [word for word in seldom_words for _ in range(others)]
        random.Random(order_seed).shuffle(entries)
        return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))

    question = f"\nQuestion: which {common} words are the most common in the list?\nAnswer: The most common words are"
    example = listed(shown, 4, rest[:common], 1) + question + " " + ", ".join(shown) + ".\n\n"
    head = bench.ids(f"Below is a numbered list of words. An example:\n{example}Now the list.\n")
    tail = bench.ids(question)
    max_new_tokens = 8 + 6 * common
    room = bench.room(head, tail, max_new_tokens=max_new_tokens)
    fillers = rest[common:]
    body = bench.fill(lambda n: listed(targets, often, fillers[:n], seldom), room, at_least=1, at_most=len(fillers))
    return Prompt(head, body, tail, tuple(targets), max_new_tokens)


def frequent_words(bench: Workbench, *, alpha: float = 2.0, kinds: int = 200, top: int = 3) -> Prompt:
    """A stream of made-up words whose counts fall as rank to the power of `-alpha`; the `top` ones are asked for."""
    if alpha <= 1 or kinds <= top or top < 1:
        raise ValueError(f"expected alpha > 1 and kinds > top >= 1, got {alpha}, {kinds}, {top}")
    words = [name.lower() for name in _names(bench, kinds)]
    norm = sum(rank**-alpha for rank in range(1, kinds + 1))
    order_seed = bench.rng.random()

    def stream(total: int) -> str:
        counts = [max(int(total * rank**-alpha / norm), 1) for rank in range(1, kinds + 1)]
        for rank in range(top - 1, -1, -1):
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        random.Random(order_seed).shuffle(entries)
        return " ".join(entries)

    head = bench.ids("Below is a stream of coded words. Keep track of how often each word occurs.\n\n")
    tail = bench.ids(
        f"\n\nQuestion: which {top} coded words occur most often?\nAnswer: The most frequent coded words are"
    )
    max_new_tokens = 8 + 8 * top
    room = bench.room(head, tail, max_new_tokens=max_new_tokens)
    body = bench.fill(stream, room, at_least=1, at_most=room)
    return Prompt(head, body, tail, tuple(words[:top]), max_new_tokens)
