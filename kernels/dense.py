"""Dense causal attention for a subset of query heads (retrieval heads at prefill; PAPER section 1).

    out_h(m) = sum_{n <= m} softmax_n(scale * q_h(m) . k(n)) v(n)

No kernel of its own: the work goes to the fastest of what is installed (FlashAttention 3 or 4, cuDNN,
FlashAttention 2 through `scaled_dot_product_attention`). What no library does (left padding, learned sinks,
soft-cap, chunks without FlashAttention 3) goes to the sink + window kernel, which is dense attention once its
window covers everything.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_inputs import check_attention_inputs, host_list
from .common import index_tensor, masked_softmax, row_tiles, soft_cap, starts, use_triton
from .custom_op import define_op, needs_grad
from .sink_window import sink_window_attention

logger = logging.getLogger(__name__)

FLASH_MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute")


def dense_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `dense_attention`, in fp32, one tile of rows at a time."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(kv_len, device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * kv_len):
        high = min(q_start + rows.stop, kv_len)
        q_slots = torch.arange(q_start + rows.start, q_start + rows.stop, device=device)
        # [B, 1, rows, keys]
        mask = (slots[:high] <= q_slots[:, None]) & (slots[:high] >= first_slot[:, None, None])
        q, k = query[:, heads, rows].float(), key[:, kv_heads, :high].float()
        scores = soft_cap(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
        logits = None if sink_logits is None else sink_logits[heads]
        weights = masked_softmax(scores, mask[:, None], sink_logits=logits)
        tile = torch.matmul(weights, value[:, kv_heads, :high].float())
        out[:, rows, heads] = tile.transpose(1, 2).to(out.dtype)
    return out


@dataclass(frozen=True)
class HeadGroup:
    """Query heads that one library call serves: the same number of them, in order, for each of `kv_heads`."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


@lru_cache(maxsize=4096)
def head_groups(heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> tuple[HeadGroup, ...]:
    """As few calls as possible without copying K or V: KV heads of equal count at one stride go together."""
    readers: dict[int, list[int]] = {}
    for head, kv_head in zip(heads, kv_heads, strict=True):
        readers.setdefault(kv_head, []).append(head)
    groups = []
    for count in sorted({len(listed) for listed in readers.values()}, reverse=True):
        rows = sorted(row for row, listed in readers.items() if len(listed) == count)
        while rows:
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            run = [rows[0]]
            while run[-1] + step in rows:
                run.append(run[-1] + step)
            rows = [row for row in rows if row not in run]
            groups.append(HeadGroup(tuple(head for row in run for head in readers[row]), tuple(run)))
    return tuple(groups)


def _as_slice(indices: tuple[int, ...]) -> slice | None:
    """The slice that picks `indices`, or None if no slice does."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step < 1 or any(b - a != step for a, b in pairwise(indices)):
        return None
    return slice(indices[0], indices[-1] + 1, step)


@lru_cache(maxsize=1)
def flash_function() -> Callable[..., torch.Tensor] | None:
    """`flash_attn_func` of the first importable FlashAttention 3 or 4 package, or None."""
    for name in FLASH_MODULES:
        try:
            return importlib.import_module(name).flash_attn_func
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            logger.warning("%s is installed but cannot be used: %s", name, error)
    return None


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    flash = flash_function()
    assert flash is not None
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = flash(query, key, value, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    order: Sequence[SDPBackend] | None = None,
) -> torch.Tensor:
    kwargs = {"is_causal": True, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if order is None:
        out = F.scaled_dot_product_attention(query, key, value, **kwargs)
    else:
        with sdpa_kernel(list(order), set_priority=True):
            out = F.scaled_dot_product_attention(query, key, value, **kwargs)
    return out.transpose(1, 2)


_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def choose_path(query: torch.Tensor, *, chunked: bool, special: bool) -> str:
    """`"flash"`, `"cudnn"`, `"sdpa"` or `"triton"`: the fastest measured path present that can do the case.

    `chunked`: earlier keys come before the first query. `special`: padding, soft-cap or learned sinks.
    """
    if special:
        return "triton"
    major = torch.cuda.get_device_capability(query.device)[0]
    hopper = major == 9
    # H200, bf16, 5 heads of 32: under 16K rows one launch of ours beats several library calls; cuDNN never wins
    if query.dtype == torch.bfloat16 and flash_function() is not None and major >= 9:
        return "triton" if hopper and query.shape[2] < 16_384 else "flash"
    if chunked or hopper:
        return "triton"
    return "cudnn" if major > 9 else "sdpa"


def _attend_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    out: torch.Tensor,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    for group in head_groups(heads, kv_heads):
        rows, picked = _as_slice(group.kv_heads), _as_slice(group.heads)
        assert rows is not None
        if picked is not None:
            out[:, :, picked] = attend(query[:, picked], key[:, rows], value[:, rows])
        else:
            index = index_tensor(group.heads, query.device)
            result = attend(query.index_select(1, index), key[:, rows], value[:, rows])
            out.index_copy_(2, index, result.to(out.dtype))


def _run_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: list[int],
    kv_heads: list[int],
    scale: float,
    out: torch.Tensor,
    q_start: int,
    start: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> None:
    special = start is not None or softcap is not None or sink_logits is not None
    path = choose_path(query, chunked=q_start > 0, special=special)
    if path == "triton":
        sink_window_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, window=key.shape[2], num_sinks=0, scale=scale, out=out,
            q_start=q_start, start=start, softcap=softcap, sink_logits=sink_logits, backend="triton",
        )  # fmt: skip
        return
    if path == "flash":
        attend = partial(_flash, scale=scale)
    else:
        attend = partial(_sdpa, scale=scale, order=_CUDNN_FIRST if path == "cudnn" else _FLASH_FIRST)
    _attend_groups(query, key, value, tuple(heads), tuple(kv_heads), out, attend)


_dense_op = define_op(
    "dense_attention",
    "(Tensor query, Tensor key, Tensor value, int[] heads, int[] kv_heads, float scale, Tensor(a!) out, "
    "SymInt q_start, Tensor? start, float? softcap, Tensor? sink_logits) -> ()",
    _run_dense,
)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: torch.Tensor | Sequence[int],
    kv_heads: torch.Tensor | Sequence[int],
    scale: float,
    out: torch.Tensor,
    q_start: int = 0,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Dense causal attention of the listed query heads, written to their places in `out` (PAPER section 1).

    Args:
        query: `[B, Hq, M, D]`, rotated; row m is slot `q_start + m`.
        key, value: `[B, Hkv, N, D]`, rotated; row n is slot n, and N >= q_start + M (chunked prefill: N > M).
        heads, kv_heads: `n` query heads and the row of `key` that each reads: tuples of ints or int64 tensors.
            Libraries need them on the host: device tensors keep to the Triton kernel, so as not to synchronise.
        scale: softmax scale, > 0. out: `[B, M, Hq, D]`; the listed heads are written, others left alone.
        start: int `[B]`, slot of each row's first real token (left padding); rows on padding give 0.
        softcap: scores become `softcap * tanh(score / softcap)`. sink_logits: `[Hq]`, learned sinks.
        backend: `"auto"` (see `choose_path`), `"triton"` (the sink + window kernel) or `"reference"`.

    Differentiable wherever a gradient is asked for: through `scaled_dot_product_attention` for whole, unpadded,
    plain sequences, else as `sink_window_attention` with a window over everything. K and V are never copied.

    Returns:
        `out`.

    Raises:
        ValueError: shapes that do not fit, a scale <= 0, heads out of range, or queries beyond the last key.
    """
    check_attention_inputs(query, key, value, heads, kv_heads, out, start, sink_logits)
    q_len, end = query.shape[2], q_start + query.shape[2]
    if scale <= 0 or q_start < 0 or end > key.shape[2]:
        given = f"scale={scale}, q_start={q_start}, {q_len} queries and {key.shape[2]} keys"
        raise ValueError(f"expected scale > 0 and 0 <= q_start <= keys - queries, got {given}")
    key, value = key[:, :, :end], value[:, :, :end]
    options = {"scale": scale, "out": out, "q_start": q_start, "start": start}
    options |= {"softcap": softcap, "sink_logits": sink_logits}
    grad = needs_grad(query, key, value, sink_logits, out)
    special = start is not None or softcap is not None or sink_logits is not None
    on_host = not isinstance(heads, torch.Tensor) or not heads.is_cuda
    fused = use_triton(backend, query) and query.shape[3] <= 256 and not grad
    if fused and backend == "auto" and on_host:
        listed, rows = list(host_list(heads)), list(host_list(kv_heads))
        _dense_op(query, key, value, listed, rows, scale, out, q_start, start, softcap, sink_logits)
        return out
    if not fused and backend != "reference" and on_host and not special and q_start == 0:
        listed, rows = host_list(heads), host_list(kv_heads)
        _attend_groups(query, key, value, listed, rows, out, partial(_sdpa, scale=scale))
        return out
    if fused or (grad and backend != "reference"):
        return sink_window_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, window=end, num_sinks=0,
            backend="triton" if fused else backend, **options,
        )  # fmt: skip
    if not isinstance(heads, torch.Tensor):
        heads, kv_heads = (index_tensor(tuple(listed), query.device) for listed in (heads, kv_heads))
    return dense_attention_reference(query, key, value, heads=heads, kv_heads=kv_heads, **options)
