"""How close a sparse model stays to its dense self: perplexity, agreement and retrieval in decode emulation.

*Decode emulation*: the scored rows of a block attend as decode steps would, after a prefill of what stands before
them, all in one forward. The dense model on the same weights is the measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm

from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from ..training.needles import NeedleBlock


@dataclass
class SelectionStats:
    """What retrieval heads selected, summed over rows; pass `observe` as `on_selection`."""

    rows: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    fraction: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def observe(self, layer: int, rows: slice, chosen, valid, weights) -> None:
        selected = chosen.sum(-1)
        self._add(self.tokens, layer, selected.float().sum((0, 2)))
        self._add(self.fraction, layer, (selected / valid.sum(-1)).sum((0, 2)))
        self._add(self.kept, layer, (weights * chosen).sum((0, 2, 3)))
        self.rows[layer] = self.rows.get(layer, 0) + selected.shape[0] * selected.shape[2]

    @staticmethod
    def _add(store: dict[int, torch.Tensor], layer: int, value: torch.Tensor) -> None:
        value = value.double().cpu()
        store[layer] = store[layer] + value if layer in store else value

    def _mean(self, store: dict[int, torch.Tensor]) -> float | None:
        if not store:
            return None
        return torch.cat([value / self.rows[layer] for layer, value in store.items()]).mean().item()

    @property
    def selected_fraction(self) -> float | None:
        """Mean over heads and rows of selected / visible tokens."""
        return self._mean(self.fraction)

    @property
    def selected_tokens(self) -> float | None:
        """Mean number of selected tokens."""
        return self._mean(self.tokens)

    @property
    def kept_mass(self) -> float | None:
        """Mean true attention mass of the selected tokens."""
        return self._mean(self.kept)

    def tokens_per_head(self) -> dict[int, list[float]]:
        """Mean selected tokens of each retrieval head, by layer."""
        return {layer: (value / self.rows[layer]).tolist() for layer, value in self.tokens.items()}


@dataclass(frozen=True)
class Fidelity:
    """One variant's figures.

    Attributes:
        perplexity: of held-out text, over the scored rows.
        kl: mean KL(dense || variant) of next-token distributions, in nats.
        top1_agreement: part of rows whose most likely token is the dense model's.
        retrieval_accuracy: part of key-value questions answered exactly (greedy, all digits).
        selected_fraction, selected_tokens, kept_mass: of retrieval heads; None where nothing is selected.
        rows, questions: what the means run over.
    """

    perplexity: float
    kl: float
    top1_agreement: float
    retrieval_accuracy: float
    selected_fraction: float | None
    selected_tokens: float | None
    kept_mass: float | None
    rows: int
    questions: int

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class _Sums:
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    rows: int = 0
    right: int = 0
    questions: int = 0
    stats: SelectionStats = field(default_factory=SelectionStats)

    def result(self) -> Fidelity:
        rows = max(self.rows, 1)
        return Fidelity(
            perplexity=math.exp(self.nll / rows) if self.rows else float("nan"),
            kl=self.kl / rows,
            top1_agreement=self.agree / rows,
            retrieval_accuracy=self.right / self.questions if self.questions else float("nan"),
            selected_fraction=self.stats.selected_fraction,
            selected_tokens=self.stats.selected_tokens,
            kept_mass=self.stats.kept_mass,
            rows=self.rows,
            questions=self.questions,
        )


@dataclass(frozen=True)
class Scored:
    """What is scored: a model in an attention mode, and `indexers` (`indexer_state_dict`) to put in meanwhile."""

    model: RTPurboForCausalLM
    mode: str
    indexers: Mapping[str, torch.Tensor] | None = None

    @contextmanager
    def prepared(self) -> Iterator[RTPurboForCausalLM]:
        """The model in its mode, with these indexers."""
        own = self.model.indexer_state_dict() if self.indexers is not None else {}
        kept = {key: value.clone() for key, value in own.items()}
        try:
            with torch.no_grad():
                for key, value in (self.indexers or {}).items():
                    own[key].copy_(value)
            with self.model.attention_mode(self.mode):
                yield self.model
        finally:
            with torch.no_grad():
                for key, value in kept.items():
                    own[key].copy_(value)


def _logits(variant: Scored, ids: torch.Tensor, rows: int, stats: SelectionStats) -> torch.Tensor:
    """fp32 logits `[rows, vocabulary]` of the last rows, attending as decode steps where the mode selects."""
    options: dict = {}
    if variant.mode == "sparse":
        options = {"decode_rows": rows, "on_selection": stats.observe}
    with variant.prepared() as model, torch.inference_mode():
        return model(ids, use_cache=False, logits_to_keep=rows, **options).logits[0].float()


def compare_modes(
    model: RTPurboForCausalLM,
    text_blocks: Sequence[torch.Tensor],
    needle_blocks: Iterable[NeedleBlock],
    *,
    modes: Sequence[str] = ("dense", "streaming", "sparse"),
    rows: int = 256,
    progress: bool = True,
    reference: RTPurboForCausalLM | None = None,
) -> dict[str, Fidelity]:
    """Score attention modes of one model side by side on the same rows.

    Args:
        model: the adapted model.
        text_blocks, needle_blocks, rows, progress: see `compare_variants`.
        modes: attention modes; `"dense"` is always run, as the measure of the others.
        reference: the model whose dense mode is the measure, where `model` has other weights (stage 2); None: `model`.

    Returns:
        `{mode: Fidelity}` in the order of `modes`.
    """
    variants = {"dense": Scored(model if reference is None else reference, "dense")}
    variants |= {mode: Scored(model, mode) for mode in modes if mode != "dense"}
    found = compare_variants(variants, text_blocks, needle_blocks, rows=rows, progress=progress)
    return {mode: found[mode] for mode in modes}


def compare_variants(
    variants: Mapping[str, Scored],
    text_blocks: Sequence[torch.Tensor],
    needle_blocks: Iterable[NeedleBlock],
    *,
    rows: int = 256,
    progress: bool = True,
) -> dict[str, Fidelity]:
    """Score models and attention modes side by side on the same rows.

    Args:
        variants: by name; the first one is the measure of the others.
        text_blocks: int64 `[length]` each; the last `rows` positions are scored.
        needle_blocks: key-value prompts; all answer tokens of a question must be the most likely ones, given the
            right ones before them, which is what greedy decoding would produce.
        rows: scored rows of a text block.
        progress: show a bar.

    Returns:
        The variants' figures by name.
    """
    sums = {name: _Sums() for name in variants}
    device = next(iter(variants.values())).model.device
    needles = list(needle_blocks)
    bar = tqdm(total=(len(text_blocks) + len(needles)) * len(variants), desc="evaluate", disable=not progress)
    for block in text_blocks:
        ids = block.to(device).long()[None]
        scored = min(rows, ids.shape[1] - 1)
        targets = ids[0, -scored + 1 :] if scored > 1 else ids[0, :0]
        measure: torch.Tensor | None = None
        for name, variant in variants.items():
            total = sums[name]
            logits = _logits(variant, ids, scored, total.stats)[:-1].log_softmax(-1)
            measure = logits if measure is None else measure
            total.nll -= logits.gather(1, targets[:, None]).sum().item()
            total.kl += (measure.exp() * (measure - logits)).sum().item()
            total.agree += int((logits.argmax(1) == measure.argmax(1)).sum())
            total.rows += len(targets)
            bar.update()
    for needle in needles:
        ids = torch.tensor(needle.input_ids, device=device)[None]
        first = min(start for start, _ in needle.answer_spans) - 1
        for name, variant in variants.items():
            best = _logits(variant, ids, ids.shape[1] - first, sums[name].stats).argmax(1)
            for start, stop in needle.answer_spans:
                answer = best[start - 1 - first : stop - 1 - first]
                sums[name].right += bool(torch.equal(answer, ids[0, start:stop]))
                sums[name].questions += 1
            bar.update()
    bar.close()
    return {name: total.result() for name, total in sums.items()}
