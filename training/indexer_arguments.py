"""Arguments of stage 1: the paper's schedule, and how rows are sampled and activations kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import StageArguments

ACTIVATION_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class IndexerTrainingArguments(StageArguments):
    """`StageArguments` with stage 1's defaults (PAPER section 6), and:

    Args:
        warmup_steps: at most a sixth of all steps, so that short runs warm up in proportion (the paper's 100 of 600).
        rows_per_document: random query rows of a document in a step; -1 takes all rows.
        needle_rows_per_document: at most so many of a document's `needle_rows` in addition; -1 takes all.
        first_row: random rows are not drawn from this leading part of a document: short contexts need no index.
        eval_rows_per_document: random rows of a document in an evaluation, always the same ones; needle rows likewise.
        cache_activations: step over stored queries and keys instead of running the backbone in each step. None: where
            documents come up more than once and their activations fit `activation_cache_limit_gib`.
        cached_rows_per_document: rows (text, and as many needle rows at most) in the stored pool of a document.
        activation_cache_dir: keep activations in files there; None: in memory (several processes:
            `output_dir/activations`).
        shard_rows: several processes take turns at the rows of the same documents, instead of documents of their own;
            losses and gradients are those of one process.
        plateau_patience: stop when the losses of the heads have not fallen for so many logs; None: take all steps.
        plateau_threshold: relative fall (mean over heads) that counts.
        activation_dtype: of stored activations: `"auto"` (the model's), `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: a number out of range, or an option that stage 1 cannot serve.
    """

    learning_rate: float = 1e-3
    warmup_steps: float = 100
    lr_scheduler_type: str = "cosine"

    rows_per_document: int = field(default=16, metadata={"help": "Random query rows of a document in a step; -1: all."})
    needle_rows_per_document: int = field(default=16, metadata={"help": "At most so many needle rows in addition."})
    first_row: float = field(default=0.25, metadata={"help": "Leading part of a document without random rows."})
    eval_rows_per_document: int = field(default=64, metadata={"help": "Random rows of a document in an evaluation."})
    cache_activations: bool | None = field(default=None, metadata={"help": "Step over stored queries and keys."})
    cached_rows_per_document: int = field(default=256, metadata={"help": "Rows in a document's stored pool."})
    activation_cache_dir: str | None = field(default=None, metadata={"help": "Folder for stored activations."})
    activation_cache_limit_gib: float = field(default=8.0, metadata={"help": "Largest cache that is made unasked."})
    shard_rows: bool = field(default=False, metadata={"help": "Processes share the rows of each document."})
    plateau_patience: int | None = field(default=None, metadata={"help": "Stop after so many logs without a fall."})
    plateau_threshold: float = field(default=0.01, metadata={"help": "Relative fall of the losses that counts."})
    activation_dtype: str = field(default="auto", metadata={"help": "Dtype of stored activations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows_per_document", "eval_rows_per_document", "cached_rows_per_document"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise ValueError(f"{name} must be -1 (all rows) or at least 1, got {value}")
        if self.needle_rows_per_document < -1:
            raise ValueError(f"needle_rows_per_document must be -1 or at least 0, got {self.needle_rows_per_document}")
        if not 0 <= self.first_row < 1:
            raise ValueError(f"first_row must be in [0, 1), got {self.first_row}")
        if self.plateau_patience is not None and self.plateau_patience < 1:
            raise ValueError(f"plateau_patience must be at least 1, or None, got {self.plateau_patience}")
        if not 0 < self.plateau_threshold < 1:
            raise ValueError(f"plateau_threshold must be in (0, 1), got {self.plateau_threshold}")
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise ValueError(f"activation_dtype must be one of {ACTIVATION_DTYPES}, got {self.activation_dtype!r}")
        if -1 != self.cached_rows_per_document < self.rows_per_document:
            raise ValueError(
                f"cached_rows_per_document ({self.cached_rows_per_document}) must not be smaller than "
                f"rows_per_document ({self.rows_per_document})"
            )
