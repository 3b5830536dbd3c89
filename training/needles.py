"""Key-value needles in token blocks: facts early, their questions and answers at the end.

A fact reads like "The harbour is protected by the password 48213."; its question is the sentence up to the number,
its answer the number. Training mixes such blocks in, because query rows that look far back are rare in plain text, and
the evaluation asks the same kind of question about other nouns.

A fact never starts within the first 64 tokens: there its score would be mixed with that of the attention sinks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .packing import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PREFIX = 64
TEMPLATES = (
    "The {key} was delivered to the postal box",
    "The {key} is guarded by the officer with badge",
    "The {key} was sold for the exact price of",
    "The {key} carries the engraved serial",
    "The {key} is reached at phone extension",
    "The {key} is protected by the password",
    "The {key} is filed in the archive under entry",
    "The {key} is kept in the vault on shelf",
)
_TRAINING = """
anchor apron bakery balcony barrel basket bell bench blanket bottle bridge bucket cabin candle canoe carpet cart
castle cellar chapel chimney clock coat compass couch crate crown cupboard curtain dagger desk drum engine fence
ferry fiddle flute fountain garage gate glove guitar hammer harbour hat helmet hotel island
"""
_EVALUATION = """
jacket jar kettle kitchen kite ladder lamp lantern library locket map market medal mill mirror monastery museum
needle oven palace parcel pencil piano pillow pistol plough pocket portrait pulley quilt radio ribbon rocket
saddle satchel sculpture shed shield shovel sofa statue stove tavern temple tent tower trumpet tunnel umbrella
"""
TRAINING_KEYS = tuple(_TRAINING.split())
EVALUATION_KEYS = tuple(_EVALUATION.split())
_SNAP = 48


@dataclass(frozen=True)
class Fact:
    """One key-value fact and its question.

    Attributes:
        stem: the sentence up to the value: the question.
        value: the answer, five digits.
    """

    stem: str
    value: str

    @property
    def sentence(self) -> str:
        return f"{self.stem} {self.value}."


@dataclass(frozen=True)
class NeedleBlock:
    """A token block with facts and questions. Spans are `(start, stop)` token indices.

    Attributes:
        input_ids: the block.
        facts: in the order in which they are asked.
        statement_spans: where each asked fact is stated.
        answer_spans: tokens of each answer.
    """

    input_ids: list[int]
    facts: tuple[Fact, ...]
    statement_spans: tuple[tuple[int, int], ...]
    answer_spans: tuple[tuple[int, int], ...]

    @property
    def answer_rows(self) -> list[int]:
        """Rows whose next token is an answer token: those that must look at the fact."""
        return [row - 1 for start, stop in self.answer_spans for row in range(start, stop)]


def draw_facts(count: int, keys: Sequence[str], rng: random.Random) -> list[Fact]:
    """Facts with different keys and values; templates are used in turn, so up to 8 facts have different ones."""
    if count < 1 or count > len(keys):
        raise ValueError(f"between 1 and {len(keys)} facts can be drawn from {len(keys)} keys, got {count}")
    values = rng.sample(range(10_000, 100_000), count)
    order = rng.sample(range(len(TEMPLATES)), len(TEMPLATES))
    chosen = rng.sample(list(keys), count)
    return [
        Fact(TEMPLATES[order[i % len(order)]].format(key=key), str(value))
        for i, (key, value) in enumerate(zip(chosen, values, strict=True))
    ]


class SentenceEnds:
    """Finds places in a token sequence where a sentence or line may be put in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self._tokenizer.decode([token]))
        return text

    def after(self, ids: Sequence[int], position: int, last: int) -> int:
        """First end of a line or sentence in `[position, last]`, at most 48 tokens on; else `position`."""
        for candidate in range(max(position, 1), min(position + _SNAP, last, len(ids)) + 1):
            before = self._text(ids[candidate - 1])
            if before.endswith("\n"):
                return candidate
            following = self._text(ids[candidate]) if candidate < len(ids) else " "
            if before.endswith((".", "!", "?")) and following[:1].isspace():
                return candidate
        return position


class NeedleMixer:
    """Puts facts and questions into token blocks without changing their length.

    Args:
        tokenizer: the model's tokenizer.
        facts: facts stated in a block.
        questions: how many of them are asked at its end; None asks all.
        keys: nouns to draw from.
        min_prefix: tokens before the first fact, at least 64.

    Raises:
        ValueError: `min_prefix` below 64, or a number of facts or questions that cannot be drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        facts: int = 8,
        questions: int | None = None,
        keys: Sequence[str] = TRAINING_KEYS,
        min_prefix: int = MIN_PREFIX,
    ) -> None:
        if min_prefix < MIN_PREFIX:
            raise ValueError(f"min_prefix must be at least {MIN_PREFIX} (attention sinks), got {min_prefix}")
        if not 1 <= facts <= len(keys):
            raise ValueError(f"facts must be between 1 and {len(keys)}, the number of keys, got {facts}")
        self.questions = facts if questions is None else questions
        if not 1 <= self.questions <= facts:
            raise ValueError(f"questions must be between 1 and the {facts} facts, got {self.questions}")
        self.tokenizer = tokenizer
        self.facts = facts
        self.keys = tuple(keys)
        self.min_prefix = min_prefix
        self._ends = SentenceEnds(tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def insert(self, ids: Sequence[int], *, seed: int | str, gap: int = 0, until: float = 1.0) -> NeedleBlock:
        """A block of the same length as `ids`, with facts in it and questions at its end.

        The text's last tokens make room; what is left of it keeps its order.

        Args:
            ids: the token block.
            seed: decides facts, places and the order of the questions.
            gap: every fact ends at least so many tokens before the first question (e.g. the sliding window).
            until: facts are placed in this leading part of the remaining text, in (0, 1].

        Raises:
            ValueError: the block is too short for the facts, the questions and the gap.
        """
        if not 0 < until <= 1:
            raise ValueError(f"until must be in (0, 1], got {until}")
        rng = random.Random(seed)
        facts = draw_facts(self.facts, self.keys, rng)
        statements = [self._ids(f"\n{fact.sentence}\n") for fact in facts]
        asked = rng.sample(range(len(facts)), self.questions)
        tail: list[int] = []
        answers: list[tuple[int, int]] = []
        for index in asked:
            tail += self._ids(f"\n{facts[index].stem}")
            answer = self._ids(f" {facts[index].value}")
            answers.append((len(tail), len(tail) + len(answer)))
            tail += answer + self._ids(".")
        body = list(ids[: max(len(ids) - len(tail) - sum(map(len, statements)), 0)])
        last = min(len(body) - gap, int(until * len(body)))
        if last < self.min_prefix:
            raise ValueError(
                f"a block of {len(ids)} tokens is too short for {len(facts)} facts after {self.min_prefix} tokens, "
                f"{len(asked)} questions ({len(tail)} tokens) and a gap of {gap}; use longer blocks or fewer facts"
            )
        stratum = (last - self.min_prefix) / len(facts)
        places = [
            self._ends.after(body, self.min_prefix + int(stratum * (i + rng.random())), last) for i in range(len(facts))
        ]
        places.sort()
        order = rng.sample(range(len(facts)), len(facts))
        out: list[int] = []
        spans: dict[int, tuple[int, int]] = {}
        before = 0
        for place, index in zip(places, order, strict=True):
            out += body[before:place]
            spans[index] = (len(out), len(out) + len(statements[index]))
            out += statements[index]
            before = place
        out += body[before:]
        shift = len(out)
        return NeedleBlock(
            input_ids=out + tail,
            facts=tuple(facts[i] for i in asked),
            statement_spans=tuple(spans[i] for i in asked),
            answer_spans=tuple((start + shift, stop + shift) for start, stop in answers),
        )

    def mix(self, blocks: TokenBlocks, *, share: float = 1 / 3, seed: int = 0, until: float = 0.75) -> TokenBlocks:
        """Turn a share of the blocks into needle blocks; the others keep their tokens, and all their places.

        Args:
            blocks: plain-text blocks.
            share: part of the blocks, in [0, 1]; the seed draws which.
            seed: the draw, and each block's facts.
            until: as in `insert`.

        Returns:
            Blocks with `needle_rows` filled in: `[N, R]`, -1 where a block has fewer rows (all, without needles).
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        if blocks.label_mask is not None:
            raise ValueError("needles go into plain text; these blocks are conversations with a label mask")
        chosen = random.Random(seed).sample(range(len(blocks)), round(share * len(blocks)))
        ids = blocks.input_ids.clone()
        rows: dict[int, list[int]] = {}
        for index in sorted(chosen):
            made = self.insert(ids[index].tolist(), seed=f"{seed}:{index}", until=until)
            ids[index] = torch.tensor(made.input_ids, dtype=ids.dtype)
            rows[index] = made.answer_rows
        needle_rows = torch.full((len(blocks), max(map(len, rows.values()), default=0)), -1, dtype=torch.int64)
        for index, values in rows.items():
            needle_rows[index, : len(values)] = torch.tensor(values)
        return TokenBlocks(ids, needle_rows, None, blocks.document_ids)
