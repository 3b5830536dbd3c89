"""Checkpoint folders of the Trainer: which of them were written to their end."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

# the Trainer writes this file after everything else
STATE_FILE = "trainer_state.json"


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint folder, None where its name is no checkpoint's."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() else None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output: str | Path) -> list[Path]:
    """All checkpoint folders in `output`, complete or not, by step."""
    steps = {folder: checkpoint_step(folder) for folder in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((folder for folder, step in steps.items() if step is not None), key=lambda folder: steps[folder] or 0)


def last_checkpoint(output: str | Path) -> Path | None:
    """The newest complete checkpoint in `output`; None if there is none."""
    return next((folder for folder in reversed(checkpoints(output)) if is_complete(folder)), None)


def remove_incomplete(output: str | Path) -> None:
    """Remove what an interrupted save left, so that it does not count when old checkpoints are rotated out."""
    for folder in checkpoints(output):
        if not is_complete(folder):
            logger.warning("%s was not written to its end: removed", folder)
            shutil.rmtree(folder)
