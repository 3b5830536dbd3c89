"""`rtpurbo eval`: load what is compared, score it, write the files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from ..auto import RTPurboForCausalLM
from ..benchmarks.harness import environment
from ..modeling.checkpoint_rtpurbo import INDEXER_FILE
from ..modeling.configuration_rtpurbo import RTPurboConfig
from ..sources import base_path, load_base
from ..training.data import Document, documents_hash, load_texts, split_documents
from .harness_tasks import HarnessPlan, HarnessTasks
from .questions import QARecord, load_qa
from .results import PARTIAL_FILE, RecordStore, ResultRow, write_results
from .scoring import Arm
from .suites import HARNESS, Evaluation, Plan
from .variants import Variant, parse_variant

logger = logging.getLogger(__name__)

BASE = "base"
STEM = "fidelity"
DESCRIBED = (
    "sliding_window",
    "num_sink_tokens",
    "index_dim",
    "index_rotary_dim",
    "index_top_p",
    "index_min_tokens",
    "index_block_size",
    "index_key_sharing",
)
_HAYSTACK = 64


@dataclass(frozen=True)
class Outcome:
    """Result rows, what was measured with, and the files written."""

    rows: list[ResultRow]
    meta: dict[str, Any]
    files: list[Path]


def held_out_documents(
    data: Any, length: int, *, split_seed: int = 0, limit: int = _HAYSTACK, unseen: bool = False
) -> list[Document]:
    """Documents that an adaptation with seed `split_seed` on the same data neither trained nor calibrated on.

    Args:
        data: see `load_texts`. length: tokens that a document should fill.
        split_seed: seed of the adaptation. limit: at most so many documents.
        unseen: no adaptation saw any of `data`: nothing needs to be held out.

    Raises:
        ValueError: no document is long enough, or none is held out.
    """
    documents = load_texts(data, min_chars=2 * length, seed=split_seed, limit=4000)
    if unseen:
        return documents[:limit]
    _, held_out = split_documents(documents, held_out=0.1, seed=split_seed)
    return held_out[:limit]


def fingerprint(checkpoint: str, config: PreTrainedConfig) -> str:
    """A hash of a checkpoint's files, or of a Hub checkpoint's name, commit and config."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    folder = Path(checkpoint)
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    else:
        digest.update(f"{checkpoint}@{getattr(config, '_commit_hash', None)}".encode())
    return digest.hexdigest()[:16]


def _load(checkpoint: str, base: str | None, device: str, dtype: torch.dtype) -> RTPurboForCausalLM:
    config = RTPurboConfig.from_pretrained(checkpoint)
    if base is not None and (Path(checkpoint) / INDEXER_FILE).is_file():
        config.base_model_name_or_path, config.base_model_revision = base, None
    return RTPurboForCausalLM.from_pretrained(checkpoint, config=config, dtype=dtype).to(device).eval()


def _base_arm(model: RTPurboForCausalLM, base: str | None, device: str, dtype: torch.dtype) -> Arm:
    """The dense base model that a checkpoint, or the caller, names."""
    name, revision = model.config.base_model_name_or_path, model.config.base_model_revision
    if base is not None:
        name, revision = base, None
    if not name:
        raise ValueError("--compare base: the checkpoint does not name its base model; give --base")
    source = load_base(name, dtype=dtype, device=device, revision=revision)
    return Arm(BASE, RTPurboForCausalLM.from_base(source.model), Variant(BASE, "dense"))


def evaluate(
    checkpoint: str,
    output: str | Path,
    plan: Plan,
    *,
    variants: Sequence[Variant],
    emulated: Sequence[Variant] = (),
    compare: str | None = None,
    data: Any = "system",
    base: str | None = None,
    qa_data: str | Path | None = None,
    harness: HarnessPlan | None = None,
    split_seed: int = 0,
    unseen: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Outcome:
    """Score variants of a checkpoint and write `fidelity.json`, `.md` and `.png` into `output`.

    Args:
        checkpoint: folder or Hub id of an RTPurbo checkpoint.
        output: folder; an interrupted run with the same settings goes on.
        plan: what is scored; its `gap` is set to the checkpoint's window.
        variants: in all suites. emulated: further ones, in all suites but `ruler`.
        compare: `"base"` adds the dense base model, and measures against it; another checkpoint adds its variants,
            `NAME@OTHER`. None measures against the checkpoint's own dense mode.
        data, split_seed, unseen: where the text comes from, see `held_out_documents`.
        base: the base model of adapters, in place of the one that they name, and its tokenizer; see
            `load_base`.
        qa_data: file for task `qa`. harness: tasks of suite `lm-eval`.
        device, dtype: of the models.

    Raises:
        ValueError: settings that do not fit together, too little text, or `output` holds results of other settings.
    """
    output = Path(output)
    if (harness is not None) != (HARNESS in plan.suites):
        raise ValueError("suite lm-eval and its tasks go together: name the tasks with --lm-eval")
    base = None if base is None else base_path(base)
    tokenizer = AutoTokenizer.from_pretrained(base or checkpoint)
    model = _load(checkpoint, base, device, dtype)
    plan = dataclasses.replace(plan, gap=model.config.sliding_window)
    documents = held_out_documents(data, max(plan.lengths), split_seed=split_seed, unseen=unseen)
    questions: list[QARecord] | None = None if qa_data is None else load_qa(qa_data)
    arms = [Arm(variant.name, model, variant) for variant in (*variants, *emulated)]
    reference = next((arm for arm in arms if arm.name == "dense"), Arm("dense", model, parse_variant("dense")))
    prints = [fingerprint(checkpoint, model.config)]
    without_ruler = [variant.name for variant in emulated]
    if compare == BASE:
        reference = _base_arm(model, base, device, dtype)
        arms.insert(0, reference)
    elif compare is not None:
        other = _load(compare, base, device, dtype)
        if other.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            raise ValueError(f"--compare {compare}: another vocabulary, tokens cannot be compared")
        name = Path(compare).name
        prints.append(fingerprint(compare, other.config))
        arms += [Arm(f"{v.name}@{name}", other, v) for v in (*variants, *emulated)]
        without_ruler += [f"{variant.name}@{name}" for variant in emulated]
    settings: dict[str, Any] = {
        "checkpoint": Path(checkpoint).name if Path(checkpoint).is_dir() else checkpoint,
        "fingerprints": prints,
        "compare": compare if compare in (None, BASE) else Path(str(compare)).name,
        "documents": documents_hash(documents),
        "qa_data": None if questions is None else len(questions),
        "blocks": plan.blocks,
        "rows": plan.rows,
        "seed": plan.seed,
        "gap": plan.gap,
        "dtype": str(dtype).removeprefix("torch."),
    }
    store = RecordStore(output / PARTIAL_FILE, settings)
    evaluation = Evaluation(
        arms,
        reference,
        plan,
        tokenizer=tokenizer,
        documents=documents,
        store=store,
        emulated=without_ruler,
        qa_data=questions,
        progress=progress,
    )
    tasks = None
    if harness is not None:
        tasks = HarnessTasks(
            [arm for arm in arms if arm.name not in without_ruler],
            reference,
            harness,
            tokenizer=tokenizer,
            store=store,
            length=max(plan.lengths),
            batch_tokens=plan.batch_tokens,
            seed=plan.seed,
        )
    evaluation.run()
    rows = evaluation.rows()
    if tasks is not None:
        tasks.run()
        rows += tasks.rows()
    meta = {
        **environment(),
        **settings,
        "reference": reference.name,
        "data": data if isinstance(data, str) else [Path(str(name)).name for name in data],
        "split_seed": split_seed,
        "unseen": unseen,
        "plan": dataclasses.asdict(plan),
        "lm_eval": None if harness is None else harness.described(),
        "variants": [arm.name for arm in arms],
        "model": {field: getattr(model.config, field) for field in DESCRIBED},
    }
    return Outcome(rows, meta, write_results(rows, output, STEM, meta=meta, heads=evaluation.heads()))
