"""Variants of one checkpoint as text: attention modes, overrides of the config, and other selectors.

    dense | streaming | headwise | sparse          attention modes
    sparse_prefill                                 sparse, its prompt prefilled with one block list for each tile
    sparse:p=0.95+floor=128, headwise:window=2048  the same with other settings
    sparse:kv=int8                                 decode steps read K/V that retrieval heads share in 8 bits
    topk:256, topk:equal                           fixed top-k of the index scores
    oracle, oracle:0.95                            top-p of the true scores
    quest:0.9, quest:256, quest:equal              bounds on pages of 16 keys: by mass, or by tokens
    int8                                           as sparse, with index keys rounded to 8 bits

`equal` is the mean number of tokens that `sparse` selects on the same sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..kernels.indexed import Selector
from ..modeling.configuration_rtpurbo import KV_CACHE_DTYPES, RETRIEVAL_PREFILL
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from . import selectors

EQUAL = "equal"
MODES = ("dense", "streaming", "headwise", "sparse")
SPARSE_PREFILL = "sparse_prefill"
SELECTORS = ("topk", "oracle", "quest", "int8")
SETTINGS: dict[str, tuple[str, type]] = {
    "p": ("index_top_p", float),
    "floor": ("index_min_tokens", int),
    "block": ("index_block_size", int),
    "window": ("sliding_window", int),
    "sinks": ("num_sink_tokens", int),
    "prefill": ("retrieval_prefill", str),
    "kv": ("kv_cache_dtype", str),
}
_CHOICES = {"prefill": RETRIEVAL_PREFILL, "kv": KV_CACHE_DTYPES}
_OF_MODE = {"dense": (), "streaming": ("window", "sinks"), "headwise": ("window", "sinks"), "sparse": tuple(SETTINGS)}


@dataclass(frozen=True)
class Variant:
    """A way to attend.

    Attributes:
        name: as written by the user.
        mode: attention mode of the model.
        overrides: fields of the config, and the values they take meanwhile.
        selector: `"topk"`, `"oracle"`, `"quest"`, `"int8"`, or None for the index.
        budget: the selector's tokens (int), mass (float), `"equal"`, or None for the config's own p.
    """

    name: str
    mode: str
    overrides: tuple[tuple[str, int | float | str], ...] = ()
    selector: str | None = None
    budget: int | float | str | None = None

    @property
    def generates(self) -> bool:
        """Whether it runs in `model.generate`: other selectors exist in decode emulation only."""
        return self.selector is None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the checkpoint selects as it is."""
        return self.mode == "sparse" and self.selector is None and not self.overrides

    @property
    def needs_equal(self) -> bool:
        return self.budget == EQUAL

    def build_selector(self, model: RTPurboForCausalLM, equal: float | None = None) -> Selector | None:
        """The selector for `model.forward`; `equal` is the number that the budget `"equal"` stands for."""
        budget = self.budget
        if self.needs_equal:
            if equal is None:
                raise ValueError(f"{self.name} needs the tokens that 'sparse' selects, and nothing was selected")
            budget = max(round(equal), 1)
        if self.selector == "topk":
            return selectors.top_k(int(budget or 1), block_size=model.config.index_block_size)
        if self.selector == "oracle":
            return selectors.oracle(float(model.config.index_top_p if budget is None else budget))
        if self.selector == "int8":
            config = model.config
            return selectors.rounded_index(
                top_p=config.index_top_p, min_tokens=config.index_min_tokens, block_size=config.index_block_size
            )
        if self.selector == "quest":
            if isinstance(budget, float):
                return selectors.quest(top_p=budget)
            return selectors.quest(tokens=int(budget or 1))
        return None

    @contextmanager
    def applied(self, model: RTPurboForCausalLM) -> Iterator[None]:
        """Attend this way for a while.

        Raises:
            ValueError: an override is out of the config's range.
        """
        config = model.config
        before = {field: getattr(config, field) for field, _ in self.overrides}
        try:
            for field, value in self.overrides:
                setattr(config, field, value)
            config.check()
            with model.attention_mode(self.mode):
                yield
        finally:
            for field, value in before.items():
                setattr(config, field, value)


def _value(text: str, kind: type, what: str) -> int | float | str:
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what}: expected {'a number' if kind is float else 'an integer'}, got {text!r}") from None


def _overrides(name: str, mode: str, text: str) -> tuple[tuple[str, int | float | str], ...]:
    found: dict[str, int | float | str] = {}
    for part in text.split("+"):
        key, _, value = part.partition("=")
        if key not in _OF_MODE[mode]:
            raise ValueError(f"variant {name!r}: {mode} has no setting {key!r}; it has {_OF_MODE[mode] or 'none'}")
        field, kind = SETTINGS[key]
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"variant {name!r}, {key}: expected one of {', '.join(_CHOICES[key])}, got {value!r}")
        found[field] = _value(value, kind, f"variant {name!r}, {key}")
    return tuple(found.items())


def _budget(name: str, kind: str, text: str) -> int | float | str | None:
    if not text and kind in ("oracle", "int8"):
        return None
    if kind == "int8":
        raise ValueError(f"variant {name!r}: int8 takes no budget, it has the checkpoint's own")
    if text == EQUAL and kind != "oracle":
        return EQUAL
    number = float(_value(text, float, f"variant {name!r}"))
    is_mass = 0 < number < 1 and kind != "topk"
    if not is_mass and not (kind != "oracle" and number >= 1 and number == int(number)):
        expected = {"topk": "tokens or 'equal'", "oracle": "a p below 1", "quest": "tokens, a p below 1, or 'equal'"}
        raise ValueError(f"variant {name!r}: expected {kind}:{expected[kind]}")
    return number if is_mass else int(number)


def parse_variant(text: str) -> Variant:
    """A variant from its name.

    Raises:
        ValueError: no such mode, selector or setting.
    """
    name = text.strip()
    kind, colon, rest = name.partition(":")
    if kind in SELECTORS:
        return Variant(name, "sparse", selector=kind, budget=_budget(name, kind, rest))
    if kind == SPARSE_PREFILL:
        given = _overrides(name, "sparse", rest) if colon else ()
        return Variant(name, "sparse", tuple({"retrieval_prefill": "sparse_tiled", **dict(given)}.items()))
    if kind not in MODES:
        raise ValueError(f"no variant {name!r}; there are {', '.join((*MODES, SPARSE_PREFILL, *SELECTORS))}")
    return Variant(name, kind, _overrides(name, kind, rest) if colon else ())


def parse_variants(text: str) -> list[Variant]:
    """Variants from a comma-separated list, each once.

    Raises:
        ValueError: the list is empty, or names what does not exist.
    """
    names = [part for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError("no variant was given; e.g. dense,streaming,headwise,sparse")
    return list({variant.name: variant for variant in map(parse_variant, names)}.values())
