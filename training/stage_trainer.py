"""What the trainers of both stages share: interruptions, complete checkpoints, and sharded weights (FSDP2)."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .arguments import StageArguments
from .checkpoints import STATE_FILE, checkpoint_step, last_checkpoint, remove_incomplete

logger = logging.getLogger(__name__)


class _StopOnInterrupt(TrainerCallback):
    """Ends training after the step in which the first ctrl-C came, with a checkpoint; all processes together."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if args.world_size > 1:
            asked = torch.tensor(float(trainer.interrupted), device=args.device)
            trainer.interrupted = bool(cast(torch.Tensor, trainer.accelerator.reduce(asked)) > 0)
        if trainer.interrupted:
            control.should_save = control.should_training_stop = True
        return control


class StageTrainer(Trainer):
    """A `transformers.Trainer` of an `RTPurboForCausalLM` that can be stopped and go on.

    Raises:
        ValueError: FSDP of another version than 2, or DeepSpeed ZeRO-3.
    """

    args: StageArguments
    model: RTPurboForCausalLM

    def __init__(self, model: RTPurboForCausalLM, args: StageArguments, **kwargs: Any) -> None:
        self.interrupted = False
        if args.n_gpu > 1:
            logger.info("training on one of %d GPUs; start with torchrun to use them all", args.n_gpu)
            args._n_gpu = 1
        use_cache = model.config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        # the Trainer writes its own preference into the config, which is saved with the model
        model.config.use_cache = use_cache
        self.can_return_loss, self.label_names = True, []
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 is not supported: shard weights with FSDP2, or use ZeRO stage 1 or 2")
        if self.is_fsdp_enabled:
            plugin: Any = cast(Any, self.accelerator.state).fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(f"FSDP {plugin.fsdp_version} is not supported: set fsdp_config={{'version': 2}}")
            # what routes stays as it is, fp32 and whole, on each process
            plugin.ignored_modules = [indexer.to(args.device) for indexer in model.indexers().values()]
            plugin.set_state_dict_type("FULL_STATE_DICT")
        self.add_callback(_StopOnInterrupt(self))

    @property
    def _output(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As `Trainer.train`. `True` resumes from the newest checkpoint that was written to its end.

        The first ctrl-C lets the step finish and saves a checkpoint, the second one stops at once.

        Raises:
            ValueError: `True`, and there is no complete checkpoint.
            KeyboardInterrupt: ctrl-C.
        """
        if resume_from_checkpoint is True:
            found = last_checkpoint(self._output)
            if found is None:
                raise ValueError(f"{self._output} holds no complete checkpoint to resume from")
            resume_from_checkpoint = str(found)
        if self.is_world_process_zero():
            remove_incomplete(self._output)
        self.interrupted = False
        if isinstance(resume_from_checkpoint, str) and not self._engine and self._is_last(resume_from_checkpoint):
            return self._take_up(resume_from_checkpoint)
        with self._catch_interrupt():
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.interrupted:
            raise KeyboardInterrupt
        return result

    @property
    def _engine(self) -> bool:
        """Whether weights and optimiser are kept by FSDP or DeepSpeed, which only a training loop sets up."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _is_last(self, checkpoint: str) -> bool:
        """Whether a checkpoint is of the end of this run, counted in steps."""
        path = Path(checkpoint) / STATE_FILE
        return path.is_file() and 0 < self.args.max_steps <= TrainerState.load_from_json(str(path)).global_step

    def _take_up(self, checkpoint: str) -> TrainOutput:
        """A run that was over: its weights and logs. The Trainer would take one more step in the middle of an epoch."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        return TrainOutput(self.state.global_step, float("nan"), {})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; after a run's last step, where FSDP and DeepSpeed runs resume, nothing moves."""
        if 0 < self.args.max_steps <= self.state.global_step:
            return torch.zeros((), device=self.args.device)
        return super().training_step(*args, **kwargs)

    @contextlib.contextmanager
    def _catch_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            logger.warning("interrupted: this step is finished and saved; once more stops at once")
            self.interrupted = True

        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:
            # a folder of that step is not complete while it is written again
            for folder in self._output.glob("checkpoint-*"):
                if checkpoint_step(folder) == self.state.global_step:
                    (folder / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # the Trainer would write the weights a second time, in a form of its own
        from accelerate.utils import save_fsdp_optimizer

        plugin = cast(Any, self.accelerator.state).fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def load_weights(self, weights: dict[str, torch.Tensor], *, strict: bool = True) -> None:
        """Fill the model, sharded or not, from whole tensors by name."""
        if not self.is_fsdp_enabled:
            self.model.load_state_dict(weights, strict=strict)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(cast(torch.nn.Module, self.model), cast(Any, weights), options=options)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights of a sharded model, gathered on the CPU of process 0; None without shards. All processes call."""
        return self.accelerator.get_state_dict(cast(Any, self.model)) if self.is_fsdp_enabled else None


def leave_process_group() -> None:
    """Let the processes of a torchrun end together: one that goes ahead can leave another waiting in its teardown."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
