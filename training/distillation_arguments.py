"""Arguments of stage 2: the paper's schedule, and LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

_WARMUP_SHARE = 3


@dataclass
class SelfDistillationArguments(TrainingArguments):
    """`TrainingArguments` with stage 2's defaults (PAPER section 6), and:

    Args:
        warmup_steps: at most a third of all steps, so that short runs warm up in proportion (the paper's 200 of 600).
        lora_rank: rank of a LoRA on the attention projections; 0: full fine-tuning.
        lora_alpha: its scale; None: twice the rank.

    Raises:
        ValueError: a number out of range, or an option that stage 2 cannot serve.
    """

    learning_rate: float = 3e-6
    warmup_steps: float = 200
    lr_scheduler_type: str = "constant_with_warmup"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_steps: int = 600
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"use_reentrant": False})
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    lora_rank: int = field(default=0, metadata={"help": "Rank of a LoRA on the attention projections; 0: none."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the LoRA; default: twice its rank."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (full fine-tuning) or more, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if self.push_to_hub:
            raise ValueError("stage-2 checkpoints are for resuming: push with model.push_to_hub after training")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps of a run of so many steps."""
        return min(super().get_warmup_steps(num_training_steps), max(num_training_steps // _WARMUP_SHARE, 1))
