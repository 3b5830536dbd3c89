"""The attention function of a converted model, and the hook that gives it queries and keys from before RoPE.

A forward pre-hook on each full-attention module of the base swaps in identity position embeddings and withholds the
cache. The base's own forward then hands q and k to the attention function as they were before RoPE (after any q/k
norm); the function rotates them with the base's own code, updates the cache and attends. Where it can be, the base's
forward is a copy that does not call its rotation at all: even the identity costs passes over q and k.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from ..kernels.common import index_tensor, use_triton
from ..kernels.custom_op import needs_grad
from ..kernels.decode import decode_attention, decode_step
from ..kernels.dense import dense_attention
from ..kernels.indexed import SelectionTile, Selector, indexed_attention_reference
from ..kernels.kv_quant import dequantize_kv, kv_dtype, rounded_kv
from ..kernels.rotate import rotate
from ..kernels.score_select import select_top_p
from ..kernels.sink_window import sink_window_attention
from ..kernels.sparse_prefill import sparse_prefill_attention
from .cache_rtpurbo import CacheView, RTPurboCache
from .families_rtpurbo import (
    CACHE_ARGUMENT,
    IDENTITY,
    Family,
    rotation,
    skips_identity,
    swaps_halves,
    unrotated_forward,
)
from .plan_rtpurbo import HeadPlan

ATTENTION_NAME = "rtpurbo"
# attention modes whose caches obey `kv_cache_dtype`
QUANTISED_MODES = ("sparse", "headwise")


@dataclass(frozen=True)
class AttentionInputs:
    """What an observer of a layer is shown: queries and keys of one forward, before and after RoPE.

    `query_pre`, `query` `[B, Hq, M, D]`; `key_pre`, `key`, `value` `[B, Hkv, M, D]`; `positions` `[B, M]` logical.
    """

    layer_idx: int
    plan: HeadPlan
    indexer: nn.Module | None
    query_pre: torch.Tensor
    key_pre: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    start: torch.Tensor | None
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None


@dataclass(frozen=True)
class DecodeRows:
    """Rows of an uncached forward that attend as decode steps do: `index` `[B, R]`, and which of them `counted`.

    `before`: how many rows come before them, where they are the last ones of every sequence; else None.
    """

    index: torch.Tensor
    counted: torch.Tensor
    before: int | None = None

    @classmethod
    def from_mask(cls, mask: torch.Tensor, *, before: int | None = None) -> DecodeRows | None:
        """Rows where the bool mask `[B, M]` is set; None if there are none."""
        count = mask.sum(1)
        width = int(count.max())
        if width == 0:
            return None
        index = mask.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        return cls(index, torch.arange(width, device=mask.device) < count[:, None], before)


@dataclass
class ForwardState:
    """One forward's context, handed through the base model to every attention layer."""

    mode: str
    q_start: int
    start: torch.Tensor | None
    is_decode: bool
    is_dense: bool
    positions: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    length: torch.Tensor | None = None
    decode_rows: DecodeRows | None = None
    observer: Callable[[AttentionInputs], torch.Tensor | None] | None = None
    on_selection: Callable[..., None] | None = None
    selector: Selector | None = None
    losses: list[torch.Tensor] = field(default_factory=list)
    cache: RTPurboCache | None = None


class RTPurboLayer:
    """What a converted attention module knows beyond its base: head plans by mode, options, and how it rotates."""

    def __init__(self, attention: nn.Module, family: Family, config, plans: dict[str, HeadPlan]):
        self.layer_idx = attention.layer_idx
        self.config = config
        self.plans = plans
        self.rotation = rotation(attention, family)
        self.swaps_halves = self.rotation is not None and not family.partial_rotary and swaps_halves(self.rotation)
        self.skips_identity = self.swaps_halves and skips_identity(self.rotation)
        self.signature = inspect.signature(type(attention).forward.__get__(attention))
        known = CACHE_ARGUMENT in self.signature.parameters
        self.cache_argument = CACHE_ARGUMENT if known else family.cache_argument
        self.state: ForwardState | None = None


def attention_forward(attention: nn.Module, *args, **kwargs):
    """The module's own forward, less its rotation where that can be left out: the attention function rotates."""
    forward = None if torch.compiler.is_compiling() else unrotated_forward(type(attention))
    return (forward or type(attention).forward)(attention, *args, **kwargs)


@lru_cache(maxsize=64)
def _identity(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of no rotation, made once: no launches of their own in a decode step."""
    with torch.inference_mode(False):
        return torch.ones((), dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)


def attention_pre_hook(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Swap position embeddings for the identity, withhold the cache, and pass both on to the attention function."""
    layer: RTPurboLayer = attention.rtpurbo
    bound = layer.signature.bind_partial(*args, **kwargs)
    arguments = dict(bound.arguments)
    arguments.update(arguments.pop("kwargs", {}))
    cos, sin = arguments["position_embeddings"]
    arguments["rtpurbo_call"] = (cos, sin, arguments.get(layer.cache_argument))
    if layer.skips_identity and not torch.compiler.is_compiling():
        arguments["position_embeddings"] = IDENTITY
    else:
        one, zero = _identity(cos.dtype, cos.device)
        arguments["position_embeddings"] = (one.expand(cos.shape), zero.expand(sin.shape))
    arguments[layer.cache_argument] = None
    arguments.setdefault("rtpurbo_state", layer.state)
    return (), arguments


def rtpurbo_mask(*args, **kwargs) -> None:
    """No mask tensor: causality, windows and padding are computed from positions in the attention function."""
    return None


def rtpurbo_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    rtpurbo_state: ForwardState | None = None,
    rtpurbo_call: tuple | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: `[B, H, M, D]` in, `[B, M, Hq, D]` out."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # a norm after the projections gives fp32; scores and routing must not be rounded more than without autocast
        query, key, value = (tensor.to(torch.get_autocast_dtype(device_type)) for tensor in (query, key, value))
        with torch.autocast(device_type, enabled=False):
            return rtpurbo_attention(
                module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, sliding_window,
                rtpurbo_state, rtpurbo_call, **kwargs,
            )  # fmt: skip
    if rtpurbo_state is None:
        raise RuntimeError(
            f"{type(module).__name__} was called outside RTPurboForCausalLM.forward: call the wrapping model"
        )
    if dropout:
        raise ValueError("RTPurbo attention has no dropout: set attention_dropout = 0 in the base config")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap, "sink_logits": s_aux}
    if rtpurbo_call is None:
        return _native_sliding(module, query, key, value, sliding_window, rtpurbo_state, options), None
    layer: RTPurboLayer = module.rtpurbo
    cos, sin, cache = rtpurbo_call
    query_pre, key_pre = query, key
    state = rtpurbo_state
    if layer.rotation is not None:
        query, key = _rotate(layer, query, key, cos, sin)
        # under autocast cos and sin are fp32, and so is what they rotate
        query, key = query.to(value.dtype), key.to(value.dtype)
    device = query.device
    positions = state.positions.to(device)
    plan = routed = layer.plans[state.mode]
    if state.is_dense:
        plan = routed.whole
    if state.observer is not None:
        inputs = AttentionInputs(
            layer.layer_idx, layer.plans["sparse"], getattr(module, "indexer", None), query_pre, key_pre, query, key,
            value, positions, state.start, **options,
        )  # fmt: skip
        with torch.enable_grad():
            loss = state.observer(inputs)
        if loss is not None:
            state.losses.append(loss)
    index_query = index_key = None
    if routed.indexed and routed.retrieval and (cache is not None or not state.is_dense):
        # 16 bits are enough to route, and make tokens that tie in exact arithmetic tie in every batch shape
        dtype = torch.bfloat16 if key.dtype == torch.float32 else key.dtype
        rotation = None if state.rotation is None else tuple(part.to(device) for part in state.rotation)
        if state.is_decode:
            index_query, index_key = module.indexer.step(
                query_pre, key_pre, positions, rotation, dtype=dtype, backend=layer.config.attention_backend
            )
        else:
            how = {"dtype": dtype, "backend": layer.config.attention_backend}
            if layer.config.retrieval_prefill != "dense" or state.decode_rows is not None:
                index_query = module.indexer.queries(query_pre, positions, rotation, **how)
            index_key = module.indexer.keys(key_pre, positions, rotation, **how)
    # an offloaded layer leaves the device as soon as it is updated: what is written later would be lost
    offloaded = cache is not None and cache.offloading
    step = _Step(layer, plan, state, options, query, key, value, index_query, index_key, offloaded)
    view = None
    if cache is not None:
        view, _ = cache.update(
            key,
            value,
            layer.layer_idx,
            index_key=index_key,
            start=state.start,
            decode_length=None if state.length is None else state.length.to(device),
            dense=state.is_dense,
            write=not (state.is_decode and step.fuses),
            backend=layer.config.attention_backend,
        )
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    if view is None or view.q_start == 0:
        step.fresh(out)
    elif state.is_decode:
        step.decode(out, view, cache)
    else:
        step.chunk(out, view)
    return out, None


def _rotate(layer: RTPurboLayer, query, key, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate with the base's own code, or in one launch where the family's rotation is known and nothing is trained."""
    fits = layer.swaps_halves and cos.shape[-1] == query.shape[-1] and cos.dtype == query.dtype
    plain = torch.compiler.is_compiling() or needs_grad(query, key, cos)
    if fits and not plain and use_triton(layer.config.attention_backend, query):
        return rotate(query, key, cos, sin)
    return layer.rotation(query, key, cos, sin)


def _native_sliding(module, query, key, value, window, state: ForwardState, options: dict) -> torch.Tensor:
    """A sliding-window layer of the base itself, left as it is; its cache has already been updated."""
    if window is None:
        # some families (qwen2_moe) leave their windows to the mask
        kinds = getattr(module.config, "layer_types", None)
        if kinds is None or kinds[module.layer_idx] != "sliding_attention":
            raise RuntimeError(
                f"{type(module).__name__} (layer {module.layer_idx}) has no window and was not converted"
            )
        window = module.config.sliding_window
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    kv_start = state.q_start + query.shape[2] - key.shape[2]
    if state.cache is not None and module.layer_idx in state.cache.native_windows:
        view = state.cache.layers[module.layer_idx].take_view()
        if state.is_decode:
            return _native_step(module, query, view, window, state, out, options)
        kv_start = view.tail_start
        if view.tail_key is not None:
            key, value = view.tail_key, view.tail_value
    heads = tuple(range(query.shape[1]))
    group = query.shape[1] // key.shape[1]
    return sink_window_attention(
        query,
        key,
        value,
        heads=heads,
        kv_heads=tuple(h // group for h in heads),
        window=window,
        num_sinks=0,
        out=out,
        q_start=state.q_start,
        kv_start=kv_start,
        start=state.start,
        backend=module.rtpurbo_backend,
        **options,
    )


def _native_step(
    module, query: torch.Tensor, view: CacheView, window: int, state: ForwardState, out: torch.Tensor, options: dict
) -> torch.Tensor:
    """A decode step of a native window over its ring: lengths come from the device, as CUDA graphs ask."""
    cache, backend = state.cache, module.rtpurbo_backend
    plan = cache.layers[module.layer_idx].plan
    workspace = None
    if use_triton(backend, query):
        workspace = cache.workspace(query, plan, view.full_key.shape[2], cache.index_block_size)
    return decode_attention(
        query,
        view.full_key,
        view.full_value,
        view.window_key,
        view.window_value,
        None,
        retrieval_heads=(),
        full_slot=plan.full_slot,
        window_slot=plan.window_slot,
        length=state.length.to(query.device),
        start=None if state.start is None else state.start.to(query.device),
        window=window,
        num_sinks=0,
        block_size=cache.index_block_size,
        out=out,
        workspace=workspace,
        backend=backend,
        **options,
    )


@dataclass(frozen=True)
class _FullPart:
    """Keys and values `[B, F or 1, N, D]` of the full store, and who reads which of their rows.

    `local` are query heads, `chosen` places in the plan's list of retrieval heads.
    """

    key: torch.Tensor
    value: torch.Tensor
    local: tuple[int, ...]
    local_rows: tuple[int, ...]
    chosen: tuple[int, ...]
    plan: HeadPlan

    @property
    def retrieval_rows(self) -> tuple[int, ...]:
        rows = self.plan.retrieval_rows
        return tuple(0 if self.key.shape[1] == 1 else rows[i] for i in self.chosen)


@dataclass
class _Step:
    """One layer's attention in one forward; each method fills `out` `[B, M, Hq, D]` for all heads."""

    layer: RTPurboLayer
    plan: HeadPlan
    state: ForwardState
    options: dict
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    index_query: torch.Tensor | None
    index_key: torch.Tensor | None
    offloaded: bool = False

    @property
    def selects(self) -> bool:
        chosen = self.layer.config.index_top_p < 1.0 or self.state.selector is not None
        return self.plan.indexed and bool(self.plan.retrieval) and chosen

    @property
    def stored(self) -> torch.dtype | None:
        """What decode steps read keys and values of the full store in; None: as they are."""
        if self.state.is_dense or self.state.mode not in QUANTISED_MODES:
            return None
        return kv_dtype(self.layer.config.kv_cache_dtype)

    @property
    def backend(self) -> str:
        return self.layer.config.attention_backend

    @property
    def retrieval_prefill(self) -> str:
        return self.layer.config.retrieval_prefill if self.selects else "dense"

    @property
    def fuses(self) -> bool:
        """Whether a decode step writes its tokens while it selects: `decode_step`."""
        return self.selects and not self.offloaded and use_triton(self.backend, self.query)

    def fresh(self, out: torch.Tensor) -> None:
        """Nothing is cached: this forward's own keys are all there is."""
        plan = self.plan
        self._local(out, self.query, self.key, self.value, plan.local, plan.local_kv)
        if not plan.retrieval:
            return
        # a quantised cache is not yet there for these rows, but it is for those that stand for decode steps
        emulates = self.selects or (self.stored is not None and self.index_query is not None)
        rows = self.state.decode_rows if emulates else None
        if self.retrieval_prefill == "sparse":
            slots = torch.arange(self.query.shape[2], device=self.query.device)
            if self.stored is None:
                rows = None  # they attend as decode steps do, all of them
            self._indexed(
                out, self.query, self.index_query, slots, self.key, self.value, self.index_key, plan.retrieval_kv,
                observed=rows is None,
            )  # fmt: skip
        elif self.retrieval_prefill == "sparse_tiled":
            before = None if rows is None else rows.before
            if before is not None:
                # as in generation, the prompt's tiles know nothing of the rows that decode after it
                out[:, before:, index_tensor(plan.retrieval, out.device)] = 0
            self._tiled(out, self.key, self.value, self.index_key, plan.retrieval_kv, q_start=0, rows=before)
        else:
            self._dense(out, self.key, self.value, plan.retrieval_kv, q_start=0)
        if rows is not None:
            self._decode_rows(out, rows)

    def chunk(self, out: torch.Tensor, view) -> None:
        """A further piece of the prompt: earlier keys come from the cache."""
        plan = self.plan
        rows = tuple(plan.window_slot[plan.kv_head(h)] for h in plan.local_window)
        self._local(
            out, self.query, view.tail_key, view.tail_value, plan.local_window, rows,
            q_start=view.q_start, kv_start=view.tail_start, sink_key=view.sink_key, sink_value=view.sink_value,
        )  # fmt: skip
        index_key = view.index_key[:, :, : view.length] if self.selects else None
        for part in self._full_parts(view, fresh=True):
            self._local(out, self.query, part.key, part.value, part.local, part.local_rows, q_start=view.q_start)
            if not part.chosen:
                continue
            if self.retrieval_prefill == "sparse":
                slots = torch.arange(view.q_start, view.length, device=self.query.device)
                self._indexed(
                    out, self.query, self.index_query, slots, part.key, part.value, index_key, part.retrieval_rows,
                    part.chosen,
                )  # fmt: skip
            elif self.retrieval_prefill == "sparse_tiled":
                self._tiled(
                    out, part.key, part.value, index_key, part.retrieval_rows, part.chosen, q_start=view.q_start
                )
            else:
                self._dense(out, part.key, part.value, part.retrieval_rows, part.chosen, q_start=view.q_start)

    def _full_parts(self, view, *, fresh: bool) -> Iterator[_FullPart]:
        """The full store's keys and values as attention reads them, with the query heads that do.

        All at once; one KV head after the other where they have to be dequantised, so that no more than one head's are
        held twice. `fresh`: this forward's own tokens stand in them as they came, not as they were stored.
        """
        plan, length = self.plan, view.length
        shared = plan.local_full
        everyone = tuple(range(len(plan.retrieval)))
        if view.key_scale is None:
            rows = tuple(plan.full_slot[plan.kv_head(h)] for h in shared)
            key, value = view.full_key[:, :, :length], view.full_value[:, :, :length]
            yield _FullPart(key, value, shared, rows, everyone, plan)
            return
        for row, kv_head in enumerate(plan.full_kv):
            key, value = (
                dequantize_kv(store[:, row : row + 1, :length], scale[:, row : row + 1, :length], own.dtype)
                for own, store, scale in (
                    (self.key, view.full_key, view.key_scale),
                    (self.value, view.full_value, view.value_scale),
                )
            )
            if fresh:
                key[:, :, view.q_start :] = self.key[:, kv_head : kv_head + 1]
                value[:, :, view.q_start :] = self.value[:, kv_head : kv_head + 1]
            local = tuple(h for h in shared if plan.kv_head(h) == kv_head)
            chosen = tuple(i for i in everyone if plan.retrieval_kv[i] == kv_head)
            yield _FullPart(key, value, local, (0,) * len(local), chosen, plan)

    def decode(self, out: torch.Tensor, view, cache) -> None:
        """A decode step over the stores of the cache."""
        plan, config, state = self.plan, self.layer.config, self.state
        selection = workspace = None
        retrieval = plan.retrieval if self.selects else ()
        device = self.query.device
        length = state.length.to(device)
        start = None if state.start is None else state.start.to(device)
        if use_triton(self.backend, self.query):
            workspace = cache.workspace(self.query, plan, view.full_key.shape[2], config.index_block_size)
        if self.fuses:
            decode_step(
                self.query,
                self.key,
                self.value,
                self.index_query,
                self.index_key,
                view.full_key,
                view.full_value,
                view.index_key,
                view.window_key,
                view.window_value,
                retrieval_heads=retrieval,
                index_heads=plan.index_heads,
                full_slot=plan.full_slot,
                window_slot=plan.window_slot,
                length=length,
                start=start,
                top_p=config.index_top_p,
                min_tokens=config.index_min_tokens,
                block_size=config.index_block_size,
                window=config.sliding_window,
                num_sinks=config.num_sink_tokens,
                out=out,
                key_scale=view.key_scale,
                value_scale=view.value_scale,
                workspace=workspace,
                backend=self.backend,
                **self.options,
            )
            return
        if retrieval:
            selection = select_top_p(
                self.index_query,
                view.index_key,
                index_heads=plan.index_heads,
                length=length,
                start=start,
                top_p=config.index_top_p,
                min_tokens=config.index_min_tokens,
                block_size=config.index_block_size,
                workspace=workspace,
                backend=self.backend,
            )
        if retrieval or plan.local:
            decode_attention(
                self.query,
                view.full_key,
                view.full_value,
                view.window_key,
                view.window_value,
                selection,
                retrieval_heads=retrieval,
                full_slot=plan.full_slot,
                window_slot=plan.window_slot,
                length=length,
                start=start,
                window=config.sliding_window,
                num_sinks=config.num_sink_tokens,
                block_size=config.index_block_size,
                out=out,
                key_scale=view.key_scale,
                value_scale=view.value_scale,
                workspace=workspace,
                backend=self.backend,
                **self.options,
            )
        if plan.retrieval and not retrieval:
            # no selection: retrieval heads see everything (what was written for them above is overwritten)
            for part in self._full_parts(view, fresh=False):
                if part.chosen:
                    self._dense(out, part.key, part.value, part.retrieval_rows, part.chosen, q_start=view.q_start)

    def _local(self, out, query, key, value, heads, kv_heads, **where) -> None:
        if heads:
            config = self.layer.config
            sink_window_attention(
                query, key, value, heads=heads, kv_heads=kv_heads, window=config.sliding_window,
                num_sinks=config.num_sink_tokens, out=out, start=self.state.start, backend=self.backend,
                **where, **self.options,
            )  # fmt: skip

    def _heads(self, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """Retrieval heads by their places in the plan's list; None: all of them."""
        return self.plan.retrieval if chosen is None else tuple(self.plan.retrieval[i] for i in chosen)

    def _dense(self, out, key, value, kv_heads, chosen=None, *, q_start: int) -> None:
        dense_attention(
            self.query, key, value, heads=self._heads(chosen), kv_heads=kv_heads, out=out, q_start=q_start,
            start=self.state.start, backend=self.backend, **self.options,
        )  # fmt: skip

    def _index(self, index_query: torch.Tensor, chosen: tuple[int, ...] | None) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Index queries of these retrieval heads, and the rows of the index store that they read."""
        if chosen is None or len(chosen) == len(self.plan.retrieval):
            return index_query, self.plan.index_heads
        picked = index_query.index_select(1, index_tensor(chosen, index_query.device))
        return picked, tuple(self.plan.index_heads[i] for i in chosen)

    def _tiled(
        self, out, key, value, index_key, kv_heads, chosen=None, *, q_start: int, rows: int | None = None
    ) -> None:
        """`rows`: so many first rows only."""
        config = self.layer.config
        # where some rows decode, they are what is observed: the rest then keeps to the fast kernels
        observe = self.state.on_selection if self.state.decode_rows is None else None
        query = self.query
        index_query, index_heads = self._index(self.index_query, chosen)
        if rows is not None:
            query, index_query, out = query[:, :, :rows], index_query[:, :, :rows], out[:, :rows]
        sparse_prefill_attention(
            query,
            key,
            value,
            index_query,
            index_key,
            heads=self._heads(chosen),
            kv_heads=kv_heads,
            index_heads=index_heads,
            top_p=config.index_top_p,
            min_tokens=config.index_min_tokens,
            num_sinks=config.num_sink_tokens,
            out=out,
            q_start=q_start,
            start=self.state.start,
            backend=self.backend,
            on_selection=None if observe is None else _for_layer(observe, self.layer.layer_idx),
            **self.options,
        )

    def _indexed(
        self, out, query, index_query, q_slots, key, value, index_key, kv_heads, chosen=None, selector=None,
        observed=True,
    ) -> None:  # fmt: skip
        config, device = self.layer.config, query.device
        index_query, index_heads = self._index(index_query, chosen)
        observe = self.state.on_selection if observed else None
        indexed_attention_reference(
            query,
            key,
            value,
            index_query,
            index_key,
            heads=index_tensor(self._heads(chosen), device),
            kv_heads=index_tensor(kv_heads, device),
            index_heads=index_tensor(index_heads, device),
            top_p=config.index_top_p,
            min_tokens=config.index_min_tokens,
            block_size=config.index_block_size,
            out=out,
            q_slots=q_slots,
            start=self.state.start,
            on_selection=None if observe is None else _for_layer(observe, self.layer.layer_idx),
            selector=selector or self.state.selector,
            **self.options,
        )

    def _decode_rows(self, out: torch.Tensor, rows: DecodeRows) -> None:
        """Recompute the retrieval heads of some rows as decode steps would."""
        rows = DecodeRows(rows.index.to(out.device), rows.counted.to(out.device), rows.before)
        batch = torch.arange(out.shape[0], device=out.device)[:, None]
        query = self.query.gather(2, _expand(rows.index, self.query))
        index_query = self.index_query.gather(2, _expand(rows.index, self.index_query))
        tile = out.new_zeros(out.shape[0], rows.index.shape[1], out.shape[2], out.shape[3])
        # rows that do not count still need something to attend to; their result is dropped
        key, value, heads = self.key, self.value, self.plan.retrieval
        if self.stored is not None:
            key, value = rounded_kv(key, self.stored), rounded_kv(value, self.stored)
            heads += self._shared_rows(tile, query, index_query, rows.index, key, value)
        everything = None if self.selects else _see_everything
        self._indexed(
            tile, query, index_query, rows.index, key, value, self.index_key, self.plan.retrieval_kv, None, everything
        )
        index = index_tensor(heads, out.device)
        where = batch.expand_as(rows.index)[rows.counted], rows.index[rows.counted]
        out[where[0][:, None], where[1][:, None], index] = tile[rows.counted][:, index]

    def _shared_rows(self, tile, query, index_query, slots, key, value) -> tuple[int, ...]:
        """Rows `slots` `[B, R]` of the local heads that read the full store in a decode step; returns the heads."""
        plan, config = self.plan, self.layer.config
        heads = plan.local_full

        def near(seen: SelectionTile) -> torch.Tensor:
            distance = seen.slots[:, None, :, None] - torch.arange(seen.key.shape[2], device=slots.device)
            position = seen.slots[:, None, :, None] - distance
            if seen.start is not None:
                position = position - seen.start.to(slots.device)[:, None, None, None]
            return seen.valid & ((distance < config.sliding_window) | (position < config.num_sink_tokens))

        if heads:
            indexed_attention_reference(
                query,
                key,
                value,
                index_query,
                self.index_key,
                heads=index_tensor(heads, slots.device),
                kv_heads=index_tensor(tuple(plan.kv_head(h) for h in heads), slots.device),
                index_heads=index_tensor(plan.index_heads, slots.device),
                top_p=1.0,
                min_tokens=0,
                block_size=1,
                out=tile,
                q_slots=slots,
                start=self.state.start,
                selector=near,
                **self.options,
            )
        return heads


def _see_everything(tile: SelectionTile) -> torch.Tensor:
    return tile.valid.expand_as(tile.scores)


def _expand(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _for_layer(observe: Callable[..., None], layer_idx: int) -> Callable[..., None]:
    def call(rows, chosen, valid, weights):
        observe(layer_idx, rows, chosen, valid, weights)

    return call
