"""The blocks of text that an adaptation calibrates, trains and evaluates on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .presets import Preset
from .training.data import NeedleMixer, TokenBlocks, load_texts, pack_documents, split_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptationData:
    """Blocks to rank heads on, to train on, and to evaluate on: text, and text that questions are put into.

    `distillation`: what stage 2 trains on; `train`, unless the settings ask for other blocks.
    """

    calibration: TokenBlocks
    train: TokenBlocks
    held_out: TokenBlocks
    prompts: TokenBlocks
    distillation: TokenBlocks


def adaptation_data(
    source: Any, tokenizer: PreTrainedTokenizerBase, settings: Preset, seed: int, *, stage2: bool = False
) -> AdaptationData:
    """The blocks of an adaptation; documents that are evaluated on are in neither of the other parts.

    Args:
        source: see `load_texts`. tokenizer: the model's. settings: lengths and counts. seed: of every draw.
        stage2: cut the blocks that the settings want for stage 2.

    Raises:
        ValueError: too little text.
    """
    documents = load_texts(source, min_chars=2 * settings.context, seed=seed, limit=4000)
    train, held_out = split_documents(documents, held_out=0.1, seed=seed)
    length = settings.context
    held = settings.eval_blocks + settings.eval_prompts
    evaluation = pack_documents(held_out, tokenizer, length, limit=held, blocks_per_document=2, seed=seed)
    if len(evaluation) < 2:
        raise ValueError(
            f"{source}: the held-out part gives {len(evaluation)} block of {length} tokens, at least 2 are needed; "
            "give more or longer documents, or a shorter context"
        )
    texts = max(len(evaluation) * settings.eval_blocks // held, 1)
    limit = settings.train_blocks + settings.calibration_documents
    blocks = pack_documents(train, tokenizer, length, limit=limit, blocks_per_document=2, seed=seed)
    count = min(settings.calibration_documents, max(len(blocks) - 1, 1))
    mixer = NeedleMixer(tokenizer)
    mixed = _with_needles(mixer, part_of(blocks, count, None), settings, seed)
    distillation = mixed
    if stage2 and (settings.distill_context is not None or settings.distill_blocks is not None):
        size = min(settings.distill_context or length, length)
        limit = settings.distill_blocks or settings.train_blocks
        shorter = pack_documents(train, tokenizer, size, limit=limit, blocks_per_document=2, seed=seed)
        distillation = _with_needles(mixer, shorter, settings, seed)
    return AdaptationData(
        calibration=part_of(blocks, 0, count),
        train=mixed,
        held_out=part_of(evaluation, 0, texts),
        prompts=part_of(evaluation, texts, None),
        distillation=distillation,
    )


def _with_needles(mixer: NeedleMixer, blocks: TokenBlocks, settings: Preset, seed: int) -> TokenBlocks:
    if blocks.label_mask is None:
        return mixer.mix(blocks, share=settings.needle_share, seed=seed)
    logger.warning("there are conversations in the training data: it gets no key-value needles")
    return blocks


def part_of(blocks: TokenBlocks, first: int, last: int | None) -> TokenBlocks:
    """Some of the blocks, in their order."""
    cut = slice(first, last)
    return TokenBlocks(
        blocks.input_ids[cut],
        blocks.needle_rows[cut],
        None if blocks.label_mask is None else blocks.label_mask[cut],
        blocks.document_ids[cut],
    )
