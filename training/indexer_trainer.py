"""Stage 1: train the indexers against the frozen model's own attention (PAPER section 6).

A `transformers.Trainer`: logging, callbacks, `report_to`, gradient accumulation, DDP and resuming are the Trainer's.
The loss is the mean over retrieval heads of KL(attention || index softmax) at sampled rows. A data item is a dict of
`input_ids` `[L]` and, where there are any, `attention_mask` `[L]` and `needle_rows` (slots whose next token is an
answer, padded with -1).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.indexer_rtpurbo import RTPurboIndexer
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .activation_cache import ActivationCache, CachedDocument, cache_nbytes
from .indexer_arguments import IndexerTrainingArguments
from .indexer_checkpoint import load_indexers, save_indexers
from .plateau import HEAD_LOSS, StopOnPlateau
from .plots import plot_losses
from .row_sampling import CACHE_STEP, EVALUATION_STEP, Rows, RowSampler, document_key, token_span
from .stage1 import STATISTICS, LayerRows, layer_kl, layer_statistics
from .stage_trainer import StageTrainer

__all__ = ["IndexerTrainer", "IndexerTrainingArguments", "collate_documents", "plot_losses", "train_indexer"]

logger = logging.getLogger(__name__)

_KINDS = ("", "needle_")


def collate_documents(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of documents, padded on the right; or of places in an activation cache.

    Returns:
        `input_ids` `[B, L]`, `attention_mask` `[B, L]` where anything is padded, `needle_rows` `[B, R]` and
        `document_key` `[B]`; or `cache_index` `[B]`.

    Raises:
        ValueError: an item without `input_ids`, or with others than one dimension.
    """
    if "cache_index" in items[0]:
        return {"cache_index": torch.stack([item["cache_index"] for item in items])}
    ids = []
    for item in items:
        if "input_ids" not in item:
            raise ValueError(f"a stage-1 data item needs 'input_ids', this one has {sorted(item)}")
        ids.append(torch.as_tensor(item["input_ids"]).long())
        if ids[-1].ndim != 1 or ids[-1].numel() < 2:
            raise ValueError(f"input_ids must be at least 2 token ids [L], got shape {tuple(ids[-1].shape)}")
    masks = [
        torch.as_tensor(item["attention_mask"]).long()
        if item.get("attention_mask") is not None
        else torch.ones_like(row)
        for item, row in zip(items, ids, strict=True)
    ]
    needles = [torch.as_tensor(item.get("needle_rows", ())).long() for item in items]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "needle_rows": nn.utils.rnn.pad_sequence(needles, batch_first=True, padding_value=-1),
        "document_key": torch.tensor([document_key(row) for row in ids]),
    }
    mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return batch


@contextlib.contextmanager
def _unprepared(accelerator: Any) -> Iterator[None]:
    """`accelerator.prepare` gives its argument back meanwhile."""
    accelerator.prepare = lambda loader: loader
    try:
        yield
    finally:
        del accelerator.prepare


class CachedIndexers(nn.Module):
    """The indexers alone, for steps over cached activations: what DDP wraps then."""

    def __init__(self, model: RTPurboForCausalLM):
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): indexer for layer, indexer in model.indexers().items()})

    def forward(self, documents: list[tuple[dict[int, LayerRows], torch.Tensor]]) -> dict[int, torch.Tensor]:
        """Per layer, the KL of each head `[n]`, summed over documents with their row weights `[1, R]`."""
        losses: dict[int, torch.Tensor] = {}
        for layers, weight in documents:
            for layer, data in layers.items():
                kl = layer_kl(cast(RTPurboIndexer, self.layers[str(layer)]), data, weight)
                losses[layer] = losses[layer] + kl if layer in losses else kl
        return losses


class IndexerTrainer(StageTrainer):
    """Trainer of the indexers of an `RTPurboForCausalLM`; the backbone is frozen and stays in eval mode.

    Args:
        model: a wrapped model with retrieval heads, its indexers initialised.
        args: `IndexerTrainingArguments`.
        train_dataset, eval_dataset: see the module; `eval_dataset` may be a dict of data sets.
        **kwargs: of `transformers.Trainer`.

    Raises:
        ValueError: another kind of model or arguments, or a model without retrieval heads.
    """

    args: IndexerTrainingArguments
    model: RTPurboForCausalLM

    def __init__(
        self,
        model: RTPurboForCausalLM,
        args: IndexerTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, RTPurboForCausalLM):
            raise ValueError(f"IndexerTrainer trains an RTPurboForCausalLM, got {type(model).__name__}")
        if not isinstance(args, IndexerTrainingArguments):
            raise ValueError(f"args must be IndexerTrainingArguments, got {type(args).__name__}")
        if not model.indexers():
            raise ValueError("the model has no retrieval heads: calibrate and call set_retrieval_heads first")
        model.requires_grad_(False)
        for indexer in model.indexers().values():
            indexer.float().requires_grad_(True)
        kwargs.setdefault("data_collator", collate_documents)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.model_accepts_loss_kwargs = False
        if args.plateau_patience is not None:
            self.add_callback(StopOnPlateau(args.plateau_patience, args.plateau_threshold))
        self._heads = [(m.layer_idx, h) for m in model.converted() for h in m.rtpurbo.plans["sparse"].retrieval]
        self._caches: list[tuple[Any, ActivationCache]] = []
        self._caching: bool | None = args.cache_activations
        self._seen: list[torch.Tensor] = []
        self._log_parameters()

    def _log_parameters(self) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.model.parameters())
        logger.info(
            "trainable params: %s || all params: %s || trainable%%: %.4f",
            f"{trained:,}", f"{everything:,}", 100 * trained / everything,
        )  # fmt: skip

    # rows

    def _sampler(self, *, evaluation: bool = False, pool: bool = False) -> RowSampler:
        args = self.args
        if evaluation:
            return RowSampler(args.eval_rows_per_document, args.eval_rows_per_document, args.first_row, args.seed)
        if pool:
            everything = args.rows_per_document == -1 or args.cached_rows_per_document == -1
            count = -1 if everything else args.cached_rows_per_document
            return RowSampler(count, count, args.first_row, args.seed)
        return RowSampler(args.rows_per_document, args.needle_rows_per_document, args.first_row, args.seed)

    def _draw(self, inputs: dict[str, torch.Tensor], *, evaluation: bool) -> Rows:
        """This step's rows of a batch of documents."""
        sampler = self._sampler(evaluation=evaluation)
        step = EVALUATION_STEP if evaluation else self.state.global_step
        mask, needles = inputs.get("attention_mask"), inputs["needle_rows"].cpu()
        drawn = []
        for i, key in enumerate(inputs["document_key"].tolist()):
            span = token_span(None if mask is None else mask[i].cpu(), inputs["input_ids"].shape[1])
            text, needle = sampler.text_rows(*span), needles[i][needles[i] >= 0]
            chosen, is_needle = sampler.draw(text, needle, step=step, key=key)
            drawn.append((torch.cat([text, needle])[chosen], is_needle))
        return Rows.stack(drawn).to(inputs["input_ids"].device)

    @property
    def _part(self) -> tuple[int, int]:
        """This process's part of a document's rows, and of how many."""
        args = self.args
        return (args.process_index, args.world_size) if args.shard_rows else (0, 1)

    def _draw_cached(self, document: CachedDocument) -> tuple[dict[int, LayerRows], torch.Tensor]:
        """This step's rows of a cached document that are this process's, and their weights `[R]`."""
        step, (part, parts) = self.state.global_step, self._part
        chosen, _ = self._sampler().draw(document.text, document.needle, step=step, key=document.key)
        count = chosen.numel()
        # a process without rows of its own takes one that weighs nothing
        own = chosen[part::parts] if part < count else chosen[:1]
        weight = torch.full((own.numel(),), parts / max(count, 1) if part < count else 0.0)
        return document.rows(own, self.args.device), weight

    # loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over retrieval heads, documents and rows of the KL, in nats.

        Raises:
            RuntimeError: the loss is not finite; names the step and the layers.
        """
        # the teacher must not drop anything out, whatever mode the Trainer has set
        model.eval()
        if "cache_index" in inputs:
            losses = self._cached_losses(model, inputs["cache_index"].tolist())
        else:
            losses = self._losses(model, inputs)
        by_layer, loss = losses
        if not bool(torch.isfinite(loss)):
            bad = [layer for layer, kl in by_layer.items() if not bool(torch.isfinite(kl).all())]
            raise RuntimeError(
                f"stage-1 loss is {loss.item()} at step {self.state.global_step}, in layers {bad}: check the weights "
                "and the learning rate; the last checkpoint is unharmed"
            )
        self._seen.append(torch.cat([by_layer[layer].detach() for layer in sorted(by_layer)]))
        return (loss, {"loss": loss}) if return_outputs else loss

    def _losses(self, model, inputs) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        slots, weight = self._draw(inputs, evaluation=False).part(*self._part)
        by_layer = {}

        def layer_loss(seen: AttentionInputs) -> torch.Tensor | None:
            if not isinstance(seen.indexer, RTPurboIndexer):
                return None
            kl = layer_kl(seen.indexer, LayerRows.take(seen, slots), weight)
            by_layer[seen.layer_idx] = kl
            return kl.sum() / len(self._heads)

        output = model(
            input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), layer_loss=layer_loss
        )
        return by_layer, output.loss

    def _cached_losses(self, model, indices: list[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        cache = self.train_dataset
        assert isinstance(cache, ActivationCache)
        documents = []
        for index in indices:
            layers, weight = self._draw_cached(cache.document(index))
            documents.append((layers, weight[None].to(self.args.device) / len(indices)))
        by_layer = model(documents)
        return by_layer, torch.stack([kl.sum() for kl in by_layer.values()]).sum() / len(self._heads)

    def _wrap_model(self, model, training=True, dataloader=None):
        if training and model is self.model and self._use_cache():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("cached activations work with DDP or one process: set cache_activations=False")
            return self.accelerator.prepare_model(CachedIndexers(self.model))
        return super()._wrap_model(model, training=training, dataloader=dataloader)

    # activation cache

    def _use_cache(self) -> bool:
        """Whether steps run on cached activations; decided once."""
        if self._caching is None:
            self._caching = self._worth_caching()
            logger.info("cached activations: %s", "yes" if self._caching else "no")
        return self._caching

    def _worth_caching(self) -> bool:
        args = self.args
        data: Any = self.train_dataset
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or len(data) == 0:
            return False
        documents = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = documents / len(data) if args.max_steps > 0 else args.num_train_epochs
        length = len(data[0]["input_ids"])
        rows = length if args.cached_rows_per_document == -1 else args.cached_rows_per_document
        itemsize = (self._activation_dtype() or self.model.dtype).itemsize
        size = cache_nbytes(self.model, len(data), length, rows, itemsize)
        return epochs > 1 and size <= args.activation_cache_limit_gib * 2**30

    def _activation_dtype(self) -> torch.dtype | None:
        return None if self.args.activation_dtype == "auto" else getattr(torch, self.args.activation_dtype)

    def _cached(self, dataset: Any, *, evaluation: bool) -> Any:
        """The activation cache of a data set, made when it is first asked for."""
        if isinstance(dataset, ActivationCache) or dataset is None:
            return dataset
        for known, cache in self._caches:
            if known is dataset:
                return cache
        args = self.args
        folder = args.activation_cache_dir
        if folder is None and args.world_size > 1:
            folder = str(self._output / "activations")
        if folder is not None:
            name = f"evaluation-{sum(cache.step == EVALUATION_STEP for _, cache in self._caches)}"
            folder = str(Path(folder) / (name if evaluation else "training"))
        self.model.eval()
        cache = ActivationCache(
            self.model,
            dataset,
            sampler=self._sampler(evaluation=evaluation, pool=not evaluation),
            step=EVALUATION_STEP if evaluation else CACHE_STEP,
            dtype=self._activation_dtype(),
            folder=folder,
            part=(args.process_index, args.world_size),
        )
        self.accelerator.wait_for_everyone()
        self._caches.append((dataset, cache))
        return cache

    def get_train_dataloader(self):
        if self._use_cache():
            self.train_dataset = self._cached(self.train_dataset, evaluation=False)
        if not self.args.shard_rows:
            return super().get_train_dataloader()
        # every process sees every document, in the order of a run with one process
        accelerator = self.accelerator
        with _unprepared(accelerator):
            loader = super().get_train_dataloader()
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            use_seedable_sampler=True, data_seed=self.args.data_seed,
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset=None):
        if self._use_cache():
            if isinstance(eval_dataset, str):
                eval_dataset = self.eval_dataset[eval_dataset]
            chosen = self.eval_dataset if eval_dataset is None else eval_dataset
            eval_dataset = self._cached(chosen, evaluation=True)
        return super().get_eval_dataloader(eval_dataset)

    # evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """`STATISTICS` of the index on random rows (`eval_kl`, ...) and on needle rows (`eval_needle_kl`, ...): means
        over heads and rows. The same by head goes to `<prefix>_heads.json` in the output folder."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        collected = []
        for inputs in dataloader:
            collected.append(self.accelerator.gather_for_metrics(self._evaluate_batch(self._prepare_inputs(inputs))))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        # [documents, heads, kinds, statistics + 1], the last one a count of rows
        sums = torch.cat(collected).double().cpu()
        metrics: dict[str, float] = {}
        table: list[dict[str, Any]] = [{"layer": layer, "head": head} for layer, head in self._heads]
        total = sums.sum(0)
        for kind, name in enumerate(_KINDS):
            rows = float(total[0, kind, -1])
            if rows == 0:
                continue
            by_head = total[:, kind, :-1] / rows
            for i, statistic in enumerate(STATISTICS):
                metrics[f"{metric_key_prefix}_{name}{statistic}"] = float(by_head[:, i].mean())
                for line, value in zip(table, by_head[:, i].tolist(), strict=True):
                    line[name + statistic] = value
        # as the training loss: the mean over a document's rows of both kinds, then over documents
        kl, rows_of = sums[..., 0].sum(2), sums[..., -1].sum(2).clamp_min(1)
        metrics[f"{metric_key_prefix}_loss"] = float((kl / rows_of).mean())
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, "metrics": metrics, "heads": table}
            path = self._output / f"{metric_key_prefix}_heads.json"
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        nothing = numpy.empty(0)
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=sums.shape[0])

    @torch.no_grad()
    def _evaluate_batch(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums over rows: fp32 `[B, heads, 2, statistics + 1]`."""
        if "cache_index" in inputs:
            cache = self.callback_handler.eval_dataloader.dataset
            documents = []
            for index in inputs["cache_index"].tolist():
                document = cache.document(index)
                pool = torch.arange(document.text.numel() + document.needle.numel())
                layers = document.rows(pool, self.args.device)
                is_needle = (pool >= document.text.numel())[None].to(self.args.device)
                by_layer = {layer: self._layer_sums(layer, data, is_needle) for layer, data in layers.items()}
                documents.append(torch.cat([by_layer[layer] for layer in sorted(by_layer)], 1))
            return torch.cat(documents)
        rows = self._draw(inputs, evaluation=True)
        found: dict[int, torch.Tensor] = {}

        def observe(seen: AttentionInputs) -> None:
            if seen.plan.retrieval:
                data = LayerRows.take(seen, rows.slots)
                found[seen.layer_idx] = self._layer_sums(seen.layer_idx, data, rows.is_needle)

        with self.model.attention_mode("dense"):
            self.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                observer=observe,
                use_cache=False,
                logits_to_keep=1,
            )
        return torch.cat([found[layer] for layer in sorted(found)], 1)

    def _layer_sums(self, layer: int, data: LayerRows, is_needle: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        values = layer_statistics(
            self.model.indexers()[layer],
            data,
            top_p=config.index_top_p,
            min_tokens=config.index_min_tokens,
            block_size=config.index_block_size,
        )
        real = data.slots >= 0
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        kinds = [(real & ~is_needle), (real & is_needle)]
        return torch.stack([(values * kind[:, None, :, None]).sum(2) for kind in kinds], 2)

    # logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._seen:
            mean = torch.stack(self._seen).mean(0)
            if self.args.world_size > 1:
                mean = cast(torch.Tensor, self.accelerator.reduce(mean, "mean"))
            logs["kl_median"], logs["kl_max"] = float(mean.median()), float(mean.max())
            logs[HEAD_LOSS] = float(mean.clamp_min(1e-12).log().mean())
            self._seen.clear()
            self._log_heads(mean)
        super().log(logs, start_time)

    def _log_heads(self, mean: torch.Tensor) -> None:
        """A line for each log in `train_heads.jsonl`: the loss of each head, in the order of `eval_heads.json`."""
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, "kl": [round(value, 6) for value in mean.tolist()]}
            self._output.mkdir(parents=True, exist_ok=True)
            with (self._output / "train_heads.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As `StageTrainer.train`; writes the indexers to the output folder at the end."""
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.save_model()
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; next to a sharded backbone the whole indexers average their own gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the indexers; a sharded backbone is not gathered for it."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Indexer weights and the arguments as JSON: nothing that needs unpickling."""
        if not self.args.should_save:
            return
        folder = self._output if output_dir is None else Path(output_dir)
        save_indexers(self.model, folder, step=self.state.global_step)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_indexers(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_indexers(self.model, self.state.best_model_checkpoint)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The forward of the backbone alone: nothing flows back through it."""
        return super().floating_point_ops(inputs) // 3


def train_indexer(
    model: RTPurboForCausalLM,
    train_dataset: Any,
    eval_dataset: Any,
    args: IndexerTrainingArguments,
    *,
    resume_from_checkpoint: str | bool | None = None,
) -> dict[str, float]:
    """Train the indexers of `model` in place; training metrics, and those of a final evaluation if there is data."""
    trainer = IndexerTrainer(model, args, train_dataset, eval_dataset)
    metrics = dict(trainer.train(resume_from_checkpoint=resume_from_checkpoint).metrics)
    if eval_dataset is not None:
        metrics.update(trainer.evaluate())
    return metrics
