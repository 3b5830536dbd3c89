"""One sample under one arm: forwards in decode emulation, and greedy generation.

Every function returns a `Record`: sums from which figures and their intervals are computed, see `bootstrap.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from ..training.needles import NeedleBlock
from .profile import PrefillProfile, SparsityProfile, Sums
from .prompts import Example
from .tasks import exact_matches, score
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_EVERY = 4


@dataclass(frozen=True)
class Arm:
    """A variant of a model, under the name that results have."""

    name: str
    model: RTPurboForCausalLM
    variant: Variant


@dataclass(frozen=True)
class Record:
    """What one sample gave: `{figure: (numerator, denominator)}`, and mean selected tokens per head by layer."""

    sums: Sums
    heads: dict[str, list[float]] = field(default_factory=dict)

    @property
    def selected_tokens(self) -> float | None:
        """Mean tokens that a retrieval head selected; None where nothing selects."""
        pair = self.sums.get("active_tokens")
        return None if pair is None else pair[0] / pair[1]


@dataclass(frozen=True)
class Emulated:
    """Logits `[R, vocabulary]` of the last rows, and the profile of what these rows attended to."""

    logits: torch.Tensor
    profile: SparsityProfile

    def record(self, **sums: tuple[float, float]) -> Record:
        return Record({**sums, **self.profile.sums()}, self.profile.tokens_per_head())


def emulate(arm: Arm, ids: torch.Tensor, rows: int, *, equal: float | None = None) -> Emulated:
    """One forward in which the last `rows` of `ids` `[length]` attend as decode steps.

    Args:
        equal: what the budget `"equal"` stands for, in tokens.
    """
    model = arm.model
    ids = ids.to(model.device).long()[None]
    length = ids.shape[1]
    with torch.inference_mode(), arm.variant.applied(model):
        profile = SparsityProfile(model, _visible(length, rows))
        options: dict[str, Any] = {}
        if arm.variant.mode == "sparse":
            selector = arm.variant.build_selector(model, equal)
            options = {"decode_rows": rows, "on_selection": profile.observe, "selector": selector}
        logits = model(ids, use_cache=False, logits_to_keep=rows, **options).logits[0]
    return Emulated(logits, profile)


def profile_prefill(arm: Arm, ids: torch.Tensor) -> Sums:
    """What the prefill of the prompt `ids` `[length]` reads, by one forward; nothing where it is dense."""
    model, profile = arm.model, PrefillProfile()
    with torch.inference_mode(), arm.variant.applied(model):
        if arm.variant.mode == "sparse" and model.config.retrieval_prefill != "dense" and len(ids):
            ids = ids.to(model.device).long()[None]
            model(ids, use_cache=False, logits_to_keep=1, on_selection=profile.observe)
    return profile.sums()


def _visible(length: int, rows: int) -> torch.Tensor:
    """How many tokens each of the last rows sees."""
    return torch.arange(length - rows + 1, length + 1)


def score_text(emulated: Emulated, reference: torch.Tensor, ids: torch.Tensor, *, chunk: int = 128) -> Record:
    """Perplexity of the rows' next tokens, and divergence from the reference.

    Args:
        emulated: of the last R rows of `ids`. reference: logits `[R, vocabulary]` of the reference.
        ids: the text block. chunk: rows that are held in fp32 at a time.
    """
    scored = len(emulated.logits) - 1
    targets = ids[-scored:].to(emulated.logits.device).long()
    nll = kl = 0.0
    agree = 0
    for first in range(0, scored, chunk):
        rows = slice(first, min(first + chunk, scored))
        own, other = emulated.logits[rows].float().log_softmax(-1), reference[rows].float().log_softmax(-1)
        nll -= float(own.gather(1, targets[rows, None]).double().sum())
        kl += float((other.exp() * (other - own)).double().sum())
        agree += int((own.argmax(1) == other.argmax(1)).sum())
    count = float(scored)
    return emulated.record(nll=(nll, count), kl=(kl, count), top1_agreement=(float(agree), count))


def passkey_rows(block: NeedleBlock) -> int:
    """How many last rows hold all the answers' rows."""
    return len(block.input_ids) - min(block.answer_rows)


def score_passkey(emulated: Emulated, block: NeedleBlock) -> Record:
    """Answers whose every token is the arg max."""
    first = min(block.answer_rows)
    best = emulated.logits.argmax(1).tolist()
    right = exact_matches(block, [best[row - first] for row in block.answer_rows])
    return emulated.record(accuracy=(float(sum(right)), float(len(right))))


class _Answered(StoppingCriteria):
    """Ends a row whose text holds all answers: whatever follows, its score stays 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
        self._tokenizer = tokenizer
        self._examples = examples
        self._done = [False] * len(examples)
        self._steps = 0

    def __call__(self, input_ids, scores, **kwargs):
        self._steps += 1
        if self._steps % _LOOK_EVERY == 0:
            for row, example in enumerate(self._examples):
                if not self._done[row]:
                    new = input_ids[row, len(example.prompt_ids) :]
                    self._done[row] = score(example, _text(self._tokenizer, new.tolist())) == 1.0
        return torch.tensor(self._done, device=input_ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def generate_answers(
    arm: Arm, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[float, list[int]]]:
    """Greedy answers of prompts of one length, in one batch: `(score, generated ids)` each.

    Raises:
        ValueError: the variant does not generate, or the prompts' lengths differ.
    """
    if not arm.variant.generates:
        raise ValueError(
            f"{arm.name} selects in decode emulation only and cannot generate: leave suite ruler out, or the variant"
        )
    if len({len(example.prompt_ids) for example in examples}) != 1:
        raise ValueError(f"prompts of a batch must have one length, got {[len(e.prompt_ids) for e in examples]}")
    model = arm.model
    prompts = torch.tensor([example.prompt_ids for example in examples], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode(), arm.variant.applied(model):
        out = cast(Any, model).generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=examples[0].max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Answered(tokenizer, examples)]),
        )
    answers = []
    for example, row in zip(examples, out[:, prompts.shape[1] :].tolist(), strict=True):
        while row and row[-1] == pad:
            row.pop()
        answers.append((score(example, _text(tokenizer, row)), row))
    return answers


def score_answer(arm: Arm, example: Example, answer: tuple[float, list[int]]) -> Record:
    """The score of a generated answer, and what the steps that made it attended to (one more forward, if selected)."""
    value, generated = answer
    ids = torch.tensor([*example.prompt_ids, *generated])
    rows = max(len(generated), 1)
    if arm.variant.mode == "sparse":
        return emulate(arm, ids, rows).record(score=(value, 1.0))
    with arm.variant.applied(arm.model):
        profile = SparsityProfile(arm.model, _visible(len(ids), rows))
    return Record({"score": (value, 1.0), **profile.sums()})
