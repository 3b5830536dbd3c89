"""Which base models can be wrapped, and the little that differs between them.

A family is on this list when its attention forward (a) takes `position_embeddings = (cos, sin)`, (b) applies RoPE as
its last change to q and k, and (c) calls the attention interface with its keyword arguments. A test for each family
compares the wrapped model with the untouched base, with randomised norm weights.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.rotate import rotate_reference

# what code of a base raises that is tried on less than it looks for
UNFIT = (AttributeError, RuntimeError, TypeError, ValueError)
# what transformers calls the cache, in arguments and in outputs
CACHE_ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _always(attention: nn.Module) -> bool:
    return True


def _use_rope_attribute(attention: nn.Module) -> bool:
    return bool(attention.use_rope)


def _rope_on_sliding_layers(attention: nn.Module) -> bool:
    return attention.sliding_window is not None


def _rope_on_sliding_or_uniform(attention: nn.Module) -> bool:
    return attention.sliding_window is None or bool(attention.is_sliding)


@dataclass(frozen=True)
class Family:
    """What the wrapper must know of one `model_type`.

    Args:
        uses_rope: whether an attention layer rotates its q and k (NoPE layers do not).
        partial_rotary: the forward slices the rotated dimensions itself (attribute `rotary_ndims`).
        cache_argument: name under which the attention forward takes the cache.
        needs_padding_mask: it has layers of another kind that read the 2-D mask (linear attention, convolutions).
        forwards_kwargs: its decoder layers hand unknown keyword arguments on to their attention.
    """

    uses_rope: Callable[[nn.Module], bool] = _always
    partial_rotary: bool = False
    cache_argument: str = "past_key_values"
    needs_padding_mask: bool = False
    forwards_kwargs: bool = True


_PLAIN = Family()
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "arcee", "cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss",
            "granite", "llama", "minimax_m2", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe",
            "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "starcoder2",
        ),
        _PLAIN,
    ),
    "cohere2": Family(uses_rope=_rope_on_sliding_layers),
    "exaone4": Family(uses_rope=_rope_on_sliding_or_uniform),
    "gpt_neox": Family(cache_argument="layer_past"),
    "lfm2": Family(needs_padding_mask=True),
    "nemotron": Family(forwards_kwargs=False),
    "phi": Family(partial_rotary=True),
    "qwen3_5_text": Family(needs_padding_mask=True),
    "qwen3_next": Family(needs_padding_mask=True),
    "smollm3": Family(uses_rope=_use_rope_attribute),
    "stablelm": Family(partial_rotary=True, forwards_kwargs=False),
}  # fmt: skip


def family_of(config) -> Family:
    """The rules for a base config.

    Raises:
        ValueError: the family is not on the list.
    """
    model_type = config.get_text_config(decoder=True).model_type
    if config.model_type == "rtpurbo":
        raise ValueError(
            "this is an RTPurbo model already: train it further with `rtpurbo distill`, or start from its base, "
            f"{config.base_model_name_or_path or config.base_config.model_type}"
        )
    if config.model_type != model_type or model_type not in FAMILIES:
        raise ValueError(
            f"base models of the family {config.model_type!r} are not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every softmax-attention module of a base model, in layer order."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            parameters = inspect.signature(type(module).forward).parameters
            if "position_embeddings" in parameters:
                yield module


def full_attention_layers(config) -> list[int]:
    """Indices of the layers of a base config that see the whole context through softmax attention."""
    text = config.get_text_config(decoder=True)
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        return [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    return list(range(text.num_hidden_layers)) if getattr(text, "sliding_window", None) is None else []


def full_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that RTPurbo converts.

    Raises:
        ValueError: the base has no full-attention layer.
    """
    layers = set(full_attention_layers(model.config))
    found = [m for m in attention_modules(model) if m.layer_idx in layers]
    if not found:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ValueError(
            f"the base model ({kind}) has no full-attention layer: nothing to convert. "
            "Check its config's sliding_window and layer_types"
        )
    return found


def head_counts(config) -> tuple[int, int]:
    """Query heads and KV heads of a base model's layers."""
    text = config.get_text_config(decoder=True)
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def head_dim(attention: nn.Module) -> int:
    """Dimensions of one head."""
    name = "head_size" if hasattr(attention, "head_size") else "head_dim"
    return int(getattr(attention, name))


def rope_switches(config, cached: int, length: int) -> bool:
    """Whether a context that grows from `cached` to `length` tokens changes the rotation of all of them (Phi-3's)."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None)
    limit = getattr(text, "original_max_position_embeddings", None)
    if limit is None or not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
        return False
    return cached <= limit < length


def rotation(attention: nn.Module, family: Family) -> Callable | None:
    """The function `(q, k, cos, sin) -> (q, k)` that rotates this layer's q and k, or None for a NoPE layer."""
    if not family.uses_rope(attention):
        return None
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if not family.partial_rotary:
        return apply
    return partial(_rotate_first, apply, int(cast(Any, attention).rotary_ndims))


def _rotate_first(apply: Callable, size: int, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Rotate the first `size` dimensions of each head."""
    q_rot, k_rot = apply(q[..., :size], k[..., :size], cos, sin)
    return torch.cat([q_rot, q[..., size:]], -1), torch.cat([k_rot, k[..., size:]], -1)


@lru_cache(maxsize=64)
def swaps_halves(apply: Callable) -> bool:
    """Whether a rotation is `x * cos + [-x_2, x_1] * sin` over a whole head, as most families'; found by trying."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        query, key = (torch.randn(1, 1, 2, 8, generator=generator, device="cpu") for _ in range(2))
        cos, sin = (torch.randn(1, 2, 8, generator=generator, device="cpu") for _ in range(2))
        try:
            rotated, _ = apply(query, key, cos, sin)
        except (RuntimeError, TypeError, ValueError):
            return False
        expected = rotate_reference(query, cos, sin)
        return rotated.shape == expected.shape and torch.allclose(rotated, expected, atol=1e-5)


class _One:
    """Stands for cos = 1 in a base's rotation: `x * one` is x itself, nothing is computed."""

    def unsqueeze(self, dim: int) -> _One:
        return self

    def __rmul__(self, other: torch.Tensor) -> torch.Tensor:
        return other


class _Zero:
    """Stands for sin = 0: `x * zero` is zero, and `x + zero` is x itself."""

    def unsqueeze(self, dim: int) -> _Zero:
        return self

    def __rmul__(self, other: torch.Tensor) -> _Zero:
        return self

    def __radd__(self, other: torch.Tensor) -> torch.Tensor:
        return other


IDENTITY = (_One(), _Zero())


@lru_cache(maxsize=64)
def skips_identity(apply: Callable) -> bool:
    """Whether a rotation hands q and k back untouched for `IDENTITY`, at the cost of `rotate_half` only."""
    query, key = torch.zeros(1, 1, 2, 8, device="cpu"), torch.zeros(1, 1, 2, 8, device="cpu")
    try:
        rotated = apply(query, key, *IDENTITY)
    except UNFIT:
        return False
    return rotated[0] is query and rotated[1] is key


def _unturned(query: torch.Tensor, key: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a base's rotation."""
    return query, key


def _rebound(function: Callable, name: str, value: object) -> FunctionType | None:
    """A copy of a function that finds `value` under the global `name`, with its decorators; None: it cannot be made."""
    if not isinstance(function, FunctionType):
        return None
    inner, cells, space = getattr(function, "__wrapped__", None), function.__closure__, function.__globals__
    if inner is None:
        if name not in function.__code__.co_names:
            return None
        space = {**space, name: value}
    else:
        copied = _rebound(inner, name, value)
        held = [cell.cell_contents is inner for cell in cells or ()]
        if copied is None or not any(held):
            return None
        cells = tuple(CellType(copied) if same else cell for same, cell in zip(held, cells or (), strict=True))
    made = FunctionType(function.__code__, space, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@lru_cache(maxsize=64)
def unrotated_forward(cls: type[nn.Module]) -> Callable | None:
    """The forward of an attention class without its rotation: not even `rotate_half` is computed. None: not possible.

    The function itself is copied, nothing in its module changes.
    """
    return _rebound(cls.forward, "apply_rotary_pos_emb", _unturned)
