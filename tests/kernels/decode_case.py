"""A decode step over a hybrid cache, with the whole sequence kept beside it as the oracle's input."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rtpurbo_hf.kernels.append import append_step_reference
from rtpurbo_hf.kernels.indexed import indexed_attention_reference
from rtpurbo_hf.kernels.kv_quant import KV_DTYPES, rounded_kv
from rtpurbo_hf.kernels.sink_window import sink_window_attention_reference


@dataclass
class Case:
    """Geometry of one layer and the tensors of one step; `fill` writes the cache step by step."""

    length: int
    q_len: int = 1
    batch: int = 1
    groups: int = 2
    kv_heads: int = 3
    head_dim: int = 16
    retrieval_heads: tuple[int, ...] = (1, 2)
    index_dim: int = 16
    shared_index: bool = False
    window: int = 24
    num_sinks: int = 4
    padding: tuple[int, ...] | None = None
    capacity: int | None = None
    ring: int | None = None
    int8: bool = False
    kv: str | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    peak: float = 1.5
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=make).to(device=self.device, dtype=self.dtype)

        batch, length = self.batch, self.length
        heads = self.kv_heads * self.groups
        with_retrieval = sorted({h // self.groups for h in self.retrieval_heads})
        self.full_slot = tuple(with_retrieval.index(kv) if kv in with_retrieval else -1 for kv in range(self.kv_heads))
        others = [kv for kv in range(self.kv_heads) if kv not in with_retrieval]
        self.window_slot = tuple(others.index(kv) if kv in others else -1 for kv in range(self.kv_heads))
        if self.shared_index:
            self.index_heads = tuple(with_retrieval.index(h // self.groups) for h in self.retrieval_heads)
            index_rows = len(with_retrieval)
        else:
            self.index_heads = tuple(range(len(self.retrieval_heads)))
            index_rows = len(self.retrieval_heads)
        self.start = None
        if self.padding is not None:
            self.start = torch.tensor(self.padding, dtype=torch.int32, device=self.device)
        capacity = self.capacity or length + 7
        ring = self.ring or self.window + self.q_len - 1
        self.query = normal(batch, heads, self.q_len, self.head_dim)
        self.key = normal(batch, self.kv_heads, length, self.head_dim)
        self.value = normal(batch, self.kv_heads, length, self.head_dim)
        self.index_query = normal(batch, len(self.retrieval_heads), self.q_len, self.index_dim) * self.peak
        self.index_keys = normal(batch, index_rows, length, self.index_dim)

        def store(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            # NaN where nothing is stored: whoever reads it shows
            empty = torch.empty(*shape, dtype=dtype, device=self.device)
            return empty.fill_(float("nan")) if dtype.is_floating_point else empty.fill_(77)

        full, local = len(with_retrieval), len(others)
        full_dtype = self.dtype if self.kv is None else KV_DTYPES[self.kv]
        self.full_key = store(batch, full, capacity, self.head_dim, dtype=full_dtype)
        self.full_value = store(batch, full, capacity, self.head_dim, dtype=full_dtype)
        self.key_scale = self.value_scale = None
        if self.kv is not None:
            self.key_scale = store(batch, full, capacity, dtype=torch.float16)
            self.value_scale = store(batch, full, capacity, dtype=torch.float16)
        self.window_key = store(batch, local, self.num_sinks + ring, self.head_dim)
        self.window_value = store(batch, local, self.num_sinks + ring, self.head_dim)
        index_dtype = torch.int8 if self.int8 else self.dtype
        self.index_key = store(batch, index_rows, capacity, self.index_dim, dtype=index_dtype)
        self.index_scale = store(batch, index_rows, capacity) if self.int8 else None
        self.length_tensor = torch.tensor([length], dtype=torch.int32, device=self.device)

    def stores(self) -> tuple[torch.Tensor, ...]:
        return (self.full_key, self.full_value, self.index_key, self.window_key, self.window_value)

    def scales(self) -> dict[str, torch.Tensor | None]:
        return {"key_scale": self.key_scale, "value_scale": self.value_scale}

    def as_stored(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values `[B, Hkv, N, D]` as the stores give them back."""
        if self.kv is None:
            return states
        in_full = torch.tensor([slot >= 0 for slot in self.full_slot], device=self.device)[:, None, None]
        return torch.where(in_full, rounded_kv(states, KV_DTYPES[self.kv]), states)

    def step_inputs(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = slice(first, last)
        return self.key[:, :, rows], self.value[:, :, rows], self.index_keys[:, :, rows]

    def fill(self, append=append_step_reference, *, until: int | None = None, step: int | None = None) -> None:
        """Append the sequence in steps of `step` tokens (default: the step's own length)."""
        step = step or self.q_len
        until = self.length if until is None else until
        first = 0
        while first < until:
            last = min(first + step, until)
            append(
                *self.step_inputs(first, last),
                *self.stores(),
                full_slot=self.full_slot,
                window_slot=self.window_slot,
                length=torch.tensor([last], dtype=torch.int32, device=self.device),
                start=self.start,
                num_sinks=self.num_sinks,
                index_scale=self.index_scale,
                **self.scales(),
            )
            first = last

    def select_arguments(self, **changes) -> dict:
        return {
            "index_heads": self.index_heads,
            "length": self.length_tensor,
            "start": self.start,
            "top_p": 0.9,
            "min_tokens": 0,
            "block_size": 1,
            "index_scale": self.index_scale,
        } | changes

    def attend_arguments(self, **changes) -> dict:
        return {
            "retrieval_heads": self.retrieval_heads,
            "full_slot": self.full_slot,
            "window_slot": self.window_slot,
            "length": self.length_tensor,
            "start": self.start,
            "window": self.window,
            "num_sinks": self.num_sinks,
            "block_size": 1,
            "scale": self.head_dim**-0.5,
            "out": self.empty_output(),
            **self.scales(),
        } | changes

    def empty_output(self) -> torch.Tensor:
        heads = self.kv_heads * self.groups
        shape = (self.batch, self.q_len, heads, self.head_dim)
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def q_slots(self) -> torch.Tensor:
        return torch.arange(self.length - self.q_len, self.length, device=self.device)

    def real_rows(self) -> torch.Tensor:
        """bool `[B, M]`: query rows that are not padding."""
        first = torch.zeros(self.batch, 1, device=self.device) if self.start is None else self.start[:, None]
        return self.q_slots() >= first

    def oracle(
        self,
        *,
        top_p: float = 0.9,
        min_tokens: int = 0,
        block_size: int = 1,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The whole step from the sequence itself, by the references of the prefill, in fp32."""
        heads = self.kv_heads * self.groups
        out = self.empty_output().float()
        key, value = self.as_stored(self.key), self.as_stored(self.value)
        common = {"scale": self.head_dim**-0.5, "out": out, "start": self.start}
        common |= {"softcap": softcap, "sink_logits": sink_logits}
        local = torch.tensor(
            [h for h in range(heads) if h not in self.retrieval_heads], dtype=torch.long, device=self.device
        )
        if local.numel():
            sink_window_attention_reference(
                self.query,
                key,
                value,
                heads=local,
                kv_heads=local // self.groups,
                window=self.window,
                num_sinks=self.num_sinks,
                q_start=self.length - self.q_len,
                **common,
            )
        if self.retrieval_heads:
            chosen = torch.tensor(self.retrieval_heads, device=self.device)
            indexed_attention_reference(
                self.query,
                key,
                value,
                self.index_query,
                self.index_keys,
                heads=chosen,
                kv_heads=chosen // self.groups,
                index_heads=torch.tensor(self.index_heads, device=self.device),
                top_p=top_p,
                min_tokens=min_tokens,
                block_size=block_size,
                q_slots=self.q_slots(),
                **common,
            )
        return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """`||out - expected|| / ||expected||`; NaN and inf in `out` give inf."""
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
