"""The whole way: a dense base model in, an RTPurbo adapter and a report out."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from .auto import RTPurboForCausalLM
from .benchmarks.harness import environment
from .clean_process import CleanProcess
from .distill import REFRESHED, Stage2, own_device, save_distilled, train_stage2, trained_model
from .evaluation.fidelity import Scored, compare_variants
from .indexing import save_indexers, train_indexers
from .presets import Preset
from .recipe_data import AdaptationData, adaptation_data, part_of
from .report import write_report
from .runs import claim
from .sources import BaseModel, load_base
from .training.calibration import Calibration, calibrate
from .training.data import EVALUATION_KEYS, NeedleMixer
from .training.indexer_init import initialise_indexers
from .training.indexer_trainer import IndexerTrainer
from .training.needles import NeedleBlock
from .training.plots import plot_heads, plot_losses
from .training.stage_trainer import leave_process_group

logger = logging.getLogger(__name__)

CALIBRATION_FILE, ADAPTER = "calibration.json", "adapter"
# what every report compares, the measure first
_MODES = {"dense": "dense", "streaming": "streaming", "rtpurbo": "sparse"}


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `adapt` made: the model, stage 1's adapter, the final checkpoint (the same without stage 2), the report."""

    model: RTPurboForCausalLM
    adapter: Path
    report: dict[str, Any]
    checkpoint: Path


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        logger.info("%s ...", name)
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self._begin, 2)}


def adapt(
    base: str | BaseModel,
    output: str | Path,
    *,
    settings: Preset,
    data: Any = "system",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    report_to: str | list[str] = "none",
    stage2: Stage2 | None = None,
) -> Adaptation:
    """Calibrate, train the indexers, save an adapter, load it again, and report what was gained and lost.

    Args:
        base: a Hub id, folder, GGUF file or short name, see `load_base`; or a loaded base.
        output: folder for `adapter/`, `report/` and `trainer/`, with stage 2 for `stage2/` and `model/` (full weights),
            with refreshed indexers for `refresh/` and `refreshed/`; an interrupted run goes on from its last
            checkpoint.
        settings: see `Preset`.
        data: text to calibrate, train and evaluate on, see `load_texts`.
        seed: of data order, needles, initialisation and sampling.
        device, dtype: of the model; indexers train in fp32.
        report_to: as in `transformers.TrainingArguments`.
        stage2: train the backbone as well; the report then tells of every step of the way.

    Raises:
        ValueError: unsupported base, too little text, settings out of range, or `output` holds another run.
    """
    output = Path(output)
    clock = _Clock()
    with clock("load"):
        source = base if isinstance(base, BaseModel) else load_base(base, dtype=dtype, device=device)
    model = wrap(source, settings)
    with clock("data"):
        blocks = adaptation_data(data, source.tokenizer, settings, seed, stage2=stage2 is not None)
        needles = _needles(source, blocks, settings, seed)
    # only now: a run that ends on bad settings or data leaves nothing behind
    claim(output, _record(source, settings, seed, data, stage2))
    with clock("calibrate"):
        calibration = _calibration(output, model, blocks, settings, seed)
        _initialise(model, [list(heads) for heads in calibration.retrieval_heads], blocks, settings, seed)
    untrained = {key: value.clone() for key, value in model.indexer_state_dict().items()}
    with clock("train"):
        trainer = _stage1(output, model, blocks, settings, seed, report_to)
    prompt = blocks.held_out.input_ids[0, :64].tolist()
    with CleanProcess() as clean:
        with clock("evaluate the index"):
            stage1 = trainer.evaluate()
        with clock("save and reload"):
            adapter = _save(output, model, source, calibration)
            clean.check(adapter, model, prompt)
            model = RTPurboForCausalLM.from_pretrained(adapter, dtype=dtype).to(device).eval()
    variants = {name: Scored(model, mode) for name, mode in _MODES.items()}
    checkpoint, further = adapter, cast(dict[str, Any], {})
    if stage2 is not None:
        # stage 2 needs the room
        adapted, checkpoint = cast(Any, model).to("cpu"), output / "model"
        with clock("stage 2"):
            student = RTPurboForCausalLM.from_pretrained(adapter, dtype=stage2.training_dtype(dtype)).to(device)
            distiller = train_stage2(
                student, blocks.distillation, output / "stage2", tokenizer=source.tokenizer, settings=stage2,
                seed=seed, report_to=report_to,
            )  # fmt: skip
            lora = output / "lora" if stage2.lora_rank else None
            student = trained_model(distiller, dtype=dtype, lora=lora)
        if stage2.refresh_steps:
            moved = {key: value.clone() for key, value in student.indexer_state_dict().items()}
            with clock("refresh the index"):
                rate = stage2.refresh_learning_rate or settings.learning_rate
                again = dataclasses.replace(settings, steps=stage2.refresh_steps, learning_rate=rate)
                refresher = _stage1(output / "refresh", student, blocks, again, seed, report_to)
                further["refresh"] = refresher.evaluate()
                save_indexers(student, output / REFRESHED, tokenizer=source.tokenizer)
        with clock("save and reload stage 2"), CleanProcess() as clean:
            save_distilled(student, checkpoint, tokenizer=source.tokenizer)
            clean.check(checkpoint, student, prompt)
            model = RTPurboForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        adapted.to(device)
        variants |= {
            "before_stage1": Scored(adapted, "sparse", untrained),
            "after_stage1": Scored(adapted, "sparse"),
            "rtpurbo": Scored(model, "sparse"),
        }
        if stage2.refresh_steps:
            variants["after_stage2"] = Scored(model, "sparse", moved)
        losses = [{"step": e["step"], "loss": e["loss"]} for e in distiller.state.log_history if "loss" in e]
        further["stage2"] = {"settings": dataclasses.asdict(stage2), "losses": losses}
    with clock("evaluate"):
        found = compare_variants(variants, list(blocks.held_out.input_ids), needles, rows=settings.eval_rows)
        kv_bytes, kv_bytes_dense = _measured_kv_bytes(model, blocks.held_out.input_ids[0])
    sparse = found["rtpurbo"]
    report = {
        "model": source.name,
        "settings": dataclasses.asdict(settings),
        "data": data if isinstance(data, str) else [str(name) for name in data],
        "retrieval_heads": sum(map(len, calibration.retrieval_heads)),
        "query_heads": len(model.converted()) * model.config.get_text_config().num_attention_heads,
        **{name: figures.to_dict() for name, figures in found.items()},
        "selected_fraction": sparse.selected_fraction,
        "kept_mass": sparse.kept_mass,
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": kv_bytes_dense,
        "rows": sparse.rows,
        "questions": sparse.questions,
        "stage1": stage1,
        **further,
        "seed": seed,
        "seconds": clock.total(),
        "environment": environment(),
    }
    folder = output / "report"
    write_report(report, folder)
    plot_heads(calibration, folder / "heads.png")
    plot_losses(trainer.state.log_history, folder / "losses.png")
    return Adaptation(model, adapter, report, checkpoint)


def _record(source: BaseModel, settings: Preset, seed: int, data: Any, stage2: Stage2 | None = None) -> dict[str, Any]:
    """What tells one run from another."""
    record = {"base": source.path, "settings": dataclasses.asdict(settings), "seed": seed, "data": str(data)}
    return record if stage2 is None else {**record, "stage2": dataclasses.asdict(stage2)}


def _needles(source: BaseModel, blocks: AdaptationData, settings: Preset, seed: int) -> list[NeedleBlock]:
    """Key-value prompts for the evaluation, about other things than those of training."""
    mixer = NeedleMixer(source.tokenizer, keys=EVALUATION_KEYS)
    gap = min(settings.sliding_window, settings.context // 2)
    return [mixer.insert(row.tolist(), seed=f"{seed}:{i}", gap=gap) for i, row in enumerate(blocks.prompts.input_ids)]


def wrap(source: BaseModel, settings: Preset) -> RTPurboForCausalLM:
    """The base with the settings' window and index, and no retrieval heads yet."""
    local = Path(source.path).is_dir()
    return RTPurboForCausalLM.from_base(
        source.model,
        base_model_name_or_path=str(Path(source.path).resolve()) if local else source.path,
        base_model_revision=source.revision if source.path == source.upstream else None,
        sliding_window=settings.sliding_window,
        num_sink_tokens=settings.num_sink_tokens,
        index_dim=settings.index_dim,
        index_rotary_dim=settings.index_rotary_dim,
        index_rotary_wavelengths=settings.index_rotary_wavelengths(),
        index_top_p=settings.index_top_p,
        index_min_tokens=settings.index_min_tokens,
        index_block_size=settings.index_block_size,
        index_key_sharing=settings.index_key_sharing,
    )


def train_adapter(
    base: str,
    output: str | Path,
    heads: Calibration | list[list[int]],
    *,
    settings: Preset,
    data: Any = "system",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    report_to: str | list[str] = "none",
) -> tuple[Path, dict[str, float]]:
    """Stage 1 alone, on given retrieval heads: the adapter's folder, and figures on held-out text.

    Arguments and errors as in `adapt`; `heads` is a calibration, or a list of query heads for each layer. Under
    torchrun each process trains on documents of its own, and the first one saves.
    """
    output = Path(output)
    source = load_base(base, dtype=dtype, device=own_device(device))
    model = wrap(source, settings)
    blocks = adaptation_data(data, source.tokenizer, settings, seed)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        claim(output, _record(source, settings, seed, data))
    chosen = [list(h) for h in heads.retrieval_heads] if isinstance(heads, Calibration) else heads
    _initialise(model, chosen, blocks, settings, seed)
    trainer = _stage1(output, model, blocks, settings, seed, report_to)
    metrics = trainer.evaluate()
    if first:
        plot_losses(trainer.state.log_history, output / "losses.png")
        _save(output, model, source, heads if isinstance(heads, Calibration) else None)
    leave_process_group()
    return output / ADAPTER, metrics


def _save(output: Path, model: RTPurboForCausalLM, source: BaseModel, calibration: Calibration | None) -> Path:
    adapter = output / ADAPTER
    save_indexers(model, adapter, tokenizer=source.tokenizer)
    if calibration is not None:
        calibration.save(adapter / CALIBRATION_FILE)
    return adapter


def _calibration(output: Path, model, blocks: AdaptationData, settings: Preset, seed: int) -> Calibration:
    path = output / CALIBRATION_FILE
    if path.exists():
        logger.info("%s: calibration of the interrupted run", path)
        return Calibration.load(path)
    documents = list(blocks.calibration.input_ids)
    calibration = calibrate(model, documents, ratio=settings.ratio, rule=settings.head_rule, seed=seed)
    calibration.save(path)
    return calibration


def _initialise(model, heads: list[list[int]], blocks: AdaptationData, settings: Preset, seed: int) -> None:
    model.set_retrieval_heads(heads)
    documents = list(blocks.calibration.input_ids[:1])
    initialise_indexers(model, documents, method=settings.initialisation, seed=seed)


def _stage1(output: Path, model, blocks: AdaptationData, settings: Preset, seed: int, report_to) -> IndexerTrainer:
    return train_indexers(
        model,
        blocks.train,
        output / "trainer",
        steps=settings.steps,
        held_out=part_of(blocks.held_out, 0, 2),
        seed=seed,
        report_to=report_to,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        rows_per_document=settings.rows_per_document,
    )


def _measured_kv_bytes(model: RTPurboForCausalLM, ids: torch.Tensor) -> tuple[int, int]:
    """Bytes that the cache really holds after a prefill, and what a dense one would."""
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids.long()[None].to(model.device), past_key_values=cache, logits_to_keep=1)
    return cache.nbytes()["total"], cache.dense_nbytes()
