"""What the arguments of both stages share: the paper's schedule (PAPER section 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments


@dataclass
class StageArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of both stages.

    Args:
        warmup_steps: at most a part of all steps (`warmup_share` of them), so that short runs warm up in proportion.

    Raises:
        ValueError: `push_to_hub`: checkpoints are for resuming.
    """

    # one warm-up step for so many steps of a run, at most
    warmup_share: ClassVar[int] = 6

    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_steps: int = 600
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub:
            raise ValueError("checkpoints of a stage are for resuming: push with model.push_to_hub after training")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps of a run of so many steps."""
        return min(super().get_warmup_steps(num_training_steps), max(num_training_steps // self.warmup_share, 1))
