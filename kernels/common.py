"""What every operation shares: the Triton switch, row tiles, and the masked softmax of the references.

Slots and positions. A *slot* is an index into the sequence axis as stored, left padding included. `start[b]` is the
slot of row b's first real token, so the *logical position* of a slot is `slot - start[b]`; padding has negative
positions and is never attended to. `start=None` means no padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = None
    tl = None
    HAS_TRITON = False

BACKENDS = ("auto", "triton", "reference")


def use_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Whether `backend` means the Triton kernels for `tensor` (`"auto"`: half precision on a CUDA device).

    Raises:
        ValueError: unknown backend.
        RuntimeError: `"triton"` was asked for and Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError("attention_backend='triton' needs the package triton; install it or use 'auto'")
    if backend == "auto":
        return HAS_TRITON and tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)
    return backend == "triton"


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up. (`triton.cdiv` is for kernels too, which makes it slow on the host.)"""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two from `number` (at least 1) on; `triton.next_power_of_2` is slow on the host."""
    return 1 << (number - 1).bit_length()


def row_tiles(num_rows: int, width: int, *, budget: int = 1 << 24) -> Iterator[slice]:
    """Slices of query rows such that one tile of scores holds at most `budget` numbers (`width` a row)."""
    step = max(1, min(num_rows, budget // max(width, 1)))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def starts(start: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
    """`start` as an int64 tensor `[B]`; zeros when there is no padding."""
    if start is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return start.to(device=device, dtype=torch.long)


def soft_cap(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(
    scores: torch.Tensor, mask: torch.Tensor, *, sink_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax over the last axis restricted to `mask`; rows with nothing to see give zeros, not NaN.

    Args:
        scores: fp32 `[B, H, M, N]`.
        mask: bool, broadcastable to `scores`.
        sink_logits: learned sink logits `[H]` (GPT-OSS): one more column in the denominator, with no value.
    """
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    if sink_logits is not None:
        column = sink_logits.float().view(1, -1, 1, 1)
        top = torch.maximum(top, column.detach())
    top = top.clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(column - top)
    return weights / total.clamp_min(torch.finfo(torch.float32).tiny)


@lru_cache(maxsize=4096)
def index_tensor(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The int64 tensor of a head list on `device`, made once: copying it at each call would stall the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.long, device=device)
