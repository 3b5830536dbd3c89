"""To train indexers on given blocks (stage 1, and once more on a model that stage 2 moved), and to save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .training.checkpoints import last_checkpoint
from .training.indexer_arguments import IndexerTrainingArguments
from .training.indexer_trainer import IndexerTrainer

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from .auto import RTPurboForCausalLM
    from .training.data import TokenBlocks


def train_indexers(
    model: RTPurboForCausalLM,
    blocks: TokenBlocks | Dataset,
    folder: str | Path,
    *,
    steps: int,
    held_out: TokenBlocks | None = None,
    seed: int = 0,
    report_to: str | list[str] = "none",
    **options: Any,
) -> IndexerTrainer:
    """Train the indexers of `model` in place against its own attention, going on after an interruption.

    Args:
        model: a wrapped model with retrieval heads; the same weights when a run goes on.
        blocks: the training set, or its stored activations. held_out: what the trainer's `evaluate` measures on.
        folder: the trainer's checkpoints and logs. steps: optimiser steps. seed: of the order of blocks and of rows.
        report_to: as in `transformers.TrainingArguments`.
        **options: further `IndexerTrainingArguments`, in place of what is set here too.
    """
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "logging_steps": max(steps // 40, 1),
        "save_steps": max(steps // 4, 1),
        "save_total_limit": 1,
        "seed": seed,
        "report_to": report_to,
        "use_cpu": model.device.type == "cpu",
    }
    arguments = IndexerTrainingArguments(output_dir=str(folder), **(settings | options))
    trainer = IndexerTrainer(model=model, args=arguments, train_dataset=blocks, eval_dataset=held_out)
    done = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if done is None else str(done))
    return trainer


def save_indexers(model: RTPurboForCausalLM, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the indexers alone, an adapter, with the tokenizer; the model is left in eval mode."""
    model.eval()
    model.save_pretrained(folder, adapter_only=True)
    tokenizer.save_pretrained(str(folder))
