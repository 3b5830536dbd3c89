"""Stage 2 from a checkpoint: the distillation set, the teacher's cache, training, and what is saved."""

from __future__ import annotations

import dataclasses
import os
import shutil
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .auto import RTPurboForCausalLM
from .indexing import save_indexers, train_indexers
from .limits import check_limits, check_rate
from .modeling.families_rtpurbo import family_of
from .runs import claim
from .training.checkpoints import last_checkpoint
from .training.data import NeedleMixer, TokenBlocks, load_texts, pack_documents
from .training.distillation import SelfDistillationTrainer
from .training.distillation_arguments import SelfDistillationArguments
from .training.indexer_arguments import IndexerTrainingArguments
from .training.stage_trainer import leave_process_group
from .training.teacher_cache import LABEL_ROWS, TOP_K, TeacherCache, cache_teacher, label_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# names of transformers
# folder of refreshed indexers, an adapter: with a LoRA from stage 2, these two are the whole model
REFRESHED = "refreshed"
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}


@dataclasses.dataclass(frozen=True)
class Stage2:
    """What stage 2 decides, apart from model and data.

    Args:
        steps: optimiser steps.
        learning_rate: None: the paper's 3e-6, or 1e-4 for a LoRA.
        accumulation: blocks of a step, on each GPU.
        lora_rank: rank of a LoRA on the attention projections; 0: full fine-tuning.
        label_rows: labelled rows of a block of plain text.
        schedule: of the learning rate after its warm-up: `"constant"` (the paper's) or `"cosine"` (down to 0).
        gradient_checkpointing: take activations again in the backward instead of keeping them, which costs about half
            of the speed; None: where `activation_bytes` is more than a third of a GPU's free memory, and on CPUs.
        refresh_steps: steps that train the indexers once more afterwards, on the model as stage 2 left it; 0: none.
        refresh_learning_rate: of these steps; None: stage 1's.

    Raises:
        ValueError: no such schedule, or a number out of its range.
    """

    steps: int = 600
    learning_rate: float | None = None
    accumulation: int = 8
    lora_rank: int = 0
    label_rows: int = LABEL_ROWS
    schedule: str = "constant"
    gradient_checkpointing: bool | None = None
    refresh_steps: int = 0
    refresh_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        check_limits(self, steps=(1, inf), accumulation=(1, inf), lora_rank=(0, inf), label_rows=(1, inf))
        check_limits(self, refresh_steps=(0, inf))
        check_rate("learning_rate of stage 2", self.learning_rate)
        check_rate("refresh_learning_rate", self.refresh_learning_rate)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (1e-4 if self.lora_rank else SelfDistillationArguments.learning_rate)

    def training_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the backbone in training: fp32 where its weights move; `dtype` under a LoRA, which is fp32 itself."""
        return dtype if self.lora_rank else torch.float32


def distillation_blocks(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    limit: int,
    needle_share: float = 1 / 3,
    seed: int = 0,
) -> TokenBlocks:
    """The distillation set: the same blocks for `cache-teacher` and `distill`; needles go into plain text only.

    Raises:
        ValueError: see `load_texts`, `pack_documents` and `NeedleMixer.mix`.
    """
    documents = load_texts(data, min_chars=2 * context, seed=seed, limit=4000)
    blocks = pack_documents(documents, tokenizer, context, limit=limit, blocks_per_document=2, seed=seed)
    if blocks.label_mask is not None or needle_share == 0:
        return blocks
    return NeedleMixer(tokenizer).mix(blocks, share=needle_share, seed=seed)


def autocast_dtype(device: str | torch.device) -> torch.dtype | None:
    """What fp32 weights compute in: bf16 on a GPU, their own on a CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else None


def activation_bytes(model: RTPurboForCausalLM, length: int, rows: int) -> int:
    """About what the backward of a block keeps without checkpointing (measured: 8 GiB for SmolLM2-135M at 8K).

    Args:
        model: the student. length: tokens of a block. rows: its label rows.
    """
    config = model.config.get_text_config(decoder=True)
    half = autocast_dtype(model.device) is not None or model.dtype.itemsize == 2
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = 16 * config.hidden_size + 5 * intermediate
    # of label rows, fp32: scores, weights, and what their gradients need
    selected = sum(map(len, model.config.retrieval_heads or [])) * rows * length * 4 * 6
    return length * config.num_hidden_layers * width * (2 if half else 4) + selected


def _checkpoints(model: RTPurboForCausalLM, settings: Stage2, length: int, rows: int) -> bool:
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    if not family_of(model.config.base_config).forwards_kwargs:
        return False
    if model.device.type != "cuda":
        return True
    return activation_bytes(model, length, rows) > torch.cuda.mem_get_info(model.device)[0] / 3


def own_device(device: str) -> str:
    """`device` of this process: under torchrun each one has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def train_stage2(
    model: RTPurboForCausalLM,
    blocks: TokenBlocks,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Stage2,
    teacher: str | Path | None = None,
    seed: int = 0,
    report_to: str | list[str] = "none",
) -> SelfDistillationTrainer:
    """Cache the teacher (again only what is missing) and train `model` in place, going on after an interruption.

    Args:
        model: a wrapped model with trained indexers and, for full fine-tuning, fp32 weights; the weights it was adapted
            with, also when a run goes on.
        blocks: the distillation set.
        output: folder for `trainer/` and, unless `teacher` names another one, `teacher/`.
        tokenizer: the model's.
        settings: see `Stage2`.
        teacher: a cache of `cache_teacher` for these blocks.
        seed: of the order of the blocks.
        report_to: as in `transformers.TrainingArguments`.

    Returns:
        The trainer; `trained_model()` merges a LoRA.
    """
    folder = Path(output)
    half = autocast_dtype(model.device) if model.dtype == torch.float32 else None
    rows = label_rows(blocks, last=settings.label_rows)
    arguments = SelfDistillationArguments(
        output_dir=str(folder / "trainer"),
        max_steps=settings.steps,
        learning_rate=settings.rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        gradient_accumulation_steps=settings.accumulation,
        logging_steps=max(settings.steps // 40, 1),
        save_steps=max(settings.steps // 4, 1),
        save_total_limit=1,
        lora_rank=settings.lora_rank,
        gradient_checkpointing=_checkpoints(model, settings, blocks.input_ids.shape[1], rows.shape[1]),
        bf16=half is not None,
        seed=seed,
        report_to=report_to,
        use_cpu=model.device.type == "cpu",
    )
    cache = folder / "teacher" if teacher is None else Path(teacher)
    if teacher is None:
        part = arguments.process_index, arguments.world_size
        cache_teacher(model, blocks, cache, tokenizer=tokenizer, rows=rows, autocast=half, part=part)
        if arguments.world_size > 1:
            torch.distributed.barrier()
    data = TeacherCache(cache, model=model, tokenizer=tokenizer, blocks=blocks, rows=rows, k=TOP_K)
    trainer = SelfDistillationTrainer(model, arguments, data)
    done = last_checkpoint(folder / "trainer")
    trainer.train(resume_from_checkpoint=None if done is None else str(done))
    return trainer


def trained_model(
    trainer: SelfDistillationTrainer, *, dtype: torch.dtype, lora: str | Path | None = None
) -> RTPurboForCausalLM:
    """The model that stage 2 made, a LoRA merged into it; on request the LoRA alone is saved in `lora`.

    Every process calls it; the first one writes.

    Returns:
        The model, its backbone in `dtype` and in eval mode; in other processes than the first it may be sharded.
    """
    whole = trainer.whole_weights()
    if not trainer.is_world_process_zero():
        return trainer.model
    if lora is not None:
        trainer.save_lora(lora, state_dict=whole)
    model = trainer.trained_model(whole)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".indexer." not in name:
                parameter.data = parameter.data.to(dtype)
    return model


def save_distilled(model: RTPurboForCausalLM, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save all weights, in place of what `folder` held; it appears whole or not at all."""
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    cast(Any, model).save_pretrained(temporary, adapter_only=False)
    tokenizer.save_pretrained(str(temporary))
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def distill(
    checkpoint: str | Path,
    output: str | Path,
    *,
    settings: Stage2,
    data: Any = "system",
    context: int = 32768,
    blocks: int = 256,
    needle_share: float = 1 / 3,
    teacher: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    report_to: str | list[str] = "none",
) -> Path:
    """Stage 2 alone, on a checkpoint or adapter that stage 1 made.

    Args:
        checkpoint: folder or Hub id.
        output: folder for `model/` (full weights), `lora/` where there is one, `teacher/` and `trainer/`, with
            refreshed indexers `refresh/` and `refreshed/`; an interrupted run goes on from its last checkpoint.
        settings: see `Stage2`.
        data, context, blocks, needle_share, seed: the distillation set, see `distillation_blocks`.
        teacher: a folder that `rtpurbo cache-teacher` filled with the same data; None: cached first.
        device: of the model.
        dtype: of the saved weights, and of the frozen ones under a LoRA; full fine-tuning keeps fp32 ones.
        report_to: as in `transformers.TrainingArguments`.

    Returns:
        The folder of the full checkpoint.

    Raises:
        ValueError: no retrieval heads, too little text, a teacher of something else, `output` holds a finished run, or
            indexers to be refreshed in several processes.
    """
    from transformers import AutoTokenizer

    target = Path(output) / "model"
    if target.exists():
        raise ValueError(f"{target} exists: choose another --output, or remove it")
    if settings.refresh_steps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--refresh-steps runs in one process: leave it out under torchrun, and train the indexers of the saved "
            "model with IndexerTrainer, which takes several"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = RTPurboForCausalLM.from_pretrained(checkpoint, dtype=settings.training_dtype(dtype))
    model = model.to(own_device(device))
    chosen = distillation_blocks(data, tokenizer, context=context, limit=blocks, needle_share=needle_share, seed=seed)
    record = {"checkpoint": str(checkpoint), "settings": dataclasses.asdict(settings), "context": context}
    record |= {"blocks": blocks, "needle_share": needle_share, "seed": seed, "data": str(data), "device": device}
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        claim(Path(output), record)
    trainer = train_stage2(
        model, chosen, output, tokenizer=tokenizer, settings=settings, teacher=teacher, seed=seed, report_to=report_to
    )
    lora = Path(output) / "lora" if settings.lora_rank else None
    model = trained_model(trainer, dtype=dtype, lora=lora)
    if first:
        if settings.refresh_steps:
            train_indexers(
                model,
                chosen,
                Path(output) / "refresh" / "trainer",
                steps=settings.refresh_steps,
                learning_rate=settings.refresh_learning_rate or IndexerTrainingArguments.learning_rate,
                seed=seed,
                report_to=report_to,
            )
            save_indexers(model, Path(output) / REFRESHED, tokenizer=tokenizer)
        save_distilled(model, target, tokenizer=tokenizer)
    leave_process_group()
    return target
