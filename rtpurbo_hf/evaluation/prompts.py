"""Prompts of an exact token length: head, body, tail."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..training.needles import MIN_PREFIX, SentenceEnds
from ..training.packing import leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Match = Literal["all", "any"]


@dataclass(frozen=True)
class Example:
    """One generated question.

    Attributes:
        task: name of the task.
        prompt_ids: the prompt, with the tokenizer's leading tokens; `len(prompt_ids) + max_new_tokens == length`.
        answers: what the generated text must hold: all of them, or with `match="any"` one of them.
        length: tokens of prompt and answer together.
        depth: where the first asked item lies in the body, from 0 (start) to 1 (end); None where places are drawn.
        seed: what the example was made from.
        max_new_tokens: how many tokens to generate.
        match: how answers count, as in RULER: the found fraction of all, or any one.
    """

    task: str
    prompt_ids: tuple[int, ...]
    answers: tuple[str, ...]
    length: int
    depth: float | None
    seed: int
    max_new_tokens: int
    match: Match = "all"


@dataclass
class Workbench:
    """What a task function works with: the tokenizer, its own random numbers, and the text of the haystack."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    depth: float | None
    rng: random.Random
    haystack: Sequence[str]
    ends: SentenceEnds = field(init=False)
    lead: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = SentenceEnds(self.tokenizer)
        self.lead = leading_tokens(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        """Tokens of a piece of text, nothing put in front of it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def room(self, *parts: Sequence[int], max_new_tokens: int) -> int:
        """Tokens left for the body beside the given parts.

        Raises:
            ValueError: nothing is left.
        """
        room = self.length - max_new_tokens - len(self.lead) - sum(map(len, parts))
        if room < 1:
            raise ValueError(
                f"a length of {self.length} tokens is too short: question and answer alone take {self.length - room}"
            )
        return room

    def haystack_ids(self, count: int) -> list[int]:
        """`count` tokens of real text: documents in a drawn order, the first one from a drawn line on.

        Raises:
            ValueError: all documents together are shorter.
        """
        order = self.rng.sample(range(len(self.haystack)), len(self.haystack))
        ids: list[int] = []
        for place, index in enumerate(order):
            text = self.haystack[index]
            if place == 0:
                start = text.find("\n", self.rng.randrange(max(len(text) // 2, 1)))
                text = text[start + 1 :]
            ids += self.ids(text[: 12 * (count - len(ids)) + 64] + "\n\n")
            if len(ids) >= count:
                return ids[:count]
        raise ValueError(
            f"the haystack has {len(ids)} tokens in {len(order)} documents, {count} are needed; "
            "give more or longer texts"
        )

    def scatter(self, items: Sequence[str], count: int, *, ordered: bool = False) -> list[int]:
        """A body of exactly `count` tokens: real text with the items, each on a line of its own.

        The first item lies at `depth` (drawn where that is None), the others at drawn places, after the first one and
        in their order if `ordered`. No item lies within the body's first 64 tokens.
        """
        pieces = [self.ids(f"\n{item}\n") for item in items]
        text = self.haystack_ids(self.positive(count - sum(map(len, pieces)), "the items to be found"))
        first = min(MIN_PREFIX, len(text))

        def place(depth: float) -> int:
            return self.ends.after(text, first + int(depth * (len(text) - first)), len(text))

        depths = [self.rng.random() for _ in pieces]
        if self.depth is not None:
            depths[0] = self.depth
        if ordered:
            start = depths[0] if self.depth is not None else min(depths)
            depths = [start, *sorted(start + (1 - start) * self.rng.random() for _ in pieces[1:])]
        body: list[int] = []
        done = 0
        for where, index in sorted((place(depth), index) for index, depth in enumerate(depths)):
            body += text[done:where] + pieces[index]
            done = where
        return body + text[done:]

    def positive(self, count: int, what: str) -> int:
        """`count` if it is positive, else ValueError that names what did not fit."""
        if count < 1:
            raise ValueError(f"a length of {self.length} tokens is too short for {what}; ask for a longer prompt")
        return count

    def fill(self, render: Callable[[int], str], count: int, *, at_least: int, at_most: int) -> list[int]:
        """Tokens of `render(n)` for the largest n that fits into `count`, padded with line ends to exactly `count`.

        `render` must grow with n, up to `at_most`.

        Raises:
            ValueError: not even `render(at_least)` fits, or `render(at_most)` leaves room.
        """
        best = self.ids(render(at_least))
        if len(best) > count:
            raise ValueError(
                f"a length of {self.length} tokens is too short for this task: {len(best)} tokens of content at least, "
                f"{count} fit; ask for a longer prompt"
            )
        # up by doubling, then down by halves: `render(at_most)` may be far larger than what fits
        low = high = at_least
        while high < at_most:
            high = min(2 * high, at_most)
            ids = self.ids(render(high))
            if len(ids) > count:
                break
            low, best = high, ids
        if low == at_most and len(best) < count:
            raise ValueError(
                f"there are words for {len(best)} tokens, {count} are needed for a length of {self.length}; give more "
                "haystack text or ask for a shorter prompt"
            )
        while high - low > 1:
            middle = (low + high) // 2
            ids = self.ids(render(middle))
            if len(ids) <= count:
                low, best = middle, ids
            else:
                high = middle
        return best + self.line_ends(count - len(best))

    def line_ends(self, count: int) -> list[int]:
        """`count` tokens of line ends."""
        newline = self.ids("\n")
        return [newline[-1]] * count


@dataclass(frozen=True)
class Prompt:
    """What a task function returns: the three parts as tokens, and what is expected."""

    head: list[int]
    body: list[int]
    tail: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    match: Match = "all"
