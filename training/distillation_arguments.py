"""Arguments of stage 2: the paper's schedule, and LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .arguments import StageArguments


@dataclass
class SelfDistillationArguments(StageArguments):
    """`StageArguments` with stage 2's defaults (PAPER section 6), and:

    Args:
        warmup_steps: at most a third of all steps, so that short runs warm up in proportion (the paper's 200 of 600).
        lora_rank: rank of a LoRA on the attention projections; 0: full fine-tuning.
        lora_alpha: its scale; None: twice the rank.

    Raises:
        ValueError: a number out of range, or an option that stage 2 cannot serve.
    """

    warmup_share: ClassVar[int] = 3

    learning_rate: float = 3e-6
    warmup_steps: float = 200
    lr_scheduler_type: str = "constant_with_warmup"
    gradient_accumulation_steps: int = 8
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"use_reentrant": False})

    lora_rank: int = field(default=0, metadata={"help": "Rank of a LoRA on the attention projections; 0: none."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the LoRA; default: twice its rank."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (full fine-tuning) or more, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
