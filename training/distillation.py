"""Stage 2: the backbone learns, in sparse mode, what its dense self says (PAPER section 6).

A `transformers.Trainer`. The loss is the mean over label rows of KL(teacher || student) on the teacher's top logits:
prompt rows run as prefill, label rows as decode steps. Data items are those of `TeacherCache`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..modeling.families_rtpurbo import attention_modules
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .distillation_arguments import SelfDistillationArguments
from .stage_trainer import StageTrainer

__all__ = ["SelfDistillationArguments", "SelfDistillationTrainer", "collate_labelled", "distillation_kl"]

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_ITEM = ("input_ids", "label_rows", "teacher_ids", "teacher_logits", "block")
# a 16-bit weight does not move by less than about a 500th of itself
_SMALL_STEP = 1e-5


def collate_labelled(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of `TeacherCache` items, padded on the right; `attention_mask` `[B, L]` where anything is padded.

    Raises:
        ValueError: an item that lacks an entry.
    """
    for item in items:
        if missing := [name for name in _ITEM if name not in item]:
            raise ValueError(f"a stage-2 data item needs {missing[0]!r}, this one has {sorted(item)}")

    def pad(name: str, value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)

    batch = {
        "input_ids": pad("input_ids", 0),
        "label_rows": pad("label_rows", -1),
        "teacher_ids": pad("teacher_ids", 0),
        "teacher_logits": pad("teacher_logits", 0),
        "block": torch.stack([item["block"] for item in items]),
    }
    lengths = torch.tensor([item["input_ids"].numel() for item in items])
    if len(set(lengths.tolist())) > 1:
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def distillation_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last axis, in nats; logits `[..., k]` in, fp32 `[...]` out."""
    log_teacher = teacher.float().log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - student.float().log_softmax(-1))).sum(-1)


class SelfDistillationTrainer(StageTrainer):
    """Trainer of the backbone of an `RTPurboForCausalLM`, whole or through a LoRA; the indexers are frozen.

    Full fine-tuning wants fp32 weights (with `bf16=True` for the arithmetic): steps of 3e-6 vanish in 16-bit ones.

    Args:
        model: a wrapped model with trained indexers.
        args: `SelfDistillationArguments`.
        train_dataset, eval_dataset: `TeacherCache`, or the same items.
        **kwargs: of `transformers.Trainer`.

    Raises:
        ValueError: another kind of model or arguments, or a model without retrieval heads.
    """

    args: SelfDistillationArguments
    model: RTPurboForCausalLM

    def __init__(
        self,
        model: RTPurboForCausalLM,
        args: SelfDistillationArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, RTPurboForCausalLM):
            raise ValueError(f"SelfDistillationTrainer trains an RTPurboForCausalLM, got {type(model).__name__}")
        if not isinstance(args, SelfDistillationArguments):
            raise ValueError(f"args must be SelfDistillationArguments, got {type(args).__name__}")
        if not model.indexers():
            raise ValueError(
                "the model has no retrieval heads: run stage 1 first (rtpurbo adapt, rtpurbo train-indexer)"
            )
        self._lora: Any = None
        if args.lora_rank:
            self._lora = _with_lora(model, args)
        else:
            model.requires_grad_(True)
            if model.dtype != torch.float32 and args.learning_rate < _SMALL_STEP:
                logger.warning(
                    "full fine-tuning of %s weights at a learning rate of %g: most steps are lost in rounding; load "
                    "the model with dtype=torch.float32 and set bf16=True",
                    model.dtype, args.learning_rate,
                )  # fmt: skip
        for indexer in model.indexers().values():
            indexer.requires_grad_(False)
        kwargs.setdefault("data_collator", collate_labelled)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # the loss is divided by the label rows of all accumulated batches
        self.model_accepts_loss_kwargs = True

    # loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Label rows of a step, over accumulated batches and processes."""
        count = torch.stack([(batch["label_rows"] >= 0).sum() for batch in batch_samples]).sum().to(device)
        return cast(torch.Tensor, self.accelerator.gather(count[None])).sum() if self.args.world_size > 1 else count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over label rows of the KL on the teacher's top logits, in nats.

        Raises:
            RuntimeError: the loss is not finite; names the step and the blocks.
        """
        rows = inputs["label_rows"]
        is_row = rows >= 0
        decode_rows = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        decode_rows[is_row.nonzero()[:, 0], rows[is_row]] = True
        # of all rows of the batch that any of its blocks needs
        kept = decode_rows.any(0).nonzero()[:, 0]
        if kept.numel() == 0:
            kept = kept.new_zeros(1)
        with self.model.attention_mode("sparse"):
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                decode_rows=decode_rows,
                use_cache=False,
                logits_to_keep=kept,
            ).logits
        place = torch.searchsorted(kept, rows.clamp_min(0)).clamp_max(len(kept) - 1)
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
        student = logits[batch, place[..., None], inputs["teacher_ids"]]
        total = torch.where(is_row, distillation_kl(student, inputs["teacher_logits"]), 0.0).sum()
        if not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"stage-2 loss is {total.item()} at step {self.state.global_step}, in blocks "
                f"{inputs['block'].tolist()}: check the weights and the learning rate; the last checkpoint is unharmed"
            )
        # processes average their gradients, each has its part of the sum
        count = is_row.sum() if num_items_in_batch is None else num_items_in_batch / self.args.world_size
        loss = total / count.clamp_min(1 / self.args.world_size)
        return (loss, {"loss": loss}) if return_outputs else loss

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A full checkpoint for `from_pretrained`, or the LoRA in peft's form; and the arguments as JSON."""
        if not self.args.should_save:
            return  # with FSDP the Trainer calls this in every process, and only the first one has the weights
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self._lora is None:
            self.model.save_pretrained(folder, state_dict=state_dict, adapter_only=False)
        else:
            self.save_lora(folder, state_dict=state_dict)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def save_lora(self, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the LoRA in peft's form: `PeftModel.from_pretrained(model, folder)` reads it.

        Args:
            folder: where to.
            state_dict: the whole weights of a sharded model, see `whole_weights`.

        Raises:
            ValueError: there is none.
        """
        from peft import get_peft_model_state_dict

        if self._lora is None:
            raise ValueError("there is no LoRA to save: set lora_rank, or save the model")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:
            state_dict = {_PEFT_PREFIX + key: value for key, value in state_dict.items()}
        weights = get_peft_model_state_dict(self._lora, state_dict=state_dict, save_embedding_layers=False)
        weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        temporary = target / f".{ADAPTER_FILE}.tmp"
        save_file(weights, temporary, metadata={"format": "pt"})
        temporary.replace(target / ADAPTER_FILE)
        self._lora.peft_config["default"].save_pretrained(str(target))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        if self._lora is None:
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder} holds no full checkpoint: was it trained with a LoRA? Set lora_rank then")
            loaded = RTPurboForCausalLM.from_pretrained(folder, dtype=self.model.dtype)
            self.load_weights(loaded.state_dict())
            return
        if not (folder / ADAPTER_FILE).is_file():
            raise ValueError(f"{folder} holds no LoRA: was it trained without one? Set lora_rank to 0 then")
        weights = load_file(folder / ADAPTER_FILE)
        if not weights:
            raise ValueError(f"{folder / ADAPTER_FILE} is empty: go on from an earlier checkpoint, or start anew")
        if self.is_fsdp_enabled:
            # by the names in the model: peft's own loading does not know shards
            names = {key: key.removeprefix(_PEFT_PREFIX).removesuffix(".weight") for key in weights}
            self.load_weights({f"{names[key]}.default.weight": value for key, value in weights.items()}, strict=False)
            return
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._lora, weights)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def trained_model(self, weights: dict[str, torch.Tensor] | None = None) -> RTPurboForCausalLM:
        """The trained model, in eval mode; a LoRA is merged into it, which ends this trainer's use.

        Args:
            weights: of a sharded model, from `whole_weights`: the result is a model of its own, on the CPU.
        """
        model, lora = self.model, self._lora
        if weights is not None:
            empty: Any = RTPurboForCausalLM(cast(Any, copy.deepcopy(self.model.config)))
            model = empty.to(self.model.dtype)
            for indexer in model.indexers().values():
                indexer.float()
            lora = None if lora is None else _with_lora(model, self.args)
            model.load_state_dict(weights)
        if lora is not None:
            lora.merge_and_unload()
            self._lora = None
        return model.eval()


def _with_lora(model: RTPurboForCausalLM, args: SelfDistillationArguments) -> Any:
    """peft's view of `model`, whose attention projections got a LoRA in place."""
    from peft import LoraConfig, get_peft_model

    names = {
        name
        for attention in attention_modules(model.model)
        for name, child in attention.named_children()
        if isinstance(child, nn.Linear)
    }
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(names),
    )
    return get_peft_model(cast(Any, model), config)
