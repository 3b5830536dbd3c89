"""Conversations as tokens with a mask of what the assistant said."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Character spans `(start, stop)` of the assistant's turns in the rendered conversation.

    A turn is found by rendering the conversation up to it. Templates that rewrite earlier turns (some drop the
    reasoning of all but the last one) make that impossible for those turns, which are then left out.
    """

    def render(part: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        turns = [dict(message) for message in part]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))

    whole = render(messages, False)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], True)
        after = whole if index + 1 == len(messages) else render(messages[: index + 1], False)
        if whole.startswith(before) and whole.startswith(after) and len(after) > len(before):
            spans.append((len(before), len(after)))
    return spans


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: turns with `"role"` and `"content"`.

    Returns:
        `(ids, labelled)` of equal length; `labelled[t]` is True where token `t` belongs to an assistant's turn (its
        closing token included), so the row that predicts it is `t - 1`.

    Raises:
        ValueError: the tokenizer has no chat template, is slow, or no assistant turn can be located.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, or give plain text instead")
    if not tokenizer.is_fast:
        raise ValueError("label masks need a fast tokenizer (character offsets); this one is slow")
    spans = assistant_spans(tokenizer, messages)
    if not spans:
        roles = [message["role"] for message in messages]
        raise ValueError(f"no assistant turn can be located in a conversation with the roles {roles}")
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labelled = [
        stop > start and any(first <= start < last for first, last in spans) for start, stop in coded["offset_mapping"]
    ]
    return list(coded["input_ids"]), labelled
