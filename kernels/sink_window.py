"""Sink + window attention for a subset of query heads (local heads; PAPER section 1).

A query at logical position m sees the key at n iff `n <= m` and (`m - n < window` or `n < num_sinks`):

    out_h(m) = sum_n softmax_n(scale * q_h(m) . k(n)) v(n)      over the n it sees

Two key ranges are read: the sinks, and one contiguous run of keys. With `num_sinks=0` it is plain sliding
window attention, with `window >= length` dense causal attention. Not for single decode steps over the cache's
ring buffer: that is `decode.py`.

Here are the contract and the wrapper; the forms are `sink_window_triton.py` and `sink_window_hopper.py` for GPUs,
`sink_window_sdpa.py` for CPUs, and `window_gradient.py` for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .attention_inputs import check_attention_inputs, host_list
from .common import index_tensor, masked_softmax, row_tiles, soft_cap, starts, use_triton
from .custom_op import define_op, needs_grad
from .sink_window_hopper import hopper_fits, run_hopper
from .sink_window_rule import SinkWindow, gather_sinks
from .sink_window_sdpa import sink_window_attention_sdpa
from .sink_window_triton import run_portable
from .window_gradient import gradient_kernels_fit, window_attention_with_gradient


def sink_window_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    kv_start: int = 0,
    start: torch.Tensor | None = None,
    sink_key: torch.Tensor | None = None,
    sink_value: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `sink_window_attention`, in fp32, one tile of rows at a time."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    if sink_key is None:
        sink_key, sink_value = gather_sinks(key, value, num_sinks=num_sinks, start=start)
    sink_key, sink_value = sink_key[:, kv_heads].float(), sink_value[:, kv_heads].float()
    sink_pos = torch.arange(sink_key.shape[2], device=device)
    width = heads.numel() * batch * min(window + 256, kv_len)
    for rows in row_tiles(q_len, width):
        low = max(q_start + rows.start - window + 1 - kv_start, 0)
        high = min(q_start + rows.stop - kv_start, kv_len)
        q = query[:, heads, rows].float()
        k = torch.cat([sink_key, key[:, kv_heads, low:high].float()], 2)
        v = torch.cat([sink_value, value[:, kv_heads, low:high].float()], 2)
        # [B, rows], [B, keys]: logical positions
        q_pos = torch.arange(q_start + rows.start, q_start + rows.stop, device=device) - first_slot[:, None]
        k_pos = torch.arange(kv_start + low, kv_start + high, device=device) - first_slot[:, None]
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        in_window = (distance >= 0) & (distance < window) & (k_pos >= num_sinks)[:, None, :]
        in_sinks = q_pos[:, :, None] >= sink_pos
        mask = torch.cat([in_sinks, in_window], -1)[:, None]
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        logits = None if sink_logits is None else sink_logits[heads]
        tile = torch.matmul(masked_softmax(scores, mask, sink_logits=logits), v)
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


def _run_sink_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor | None,
    kv_heads: torch.Tensor | None,
    head_list: list[int],
    kv_head_list: list[int],
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int,
    kv_start: int,
    start: torch.Tensor | None,
    sink_key: torch.Tensor | None,
    sink_value: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> None:
    if heads is None or kv_heads is None:
        heads = index_tensor(tuple(head_list), query.device)
        kv_heads = index_tensor(tuple(kv_head_list), query.device)
    if query.numel() == 0 or heads.numel() == 0:
        return
    # a window beyond every slot is no window; this keeps slot arithmetic inside 32 bits
    window = min(window, 1 << 30)
    rule = SinkWindow(window, num_sinks, scale, q_start, kv_start, start, sink_key, sink_value, softcap, sink_logits)
    on_hopper = q_start + query.shape[2] > kv_start and hopper_fits(query, key, value, rule)
    with torch.cuda.device_of(query):
        (run_hopper if on_hopper else run_portable)(query, key, value, out, heads, kv_heads, rule)


_sink_window_op = define_op(
    "sink_window_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? heads, Tensor? kv_heads, int[] head_list, "
    "int[] kv_head_list, SymInt window, SymInt num_sinks, float scale, Tensor(a!) out, SymInt q_start, "
    "SymInt kv_start, Tensor? start, Tensor? sink_key, Tensor? sink_value, float? softcap, "
    "Tensor? sink_logits) -> ()",
    _run_sink_window,
)


def sink_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    kv_start: int = 0,
    start: torch.Tensor | None = None,
    sink_key: torch.Tensor | None = None,
    sink_value: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sinks + sliding window for the listed query heads, written to their places in `out` (PAPER section 1).

    Args:
        query: `[B, Hq, M, D]`, rotated; row m is slot `q_start + m`.
        key, value: `[B, Hkv, N, D]`, rotated; row n is slot `kv_start + n`. Any strides, unit stride on D.
        heads, kv_heads: `n` query heads and the row of `key` that each reads: int64 tensors on the device of
            `query`, or tuples of ints (copied to the device once and kept: call once before a graph capture).
        window: keys in sight, the query itself counted. num_sinks: first real tokens, always in sight.
        scale: softmax scale, > 0.
        out: `[B, M, Hq, D]`; the listed heads are written, others left alone. Rows that see nothing give 0.
        start: int `[B]`, slot of each row's first real token (left padding); None: no padding.
        sink_key, sink_value: `[B, Hkv, S <= num_sinks, D]`, the sinks kept apart. `key` may then start
            anywhere, and only its keys of logical position >= num_sinks count. Without them `kv_start` is 0.
        softcap: scores become `softcap * tanh(score / softcap)`. sink_logits: `[Hq]`, learned sinks.
        backend: `"auto"` (Triton for half precision on CUDA), `"triton"` or `"reference"`.

    Differentiable in memory linear in the length: whole sequences through `window_gradient.py` where Triton serves and
    for a soft-cap or learned sinks, all else in tiles of `scaled_dot_product_attention`, as on CPUs.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, a window < 1, a scale <= 0, or heads out of range.
    """
    check_attention_inputs(query, key, value, heads, kv_heads, out, start, sink_logits)
    rule = SinkWindow(window, num_sinks, scale, q_start, kv_start, start, sink_key, sink_value, softcap, sink_logits)
    rule.check()
    grad = needs_grad(query, key, value, sink_key, sink_value, sink_logits, out)
    on_triton = use_triton(backend, query)
    fused = on_triton and gradient_kernels_fit(query, num_sinks)
    whole = q_start == kv_start == 0 and key.shape[2] == query.shape[2] and not rule.apart
    if grad and whole and (fused or (rule.special and backend == "auto")):
        return window_attention_with_gradient(
            query, key, value, heads=heads, kv_heads=kv_heads, window=window, num_sinks=num_sinks, scale=scale, out=out,
            start=start, softcap=softcap, sink_logits=sink_logits, fused=fused,
            attend=partial(sink_window_attention, backend=backend),
        )  # fmt: skip
    if on_triton and query.shape[3] <= 256 and not grad:
        listed = isinstance(heads, torch.Tensor)
        on_device = (heads, kv_heads, [], []) if listed else (None, None, list(heads), list(kv_heads))
        _sink_window_op(
            query, key, value, *on_device, window, num_sinks, scale, out, q_start, kv_start, start, sink_key,
            sink_value, softcap, sink_logits,
        )  # fmt: skip
        return out
    if backend == "auto" and not rule.special:
        if not rule.apart:
            sink_key, sink_value = gather_sinks(key, value, num_sinks=num_sinks, start=start)
            rule = rule._replace(sink_key=sink_key, sink_value=sink_value)
        return sink_window_attention_sdpa(query, key, value, out, host_list(heads), host_list(kv_heads), rule)
    if not isinstance(heads, torch.Tensor):
        heads, kv_heads = (index_tensor(tuple(listed), query.device) for listed in (heads, kv_heads))
    return sink_window_attention_reference(query, key, value, heads=heads, kv_heads=kv_heads, out=out, **rule._asdict())
