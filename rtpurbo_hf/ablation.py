"""`rtpurbo eval --ablate`: one setting at a time, from one calibration and one set of stored activations.

Settings of the selection (p, floor, block, window) are changed on the default model; those of heads and index (heads,
ratio, index_dim, rotary, sharing, init) get indexers of their own, trained on the same data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .adaptation import CALIBRATION_FILE, wrap
from .auto import RTPurboForCausalLM
from .benchmarks.harness import environment
from .evaluation.results import PARTIAL_FILE, RecordStore, ResultRow, write_results
from .evaluation.run import DESCRIBED, Outcome, held_out_documents
from .evaluation.scoring import Arm
from .evaluation.suites import Evaluation, Plan
from .evaluation.variants import Variant, parse_variant
from .indexing import train_indexers
from .presets import Preset
from .recipe_data import AdaptationData, adaptation_data
from .sources import BaseModel, load_base
from .training.activation_cache import ActivationCache
from .training.calibration import Calibration, calibrate
from .training.data import documents_hash
from .training.head_ranking import RULES
from .training.indexer_init import initialise_indexers

logger = logging.getLogger(__name__)

STEM = "ablation"
DEFAULT = "default"
OVERRIDDEN: dict[str, tuple[float, ...]] = {
    "p": (0.8, 0.85, 0.9, 0.95, 0.99),
    "floor": (0, 64, 128, 256),
    "block": (1, 16, 32, 64),
    # parts of the length
    "window": (1 / 8, 1 / 4, 1 / 2),
}
SELECTED: dict[str, tuple[str, ...]] = {"selector": ("topk:equal", "quest:equal", "oracle", "int8")}
RETRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "heads": {rule: {"head_rule": rule} for rule in RULES},
    "ratio": {f"{ratio}": {"ratio": ratio} for ratio in (0.1, 0.15, 0.3)},
    # as many rotated dimensions as the default has, in proportion
    "index_dim": {f"{dim}": {"index_dim": dim} for dim in (4, 16, 32)},
    "rotary": {f"{dim}": {"index_rotary_dim": dim} for dim in (0, 4, 8, 16)},
    # plain and rotated dimensions
    "split": {
        f"{plain}+{rotated}": {"index_dim": plain + rotated, "index_rotary_dim": rotated}
        for plain, rotated in ((16, 0), (12, 4), (8, 8), (24, 8), (16, 16))
    },
    "sharing": {sharing: {"index_key_sharing": sharing} for sharing in ("head", "kv_head")},
    "init": {method: {"initialisation": method} for method in ("svd", "random")},
    "learning_rate": {f"{rate:g}": {"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)},
    "steps": {f"{steps}": {"steps": steps} for steps in (100, 300, 600)},
}
ABLATIONS = (*RETRAINED, *OVERRIDDEN, *SELECTED)


@dataclass(frozen=True)
class Setup:
    """One set of trained indexers, and the variants that are scored with them."""

    settings: Preset
    variants: tuple[Variant, ...]


def setups(names: Sequence[str], settings: Preset) -> list[Setup]:
    """What to train and score, the default first.

    Raises:
        ValueError: no such ablation.
    """
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown or not names:
        raise ValueError(f"no ablation {', '.join(unknown) or 'was given'}; there are {', '.join(ABLATIONS)}")
    sparse = parse_variant("sparse")
    default = [parse_variant("dense"), parse_variant("headwise"), replace(sparse, name=DEFAULT)]
    further = []
    for name in names:
        for value in OVERRIDDEN.get(name, ()):
            number = int(value * settings.context) if name == "window" else value
            default.append(replace(parse_variant(f"sparse:{name}={number}"), name=f"{name}={number}"))
        default += [parse_variant(selector) for selector in SELECTED.get(name, ())]
        for label, fields in RETRAINED.get(name, {}).items():
            changed = _changed(settings, fields)
            variants = [replace(sparse, name=f"{name}={label}")]
            if name == "heads":
                # what the choice costs without any index
                variants.insert(0, replace(parse_variant("headwise"), name=f"headwise,{name}={label}"))
            if changed == settings:
                default += variants
            else:
                further.append(Setup(changed, tuple(variants)))
    return [Setup(settings, tuple(default)), *further]


def _changed(settings: Preset, fields: dict[str, Any]) -> Preset:
    """The settings with other fields; a new number of dimensions keeps the rotated part of them."""
    if fields.keys() == {"index_dim"}:
        rotated = fields["index_dim"] * settings.index_rotary_dim / settings.index_dim
        least = min(settings.index_rotary_dim, 2)
        fields = {**fields, "index_rotary_dim": max(2 * round(rotated / 2), least)}
    return replace(settings, **fields)


class _Trainer:
    """Indexers for one setup after another on one base model, whose attention the last one owns."""

    def __init__(self, source: BaseModel, calibration: Calibration, blocks: AdaptationData, output: Path, seed: int):
        self._source, self._calibration, self._blocks = source, calibration, blocks
        self._output, self._seed = output, seed
        self._caches: dict[str, ActivationCache] = {}

    def untrained(self, settings: Preset) -> RTPurboForCausalLM:
        """The base with the settings' heads, and indexers that know nothing yet."""
        calibration = self._calibration
        calibration = calibration.select(settings.ratio, rule=settings.head_rule)
        model = wrap(self._source, settings)
        model.set_retrieval_heads([list(heads) for heads in calibration.retrieval_heads])
        return model

    def train(self, model: RTPurboForCausalLM, settings: Preset) -> None:
        """Stage 1, on activations that earlier setups with the same heads have stored."""
        documents = list(self._blocks.calibration.input_ids[:1])
        initialise_indexers(model, documents, method=settings.initialisation, seed=self._seed)
        # stored rows belong to heads, and say which index key serves which
        heads = f"{model.config.retrieval_heads}:{settings.index_key_sharing}"
        trainer = train_indexers(
            model,
            self._caches.get(heads, self._blocks.train),
            self._output / "trainer",
            steps=settings.steps,
            seed=self._seed,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            rows_per_document=settings.rows_per_document,
            cache_activations=True,
            save_strategy="no",
            logging_steps=max(settings.steps, 1),
        )
        if isinstance(trainer.train_dataset, ActivationCache):
            # one set of activations in memory at a time
            self._caches = {heads: trainer.train_dataset}
        model.eval()


def ablate(
    base: str,
    output: str | Path,
    plan: Plan,
    *,
    names: Sequence[str],
    settings: Preset,
    data: Any = "system",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Outcome:
    """Adapt a base model with one setting changed at a time, and write `ablation.json`, `.md` and `.png`.

    Args:
        base: see `load_base`. output: folder; an interrupted run with the same settings goes on.
        plan: what is scored; its `seed` is that of the adaptation too, and its `gap` is set to the window.
        names: of `ABLATIONS`. settings: the default; `settings.context` is the length of training.
        data: text, see `load_texts`. device, dtype: of the model.

    Raises:
        ValueError: unknown ablations, settings out of range, too little text, or `output` holds other results.
    """
    output = Path(output)
    todo = setups(names, settings)
    source = load_base(base, dtype=dtype, device=device)
    blocks = adaptation_data(data, source.tokenizer, settings, plan.seed)
    documents = held_out_documents(data, settings.context, split_seed=plan.seed)
    plan = replace(plan, gap=settings.sliding_window)
    record = {
        "checkpoint": source.name,
        "base": Path(source.path).name,
        "settings": dataclasses.asdict(settings),
        "documents": documents_hash(documents),
        "blocks": plan.blocks,
        "rows": plan.rows,
        "seed": plan.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    store = RecordStore(output / PARTIAL_FILE, record)
    calibration = _calibrated(output / CALIBRATION_FILE, source, blocks, settings, plan.seed)
    trainer = _Trainer(source, calibration, blocks, output, plan.seed)
    rows: list[ResultRow] = []
    heads: dict[str, Any] = {}
    for number, setup in enumerate(todo, 1):
        logger.info("%d of %d: %s", number, len(todo), ", ".join(variant.name for variant in setup.variants))
        model = trainer.untrained(setup.settings)
        arms = [Arm(variant.name, model, variant) for variant in setup.variants]
        # every setup has the same dense base: it is scored once, and read from the store after that
        dense = next((arm for arm in arms if arm.name == "dense"), None)
        reference = dense or Arm("dense", model, parse_variant("dense"))
        evaluation = Evaluation(
            arms,
            reference,
            plan,
            tokenizer=source.tokenizer,
            documents=documents,
            store=store,
            progress=progress,
        )
        if not evaluation.is_complete():
            trainer.train(model, setup.settings)
            evaluation.run()
        rows += evaluation.rows()
        heads |= evaluation.heads()
    meta = {
        **environment(),
        **record,
        "reference": "dense",
        "data": data if isinstance(data, str) else [Path(str(name)).name for name in data],
        "plan": dataclasses.asdict(plan),
        "ablations": list(names),
        "model": {field: getattr(settings, field) for field in DESCRIBED},
    }
    order = list(dict.fromkeys(row.suite for row in rows))
    rows.sort(key=lambda row: (order.index(row.suite), row.length))
    return Outcome(rows, meta, write_results(rows, output, STEM, meta=meta, heads=heads))


def _calibrated(path: Path, source: BaseModel, blocks: AdaptationData, settings: Preset, seed: int) -> Calibration:
    if path.exists():
        return Calibration.load(path)
    documents = list(blocks.calibration.input_ids)
    calibration = calibrate(wrap(source, settings), documents, ratio=settings.ratio, seed=seed)
    calibration.save(path)
    return calibration
