"""Early stop of stage 1: when the losses of the heads, each on its own scale, have stopped falling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

# mean over heads of the logarithm of their loss since the last log
HEAD_LOSS = "kl_log_mean"


def reached_plateau(log_history: Sequence[Mapping[str, Any]], *, patience: int, threshold: float) -> bool:
    """Whether the last `patience` logs fell by less than the part `threshold` below the best log before them.

    The mean of logarithms weighs heads alike: one that is still falling counts as much with a small loss as with a
    large one. It looks at the history alone, so a resumed run stops where an unbroken one does.
    """
    values = [entry[HEAD_LOSS] for entry in log_history if HEAD_LOSS in entry]
    if len(values) <= patience:
        return False
    return min(values[-patience:]) > min(values[:-patience]) - threshold


class StopOnPlateau(TrainerCallback):
    """Ends training, with a checkpoint, at the log that shows a plateau."""

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def on_log(self, args, state, control, **kwargs):
        if reached_plateau(state.log_history, patience=self.patience, threshold=self.threshold):
            control.should_save = control.should_training_stop = True
        return control
