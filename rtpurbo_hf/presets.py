"""Named settings for adapting a model: the paper's, ours, and the demo's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from .distill import Stage2
from .limits import check_limits, check_rate


@dataclass(frozen=True)
class Preset:
    """Everything that `rtpurbo adapt` decides, apart from the model and the data.

    Args:
        context: tokens in a training block, and the length to serve.
        sliding_window, num_sink_tokens: what local heads see.
        ratio: part of all query heads that become retrieval heads; None: see `training.calibration.calibrate`.
        head_rule: `"score"` or `"even"`, see `training.calibration.calibrate`.
        index_dim, index_rotary_dim, index_top_p, index_min_tokens, index_block_size, index_key_sharing: the index. 32
            dimensions were enough for heads of 64; for heads of 256, 64 with 32 rotated, or more (docs/training.md).
        calibration_documents: blocks of text that heads are ranked on.
        train_blocks: blocks of the training set. needle_share: part of them with key-value needles.
        steps, learning_rate, warmup_steps: stage 1.
        rows_per_document: sampled query rows of a block in a step; -1 takes all.
        initialisation: `"svd"` or `"random"`.
        distill_context, distill_blocks: tokens (at most `context`) and number of stage-2 blocks; both None: stage 1's.
        eval_blocks, eval_prompts, eval_rows: held-out text blocks, key-value prompts, and scored rows of a block.

    Raises:
        ValueError: a number out of its range. What the model's config holds is checked there.
    """

    context: int = 32768
    sliding_window: int = 8192
    num_sink_tokens: int = 4
    ratio: float | None = None
    head_rule: str = "even"
    index_dim: int = 32
    index_rotary_dim: int = 16
    index_top_p: float = 0.9
    index_min_tokens: int = 64
    index_block_size: int = 1
    index_key_sharing: str = "head"
    calibration_documents: int = 4
    train_blocks: int = 256
    needle_share: float = 1 / 3
    steps: int = 600
    learning_rate: float = 1e-3
    warmup_steps: int = 60
    rows_per_document: int = 64
    initialisation: str = "svd"
    distill_context: int | None = None
    distill_blocks: int | None = None
    eval_blocks: int = 8
    eval_prompts: int = 8
    eval_rows: int = 512

    def __post_init__(self) -> None:
        positive = ("steps", "train_blocks", "calibration_documents", "distill_blocks", "eval_blocks", "eval_prompts")
        check_limits(
            self,
            context=(32, inf),
            distill_context=(32, inf),
            needle_share=(0, 1),
            warmup_steps=(0, inf),
            eval_rows=(1, inf),
            **dict.fromkeys(positive, (1, inf)),
        )
        check_rate("learning_rate", self.learning_rate)
        if self.rows_per_document != -1:
            check_limits(self, rows_per_document=(1, inf))
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")

    def index_rotary_wavelengths(self) -> list[float]:
        """Shortest and longest wavelength of the rotated index dimensions, in tokens."""
        return [64.0, 4.0 * self.context]


DEFAULT = Preset()
PRESETS = {
    "default": DEFAULT,
    # PAPER sections 6 and 7
    "paper": replace(
        DEFAULT,
        context=49152,
        ratio=0.15,
        head_rule="score",
        index_dim=16,
        index_rotary_dim=0,
        index_min_tokens=0,
        index_block_size=64,
        train_blocks=600,
        warmup_steps=100,
        rows_per_document=-1,
        initialisation="random",
    ),
    # SmolLM2-135M within minutes on two CPU cores
    "demo": replace(
        DEFAULT,
        context=4096,
        sliding_window=1024,
        index_dim=16,
        index_rotary_dim=4,
        index_min_tokens=128,
        train_blocks=8,
        steps=200,
        warmup_steps=20,
        rows_per_document=32,
        learning_rate=3e-3,
        distill_context=2048,
        distill_blocks=10,
        eval_blocks=4,
        eval_prompts=5,
        eval_rows=512,
    ),
}

STAGE2 = {
    "default": Stage2(),
    "paper": Stage2(),
    # of a 2K block, the rows that local heads do not see everything of
    "demo": Stage2(steps=10, learning_rate=5e-4, accumulation=1, lora_rank=16, label_rows=1000),
}


def preset(name: str, **overrides) -> Preset:
    """The named preset, with those overrides that are not None.

    Raises:
        ValueError: no such preset.
    """
    return _named(PRESETS, name, overrides)


def stage2_preset(name: str, **overrides) -> Stage2:
    """Stage 2 of the named preset, with those overrides that are not None. A LoRA's rank and the learning rate go
    together: an override of the rank alone sets the rate back to that rank's own default.

    Raises:
        ValueError: no such preset.
    """
    if overrides.get("lora_rank") is not None and overrides.get("learning_rate") is None:
        return replace(_named(STAGE2, name, overrides), learning_rate=None)
    return _named(STAGE2, name, overrides)


def _named(presets: dict[str, Any], name: str, overrides: dict[str, Any]) -> Any:
    if name not in presets:
        raise ValueError(f"no preset {name!r}; presets are {', '.join(presets)}")
    return replace(presets[name], **{key: value for key, value in overrides.items() if value is not None})
