"""The hybrid KV cache: everything for retrieval heads, sinks and a rolling window for the others.

Per converted layer there are three stores:

- *full*: keys and values of the KV heads that serve a retrieval head, one slot a token, padding included;
- *index*: index keys of the retrieval heads, slot by slot beside the full store;
- *window*: keys and values of all other KV heads by logical position p: sinks (p < S) at slot p, later tokens in a
  ring at `S + (p - S) % R`. R covers the window and `SLACK` tokens, so that a few tokens can be cropped again.

Layers of the base model that are not converted (native sliding windows, linear attention) keep their own layers of
transformers; in the static form native windows are rings as well (`NativeWindowLayer`). Lengths are Python integers;
the stores grow by an eighth, so appending a token copies O(1) amortised.
While a context is shorter than `dense_below`, the full store holds all KV heads; it is split up once it is longer.
With `kv_cache_dtype` the full store is int8 or fp8 with fp16 scales (`kernels/kv_quant.py`), from the split on.
The *static* form (`max_length`) allocates once, keeps its addresses and its length on the device: what CUDA graphs ask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from ..kernels.append import append_step
from ..kernels.common import index_tensor, starts
from ..kernels.kv_quant import SCALE_DTYPE, kv_dtype, quantize_kv
from ..kernels.workspace import DecodeWorkspace
from .families_rtpurbo import head_counts
from .plan_rtpurbo import HeadPlan

SLACK = 64
RECORDED = 512
PREFILL_MARGIN = 128
# kinds of native layers whose cache has one size and one address (recurrent states have from the start)
STATIC_NATIVE = ("sliding_attention", "linear_attention", "conv")


def _grown(capacity: int, needed: int) -> int:
    return max(needed, capacity + max(256, capacity // 8))


def runs(heads: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last of each run of consecutive numbers in an ascending list."""
    first = [head for head in heads if head - 1 not in heads]
    last = [head for head in heads if head + 1 not in heads]
    return tuple(zip(first, last, strict=True))


def ring_slots(position: torch.Tensor, num_sinks: int, ring: int) -> torch.Tensor:
    """Slots in the window store of logical positions (negative positions are clamped to 0)."""
    wrapped = num_sinks + (position - num_sinks).clamp_min(0) % max(ring, 1)
    return torch.where(position < num_sinks, position.clamp_min(0), wrapped)


@dataclass(frozen=True)
class CacheView:
    """What one forward of a layer attends to, after its tokens were written.

    `q_start` is the number of slots before this forward. On a fresh cache (`q_start == 0`) the caller attends to its
    own keys and values. `tail_key` and `tail_value` `[B, W, T, D]` (chunks only) are the last keys of the window store
    in slot order, from slot `tail_start` on, with this forward's keys at the end; `sink_key`, `sink_value` the sinks.
    `key_scale`, `value_scale` `[B, F, C]` belong to a quantised full store.
    """

    q_start: int
    length: int
    full_key: torch.Tensor
    full_value: torch.Tensor
    index_key: torch.Tensor | None
    window_key: torch.Tensor
    window_value: torch.Tensor
    tail_key: torch.Tensor | None = None
    tail_value: torch.Tensor | None = None
    sink_key: torch.Tensor | None = None
    sink_value: torch.Tensor | None = None
    tail_start: int = 0
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


class RTPurboCacheLayer(CacheLayerMixin):
    """The stores of one converted layer. Shapes: `[B, heads, capacity, head_dim]`, see the module's docstring."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    _stores = ("keys", "values", "index_keys", "window_keys", "window_values", "key_scales", "value_scales")

    def __init__(
        self,
        plan: HeadPlan,
        *,
        window: int,
        num_sinks: int,
        index_dim: int,
        max_length: int | None = None,
        kv_cache_dtype: str = "auto",
    ):
        super().__init__()
        self.kv_cache_dtype = kv_cache_dtype
        self.max_length = max_length
        self.plan = plan
        # what the stores hold now: the plan's split, or every KV head whole
        self.held = plan
        self.window = window
        self.num_sinks = num_sinks
        self.index_dim = index_dim
        self.length = 0
        self.record_past = False
        self._unconfirmed = 0
        self._lost = 0  # ring positions overwritten so far: a crop cannot bring them back
        self.index_keys: torch.Tensor | None = None
        self.window_keys: torch.Tensor | None = None
        self.window_values: torch.Tensor | None = None
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None

    @property
    def ring(self) -> int:
        return 0 if self.window_keys is None else self.window_keys.shape[2] - self.num_sinks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, dim = key_states.shape[0], key_states.shape[3]
        self.keys = key_states.new_empty(batch, len(self.held.full_kv), 0, dim)
        self.values = value_states.new_empty(batch, len(self.held.full_kv), 0, value_states.shape[3])
        self.index_keys = key_states.new_empty(batch, len(self.plan.index_key_kv), 0, self.index_dim)
        self.window_keys = key_states.new_zeros(batch, len(self.held.window_kv), self.num_sinks, dim)
        self.window_values = value_states.new_zeros(
            batch, len(self.held.window_kv), self.num_sinks, value_states.shape[3]
        )
        self.key_scales = self.value_scales = None
        stored = kv_dtype(self.kv_cache_dtype, self.device)
        if stored is not None and self.held is self.plan:
            self.keys, self.values = self.keys.to(stored), self.values.to(stored)
            self.key_scales = self.keys.new_empty(self.keys.shape[:3], dtype=SCALE_DTYPE)
            self.value_scales = self.key_scales.clone()
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *,
        index_key: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        decode_length: torch.Tensor | None = None,
        dense: bool = False,
        write: bool = True,
        backend: str = "auto",
    ) -> tuple[CacheView, None]:
        """Write this forward's tokens and return what it attends to.

        Args:
            key_states, value_states: `[B, Hkv, M, D]`, rotated.
            index_key: `[B, I, M, index_dim]`, projected and rotated; None if the plan has no index.
            start: `[B]` slot of each row's first real token, or None.
            decode_length: in a decode step, the slots in use after it, int32 `[1]` on the device; the caller reads the
                stores themselves then, not a contiguous tail.
            dense: the context is still below `dense_below`: keep every KV head whole.
            write: in a decode step, False leaves the writing to the caller (`decode_step`).
            backend: of the kernel that writes a decode step.
        """
        if dense and self.length == 0:
            self.reset()
            self.is_initialized = False
            self.held = self.plan.whole
        elif not dense and self.held is not self.plan:
            self._leave_dense(start)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            if index_key is not None:
                self.index_keys = self.index_keys.to(index_key.dtype)
        past, new = self.length, key_states.shape[2]
        total = past + new
        if self.record_past:
            self._unconfirmed = min(self._unconfirmed + new, RECORDED)
        self._reserve(total, start, fresh=past == 0)
        tail = {}
        if decode_length is not None and write:
            self._append(key_states, value_states, index_key, start, decode_length, backend)
        elif decode_length is None:
            tail = self._extend(key_states, value_states, index_key, start, backend)
        self.advance(new)
        view = CacheView(
            q_start=past,
            length=total,
            full_key=self.keys,
            full_value=self.values,
            index_key=self.index_keys,
            window_key=self.window_keys,
            window_value=self.window_values,
            key_scale=self.key_scales,
            value_scale=self.value_scales,
            **tail,
        )
        return view, None

    def _append(
        self, key, value, index_key, start, length: torch.Tensor, backend: str, *, window_slot: tuple[int, ...] = ()
    ) -> None:
        append_step(
            key,
            value,
            index_key if self.plan.index_key_kv else None,
            self.keys,
            self.values,
            self.index_keys,
            self.window_keys,
            self.window_values,
            full_slot=self.held.full_slot,
            window_slot=window_slot or self.held.window_slot,
            length=length,
            start=start,
            num_sinks=self.num_sinks,
            key_scale=self.key_scales,
            value_scale=self.value_scales,
            backend=backend,
        )

    def _extend(self, key, value, index_key, start, backend: str) -> dict:
        """Write a piece of the prompt; the tail that it attends to, if it is not the first one."""
        past, total = self.length, self.length + key.shape[2]
        if self.key_scales is not None:
            # the decode step's own way to quantise, without the window: that is written whole below
            length = torch.full((1,), total, dtype=torch.int32, device=key.device)
            nowhere = (-1,) * self.held.num_kv_heads
            self._append(key, value, index_key, start, length, backend, window_slot=nowhere)
        else:
            self._write_full(key, value)
            if index_key is not None and index_key.shape[1]:
                self.index_keys[:, :, past:total] = index_key
        if not self.held.window_kv:
            return {}
        rows = index_tensor(self.held.window_kv, key.device)
        tail = self._tail(key[:, rows], value[:, rows], start) if past else {}
        self._write_window(key, value, start, rows)
        return tail

    def _write_full(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copy whole runs of heads: picking them by index first would copy twice."""
        past, total = self.length, self.length + key.shape[2]
        for first, last in runs(self.held.full_kv):
            slots = slice(self.held.full_slot[first], self.held.full_slot[last] + 1)
            self.keys[:, slots, past:total] = key[:, first : last + 1]
            self.values[:, slots, past:total] = value[:, first : last + 1]

    def _leave_dense(self, start: torch.Tensor | None) -> None:
        """Split the full store of all KV heads into the plan's full and window stores."""
        length, self.held = self.length, self.plan
        rows = index_tensor(self.plan.window_kv, self.keys.device)
        window_key, window_value = self.keys[:, rows, :length], self.values[:, rows, :length]
        self.keys, self.key_scales = self._kept(self.keys, self.plan.full_kv)
        self.values, self.value_scales = self._kept(self.values, self.plan.full_kv)
        shape = (*window_key.shape[:2], self.num_sinks)
        self.window_keys = window_key.new_zeros(*shape, window_key.shape[3])
        self.window_values = window_value.new_zeros(*shape, window_value.shape[3])
        if self.plan.window_kv and length:
            self.length = 0
            self._reserve(length, start, fresh=True)
            everyone = torch.arange(window_key.shape[1], device=window_key.device)
            self._write_window(window_key, window_value, start, everyone)
        self.length = length
        self.advance(0)

    def _kept(self, store: torch.Tensor, heads: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Some heads of a whole store, as the full store holds them: with their scales if that is quantised."""
        stored = kv_dtype(self.kv_cache_dtype, store.device)
        if stored is None:
            return store[:, index_tensor(heads, store.device)].contiguous(), None
        kept = store.new_zeros(store.shape[0], len(heads), *store.shape[2:], dtype=stored)
        scales = store.new_zeros(kept.shape[:3], dtype=SCALE_DTYPE)
        for row, head in enumerate(heads):
            kept[:, row, : self.length], scales[:, row, : self.length] = quantize_kv(
                store[:, head, : self.length], stored
            )
        return kept, scales

    def _reserve(self, total: int, start: torch.Tensor | None, *, fresh: bool) -> None:
        capacity = self.keys.shape[2]
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"the static cache has {self.max_length} slots and {total} are needed: generate with a larger "
                "max_new_tokens from the start, or use the dynamic cache"
            )
        if total > capacity:
            wanted = self.max_length or (total + PREFILL_MARGIN if fresh else _grown(capacity, total))
            for name in ("keys", "values", "index_keys", "key_scales", "value_scales"):
                old = getattr(self, name)
                if old is None:
                    continue
                # zeros, not garbage: unused slots are masked, but 0 * NaN would still be NaN
                new = old.new_zeros(*old.shape[:2], wanted, *old.shape[3:])
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)
        if self.held.window_kv:
            limit = self.window + max(SLACK, self._unconfirmed)
            held = (self.max_length or total) - self.num_sinks
            if self.ring < min(held, limit):
                wanted = held + PREFILL_MARGIN if fresh else _grown(self.ring, min(held, limit))
                self._resize_ring(min(wanted, limit), start)

    def _resize_ring(self, ring: int, start: torch.Tensor | None) -> None:
        old_ring, sinks = self.ring, self.num_sinks
        last = self.length - 1 - starts(start, self.window_keys.shape[0], self.window_keys.device)
        slots = torch.arange(ring, device=last.device)
        # the latest position p <= last with (p - sinks) % ring == slot
        position = last[:, None] - (last[:, None] - sinks - slots) % ring
        index = ring_slots(position.clamp_min(sinks), sinks, old_ring)[:, None, :, None]
        for name in ("window_keys", "window_values"):
            old = getattr(self, name)
            moved = old.gather(2, index.expand(-1, old.shape[1], -1, old.shape[3])) if old_ring else None
            new = old.new_zeros(*old.shape[:2], sinks + ring, old.shape[3])
            new[:, :, :sinks] = old[:, :, :sinks]
            if moved is not None:
                new[:, :, sinks:] = moved
            setattr(self, name, new)

    def _write_window(
        self, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor | None, rows: torch.Tensor
    ) -> None:
        """Write what the window keeps of the heads `rows` of `key`, `value` `[B, Hkv, M, D]`."""
        sinks, ring, new = self.num_sinks, self.ring, key.shape[2]
        first = self.length - starts(start, key.shape[0], key.device)  # [B] logical position of the first new token
        # ask for each slot which new token belongs there, so that padding and overwritten tokens drop out
        last = first[:, None] + new - 1
        slots = torch.arange(sinks + ring, device=key.device)
        latest = last - (last - slots) % max(ring, 1)
        position = torch.where(slots < sinks, slots, latest)
        source = position - first[:, None]
        taken = ((source >= 0) & (source < new) & ((slots < sinks) | (position >= sinks)))[:, None, :, None]
        source = source.clamp(0, new - 1)
        batch = torch.arange(key.shape[0], device=key.device)[:, None, None]
        for name, states in (("window_keys", key), ("window_values", value)):
            store = getattr(self, name)
            picked = states[batch, rows[:, None], source[:, None]]
            written = torch.where(taken, picked.to(store.dtype), store)
            if self.max_length is None:
                setattr(self, name, written)
            else:
                store.copy_(written)  # captured graphs hold the addresses

    def _tail(self, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor | None) -> dict:
        """The window before this chunk in slot order, followed by the chunk."""
        tail_start = max(self.length - self.window + 1, 0)
        slots = torch.arange(tail_start, self.length, device=key.device)
        position = slots - starts(start, key.shape[0], key.device)[:, None]
        index = ring_slots(position, self.num_sinks, self.ring)[:, None, :, None]
        parts = {}
        for name, store, states in (("key", self.window_keys, key), ("value", self.window_values, value)):
            old = store.gather(2, index.expand(-1, store.shape[1], -1, store.shape[3]))
            parts[f"tail_{name}"] = torch.cat([old, states.to(store.dtype)], 2)
        # the chunk itself may still bring sinks: a short or heavily padded first chunk
        first = self.length - starts(start, key.shape[0], key.device)
        source = torch.arange(self.num_sinks, device=key.device) - first[:, None]
        fresh = ((source >= 0) & (source < key.shape[2]))[:, None, :, None]
        source = source.clamp(0, key.shape[2] - 1)[:, None, :, None]
        for name, store, states in (("key", self.window_keys, key), ("value", self.window_values, value)):
            picked = states.gather(2, source.expand(-1, states.shape[1], -1, states.shape[3]))
            parts[f"sink_{name}"] = torch.where(fresh, picked.to(store.dtype), store[:, :, : self.num_sinks])
        return {**parts, "tail_start": tail_start}

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number is the length to keep.

        Raises:
            RuntimeError: the window store has already overwritten what the shorter context would see.
        """
        amount = int(tokens_to_remove)
        remove = -amount if amount <= 0 else max(self.length - amount, 0)
        remove = min(remove, self.length)
        allowed = self.length - self._lost - self.num_sinks - self.window + 1
        if remove and self._lost > 0 and remove > allowed:
            raise RuntimeError(
                f"cannot crop {remove} tokens: the window store still holds only {max(allowed, 0)} beyond its window "
                f"of {self.window}. Crop at most that many, or start again from an empty cache"
            )
        self.length -= remove
        self._unconfirmed = 0

    def reset(self) -> None:
        self.length = 0
        self._unconfirmed = 0
        self._lost = 0

    def _map(self, function) -> None:
        if not self.is_initialized:
            return
        for name in self._stores:
            store = getattr(self, name)
            if store is None:
                continue
            is_fp8 = store.dtype == torch.float8_e4m3fn
            # not every device picks rows of fp8: the bytes are the same
            changed = function(store.view(torch.uint8)).view(store.dtype) if is_fp8 else function(store)
            if self.max_length is not None and changed.shape == store.shape:
                store.copy_(changed)  # captured graphs hold the addresses
            else:
                setattr(self, name, changed)

    def advance(self, tokens: int) -> None:
        """Count tokens that were written."""
        self.length += tokens
        if self.held.window_kv:
            self._lost = max(self._lost, self.length - self.num_sinks - self.ring)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda store: store.index_select(0, beam_idx.to(store.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda store: store.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda store: store[indices.to(store.device)])

    def offload(self) -> None:
        self._map(lambda store: store.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda store: store.to(self.device, non_blocking=True))

    def nbytes(self) -> dict[str, int]:
        """Allocated bytes by kind: `full`, `index`, `window`."""
        if not self.is_initialized:
            return {"full": 0, "index": 0, "window": 0}
        scales = 0 if self.key_scales is None else self.key_scales.nbytes + self.value_scales.nbytes
        return {
            "full": self.keys.nbytes + self.values.nbytes + scales,
            "index": self.index_keys.nbytes,
            "window": self.window_keys.nbytes + self.window_values.nbytes,
        }

    def dense_nbytes(self) -> int:
        """Bytes that an unquantised cache of every KV head's every token would take at the present length."""
        if not self.is_initialized:
            return 0
        row = (self.keys.shape[3] + self.values.shape[3]) * self.dtype.itemsize
        return self.keys.shape[0] * self.plan.num_kv_heads * self.length * row


class NativeWindowLayer(RTPurboCacheLayer):
    """A sliding-window layer of the base itself, in the static form: all its KV heads in the ring, no sinks.

    The base's attention calls `update` with keys and values only, and the attention function reads `view`. What else a
    forward knows (`start`, `decode_length`) the cache sets beforehand.
    """

    is_sliding = True

    def __init__(self, num_heads: int, num_kv_heads: int, *, window: int, max_length: int, backend: str):
        plan = HeadPlan(num_heads, num_kv_heads, (), False)
        super().__init__(plan, window=window, num_sinks=0, index_dim=1, max_length=max_length)
        self.backend = backend
        self.start: torch.Tensor | None = None
        self.decode_length: torch.Tensor | None = None
        self.view: CacheView | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the tokens; the keys and values `[B, Hkv, M, D]` come back as they are."""
        device = key_states.device
        self.view, _ = super().update(
            key_states,
            value_states,
            start=None if self.start is None else self.start.to(device),
            decode_length=None if self.decode_length is None else self.decode_length.to(device),
            backend=self.backend,
        )
        return key_states, value_states

    def take_view(self) -> CacheView:
        """What the last update left to attend to; the layer forgets it."""
        view, self.view = self.view, None
        assert view is not None, "the base's attention has to update its cache first"
        return view


def _copied_back(layer, function) -> None:
    """Call `function`, which may give the recurrent states of `layer` new tensors, and keep the old addresses."""
    held = [(states, dict(states)) for states in (layer.conv_states, layer.recurrent_states)]
    function()
    for states, before in held:
        for index, old in before.items():
            if old is not None and states[index].shape == old.shape:
                old.copy_(states[index])
                states[index] = old


def full_row_bytes(head_dim: int, itemsize: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of one token's key and value of one KV head in the full store; `itemsize` of the model's numbers."""
    stored = kv_dtype(kv_cache_dtype)
    return 2 * (head_dim * itemsize if stored is None else head_dim * stored.itemsize + SCALE_DTYPE.itemsize)


def predicted_nbytes(
    plan: HeadPlan,
    *,
    batch: int,
    length: int,
    window: int,
    num_sinks: int,
    index_dim: int,
    head_dim: int,
    itemsize: int,
    kv_cache_dtype: str = "auto",
) -> dict[str, int]:
    """What `RTPurboCacheLayer.nbytes()` will say after a prefill of `length` tokens, in bytes by kind."""
    row = 2 * head_dim * itemsize
    full_row = full_row_bytes(head_dim, itemsize, kv_cache_dtype)
    ring = max(min(length - num_sinks + PREFILL_MARGIN, window + SLACK), 0) if length > num_sinks else 0
    slots = length + PREFILL_MARGIN
    return {
        "full": batch * len(plan.full_kv) * slots * full_row,
        "index": batch * len(plan.index_key_kv) * slots * index_dim * 2,
        "window": batch * len(plan.window_kv) * (num_sinks + ring) * row,
    }


def _static_native(config, text, index: int, layer, max_length: int):
    """The static form of a layer that is not converted."""
    kind = text.layer_types[index]
    if kind not in STATIC_NATIVE:
        raise ValueError(
            f"a static cache is not supported for {config.base_config.model_type!r}: its {kind!r} layers have no "
            "static form. Leave cache_implementation out"
        )
    if kind != "sliding_attention":
        return layer
    return NativeWindowLayer(
        *head_counts(config), window=text.sliding_window, max_length=max_length, backend=config.attention_backend
    )


class RTPurboCache(Cache):
    """The cache that `generate()` uses: `RTPurboCacheLayer` where a layer was converted, the base's own elsewhere.

    Args:
        config: the model's `RTPurboConfig`.
        plans: `{layer index: HeadPlan}` of the converted layers.
        offloading: keep all layers but the current one on the CPU (CUDA only).
        max_length: slots of the static form; None: the cache grows.
        quantise: keep full stores as the config's `kv_cache_dtype` says; False: in the model's dtype.

    Raises:
        ValueError: a static cache for a base with layers of a kind that has no static form.
    """

    def __init__(
        self,
        config,
        plans: dict[int, HeadPlan],
        *,
        offloading: bool = False,
        max_length: int | None = None,
        quantise: bool = True,
    ):
        text = config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=text).layers)
        for index, layer in enumerate(layers):
            if index in plans:
                layers[index] = RTPurboCacheLayer(
                    plans[index],
                    window=config.sliding_window,
                    num_sinks=config.num_sink_tokens,
                    index_dim=config.index_dim,
                    max_length=max_length,
                    kv_cache_dtype=config.kv_cache_dtype if quantise else "auto",
                )
            elif max_length is not None:
                layers[index] = _static_native(config, text, index, layer, max_length)
        super().__init__(layers=layers, offloading=offloading)
        self.converted = tuple(plans)
        self.native_windows = tuple(i for i, layer in enumerate(layers) if isinstance(layer, NativeWindowLayer))
        self.start: torch.Tensor | None = None
        self.right_padded = False
        self.in_prefill = False
        self.in_drafts = False
        self.max_length = max_length
        self.index_block_size = config.index_block_size
        self.device_length: torch.Tensor | None = None
        self._counted = 0  # what device_length holds
        self.graphs: dict[int, object] = {}
        self._workspaces: dict[tuple, DecodeWorkspace] = {}

    def step_length(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Slots in use after a decode step of `tokens` tokens, int32 `[1]` on the device, without a synchronisation."""
        length = self.get_seq_length()
        if self.max_length is None:
            return torch.full((1,), length + tokens, dtype=torch.int32, device=device)
        if self.device_length is None:
            self.device_length = torch.full((1,), length, dtype=torch.int32, device=device)
        elif self._counted != length:
            self.device_length.fill_(length)
        self._counted = length + tokens
        return self.device_length.add_(tokens)

    def workspace(self, query: torch.Tensor, plan: HeadPlan, capacity: int, block_size: int) -> DecodeWorkspace:
        """The scratch memory of a decode step with these queries `[B, Hq, M, D]`; all layers share it."""
        batch, heads, queries, dim = query.shape
        key = (batch, queries, query.device)
        held = self._workspaces.get(key)
        if held is None or held.capacity < capacity:
            held = self._workspaces[key] = DecodeWorkspace(
                batch=batch,
                retrieval_heads=max(len(self.layers[i].plan.retrieval) for i in self.converted),
                queries=queries,
                capacity=capacity,
                query_heads=heads,
                kv_heads=plan.num_kv_heads,
                head_dim=dim,
                block_size=block_size,
                device=query.device,
            )
            held.capacity = capacity
        return held

    def before_replay(self, tokens: int) -> None:
        """Count tokens that a captured graph is about to write to every layer."""
        length = self.get_seq_length()
        if self._counted != length:
            self.device_length.fill_(length)
        self._counted = length + tokens
        for index in (*self.converted, *self.native_windows):
            self.layers[index].advance(tokens)

    def set_length(self, length: int) -> None:
        """Forget how many tokens were counted; the stores stay as they are."""
        self._counted = length
        for index in (*self.converted, *self.native_windows):
            self.layers[index].length = length

    def begin(self, start: torch.Tensor | None, decode_length: torch.Tensor | None) -> None:
        """Tell native windows what they cannot see in a forward: padding, and the length after a decode step."""
        for index in self.native_windows:
            self.layers[index].start, self.layers[index].decode_length = start, decode_length

    def set_padding(self, start: torch.Tensor | None, right_padded: bool) -> None:
        """Take the padding of a prefill. Captured graphs read `start` in place: where they cannot, they are dropped."""
        self.right_padded = right_padded
        held = self.start
        if self.max_length is not None and held is not None and start is not None and held.shape == start.shape:
            held.copy_(start)
            return
        if held is not None or start is not None:
            self.graphs.clear()
        self.start = start

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        if layer_idx is None or layer_idx == 0:
            layer_idx = self.converted[0]
        return super().get_seq_length(layer_idx)

    @property
    def is_split(self) -> bool:
        """Whether tokens are kept as the plans say; below `dense_below` they are not yet, and never are again."""
        first = self.layers[self.converted[0]]
        return first.length > 0 and first.held is first.plan

    @property
    def is_recording(self) -> bool:
        return self.layers[self.converted[0]].record_past

    def reset(self) -> None:
        super().reset()
        self.set_padding(None, False)
        self.graphs.clear()

    def _map_start(self, function) -> None:
        if self.start is None:
            return
        changed = function(self.start)
        if self.max_length is not None and changed.shape == self.start.shape:
            self.start.copy_(changed)
        else:
            self.start = changed

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for layer in self.layers:
            if self.max_length is not None and isinstance(layer, LinearAttentionCacheLayerMixin):
                _copied_back(layer, lambda layer=layer: layer.reorder_cache(beam_idx))
            else:
                layer.reorder_cache(beam_idx)
        self._map_start(lambda start: start.index_select(0, beam_idx.to(start.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_start(lambda start: start.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_start(lambda start: start[indices.to(start.device)])

    def nbytes(self) -> dict[str, int]:
        """Allocated bytes of the converted layers, by kind (`full`, `index`, `window`) and as `total`."""
        total: dict[str, int] = {"full": 0, "index": 0, "window": 0}
        for index in self.converted:
            for kind, size in self.layers[index].nbytes().items():
                total[kind] += size
        return {**total, "total": sum(total.values())}

    def dense_nbytes(self) -> int:
        """Bytes that a dense cache of the converted layers would take at the present length."""
        return sum(self.layers[index].dense_nbytes() for index in self.converted)
