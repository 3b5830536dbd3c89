"""The dense peers of `rtpurbo bench model`: prefills with each kernel of SDPA, and decode steps.

Decode steps that compete, the fastest being the peer: the `StaticCache` of transformers with SDPA, whose mask spans the
whole allocation, and FlashAttention-2 split-KV over exactly the tokens in use, with the query heads of a KV head packed
as rows, each captured in a CUDA graph; and both under `torch.compile(mode="reduce-overhead")`.
A peer that fails, does not fit or was left out is reported by its name, with the reason in place of a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from ..modeling.families_rtpurbo import CACHE_ARGUMENT
from .harness import capture, measure, relative_error

logger = logging.getLogger(__name__)
PACKED = "rtpurbo_bench_packed"
TILE = 32_768
ROOM = 64  # slots of a StaticCache beyond the context, for the steps that are timed
# with a mask, K and V are repeated for every query head: seconds a step beyond this many tokens
STATIC_LIMIT = 131_072
# an SDPA prefill that took longer than this is not timed again with another kernel
AGAIN_MS = 40_000
# prefills of up to this many tokens are run once before they are timed, so that the memory is there already
WARM_LIMIT = 131_072
# through all layers of a random model, where the compiler rounds less often; a step on a wrong cache is off by 1
COMPILED_TOLERANCE = 0.2
KERNELS = {SDPBackend.FLASH_ATTENTION: "FA2", SDPBackend.CUDNN_ATTENTION: "cuDNN"}
STATIC, PACKED_NAME, COMPILED = "StaticCache + SDPA", "packed FA2 split-KV", "torch.compile(reduce-overhead)"


@dataclass
class Peers:
    """Milliseconds by peer, or why a peer has none; `bytes` is the peak of a prefill."""

    times: dict[str, float | str] = field(default_factory=dict)
    bytes: int | None = None
    default: str | None = None

    def best(self) -> tuple[float, str] | None:
        """The fastest peer's milliseconds and name; None if none could be timed."""
        known = [(ms, name) for name, ms in self.times.items() if isinstance(ms, float)]
        return min(known) if known else None

    def entries(self) -> dict[str, Any]:
        """What a result row says of its peers."""
        best = self.best()
        return {"peer": best[1] if best else "no dense peer fits", "peers": dict(self.times)}


def reason(error: Exception) -> str:
    """One line for a peer that has no time."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "does not fit on this card"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:200]}"


class TiledMLP(nn.Module):
    """An MLP that a long prefill runs tile by tile, so that 256K tokens fit: same numbers, for both sides."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] <= TILE:
            return self.mlp(hidden)
        out = torch.empty_like(hidden)
        for first in range(0, hidden.shape[1], TILE):
            out[:, first : first + TILE] = self.mlp(hidden[:, first : first + TILE])
        return out


class LastSlotLayer(DynamicLayer):
    """A full static layer whose last slot takes the step's token: attention needs no mask."""

    def fill(self, batch: int, heads: int, length: int, head_dim: int, *, like: torch.Tensor) -> None:
        self.keys = torch.randn(batch, heads, length, head_dim, dtype=like.dtype, device=like.device)
        self.values = torch.randn_like(self.keys)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        for store in (self.keys, self.values):
            torch._dynamo.mark_static_address(store)  # as StaticLayer does: a compiled step then updates it in place
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values


def packed_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """One step's attention over all of `key`: `[B, Hq, 1, D]` in, `[B, 1, Hq, D]` out."""
    batch, heads, _, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query.is_cuda else nullcontext():
        out = nn.functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return out.reshape(batch, 1, heads, dim), None


def no_mask(*args, **kwargs) -> None:
    return None


def register() -> None:
    """Make the packed attention known to transformers."""
    AttentionInterface.register(PACKED, packed_flash)
    AttentionMaskInterface.register(PACKED, no_mask)


# --- prefill -------------------------------------------------------------------------------------------------------


def default_kernel(base) -> SDPBackend:
    """The kernel that SDPA picks by itself for a causal prefill of this model."""
    text = base.config
    like = {"dtype": base.dtype, "device": base.device}
    query = torch.empty(1, text.num_attention_heads, 512, text.head_dim, **like)
    key = torch.empty(1, text.num_key_value_heads, 512, text.head_dim, **like)
    return SDPBackend(torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True))


def prefill_peers(base, ids: torch.Tensor) -> Peers:
    """Time to the first token with the kernel that SDPA picks, and with the others of `KERNELS` by force."""
    default = default_kernel(base)
    peers = Peers(default=KERNELS.get(default, default.name))
    for kernel in (default, *(other for other in KERNELS if other != default)):
        name = f"SDPA ({KERNELS.get(kernel, kernel.name)}{', its own choice' if kernel == default else ''})"
        best = peers.best()
        if best is not None and best[0] > AGAIN_MS:
            peers.times[name] = f"left out: the other kernel took over {AGAIN_MS // 1000} s"
            continue
        try:
            with sdpa_kernel(kernel):
                ms, peak = prefill_ms(base, ids)
        except RuntimeError as error:
            logger.warning("%s at %d tokens: %s", name, ids.shape[1], error)
            peers.times[name] = reason(error)
        else:
            peers.times[name], peers.bytes = ms, peak
        _free()
    return peers


def prefill_ms(base, ids: torch.Tensor) -> tuple[float, int]:
    """Milliseconds to the first token with a cache, and the peak of the allocated bytes."""
    torch.cuda.reset_peak_memory_stats()

    def run() -> int:
        return int(base(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)[0])

    timing = measure(run, warmup=warm_runs(ids.shape[1]), repeats=1)
    return timing.median_ms, torch.cuda.max_memory_allocated()


def warm_runs(length: int) -> int:
    """Prefills of `length` tokens before the one that is timed; the same for the dense peers and for ours."""
    return int(length <= WARM_LIMIT)


# --- decode --------------------------------------------------------------------------------------------------------


class Budget:
    """Seconds that may be spent on compiling; a compilation that has begun is not cut off."""

    def __init__(self, seconds: float):
        self.seconds = self.left = seconds

    @contextmanager
    def spend(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.left -= time.perf_counter() - began


@dataclass(frozen=True)
class Stage:
    """One token on a dense cache: `run(model)` gives its logits `[B, 1, vocabulary]`, `rewind()` takes it back."""

    ids: torch.Tensor
    positions: torch.Tensor
    cache: Cache

    def run(self, model) -> torch.Tensor:
        arguments = {"input_ids": self.ids, "position_ids": self.positions, CACHE_ARGUMENT: self.cache}
        return model(use_cache=True, **arguments).logits

    def rewind(self) -> None:
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, torch.Tensor):
                length.sub_(1)


@contextmanager
def packed_stage(base, length: int, batch: int) -> Iterator[Stage]:
    """Packed FlashAttention-2 over a cache of exactly `length` tokens, this one's included."""
    text = base.config
    layers: list[Any] = []
    for _ in range(text.num_hidden_layers):
        layer = LastSlotLayer()
        layer.fill(batch, text.num_key_value_heads, length, text.head_dim, like=base.lm_head.weight)
        layers.append(layer)
    base.set_attn_implementation(PACKED)
    try:
        yield Stage(*_token(base, length, batch), Cache(layers=layers))
    finally:
        base.set_attn_implementation("sdpa")


@contextmanager
def static_stage(base, length: int, batch: int) -> Iterator[Stage]:
    """Plain transformers: a `StaticCache` that holds `length - 1` tokens, attended to with SDPA."""
    stage = Stage(*_token(base, length, batch), StaticCache(config=base.config, max_cache_len=length + ROOM))
    stage.run(base)
    held: list[Any] = stage.cache.layers
    for layer in held:
        layer.keys.normal_()
        layer.values.normal_()
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(length - 1)
    yield stage


def _token(base, length: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(base.device).manual_seed(length)
    ids = torch.randint(0, min(1000, base.config.vocab_size), (batch, 1), device=base.device, generator=generator)
    return ids, torch.full((batch, 1), length - 1, dtype=torch.long, device=base.device)


STAGES = {PACKED_NAME: packed_stage, STATIC: static_stage}


def graphed_peers(base, length: int, batch: int) -> Peers:
    """Both steps, each captured in a CUDA graph, or timed eagerly where that fails."""
    register()
    peers = Peers()
    for name, make in STAGES.items():
        if name == STATIC and length * batch > STATIC_LIMIT:
            peers.times[name] = f"left out: its mask makes it take seconds beyond {STATIC_LIMIT} tokens"
            continue
        try:
            with make(base, length, batch) as stage:
                label, ms = _graphed_ms(name, partial(stage.run, base))
            peers.times[label] = ms
        except RuntimeError as error:
            logger.warning("%s at %d x %d tokens: %s", name, batch, length, error)
            peers.times[name] = reason(error)
        _free()
    return peers


def _graphed_ms(name: str, step: Callable[[], torch.Tensor]) -> tuple[str, float]:
    try:
        graph = capture([step])
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        logger.warning("%s cannot be captured, it is timed eagerly: %s", name, error)
        return f"{name}, eager", measure(step).median_ms
    return f"{name}, CUDA graph", measure(graph.replay).median_ms


def add_compiled(peers: Peers, base, length: int, batch: int, budget: Budget) -> None:
    """Add the compiled forms of the steps that could be timed, as long as the budget lasts."""
    register()
    for name, make in STAGES.items():
        label = f"{name}, {COMPILED}"
        if not any(key.startswith(name) and isinstance(ms, float) for key, ms in peers.times.items()):
            peers.times[label] = "left out: its graphed form has no time either"
        elif budget.left <= 0:
            peers.times[label] = f"left out: the {budget.seconds:.0f} s for compiling were spent"
        else:
            with budget.spend(), make(base, length, batch) as stage:
                peers.times[label] = _compiled_ms(base, stage)
        _free()


def _compiled_ms(base, stage: Stage) -> float | str:
    """Milliseconds of the compiled step, whose logits must agree with the eager step's, else what went wrong."""
    expected = stage.run(base)
    stage.rewind()

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return stage.run(compiled)

    try:
        compiled = torch.compile(base, mode="reduce-overhead", dynamic=False)
        error = relative_error(step().clone(), expected)
        timing = measure(step, warmup=4)
    except Exception as failure:  # compilers fail in any way; the reason goes into the results
        logger.warning("a decode step cannot be compiled: %s", failure)
        return reason(failure)
    finally:
        torch.compiler.reset()
    return timing.median_ms if error <= COMPILED_TOLERANCE else f"wrong: its logits are off by {error:.2f}"


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
