"""The decode operations as `torch.library` custom operators, for torch.compile.

Eager callers go straight to the launches of `append.py`, `score_select.py` and `decode.py`. Under torch.compile, which
cannot look into those, `compiled_decode_step` calls one operator that writes the stores, the workspace and `out`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .workspace import DecodeWorkspace

# set by decode.py, which imports this file: what the operator runs
_eager_step: Callable[..., torch.Tensor] | None = None


def set_eager_step(step: Callable[..., torch.Tensor]) -> None:
    """Name the eager function behind the operator."""
    global _eager_step
    _eager_step = step


@torch.library.custom_op(
    "rtpurbo::decode_step",
    mutates_args=(
        "full_key",
        "full_value",
        "index_key",
        "window_key",
        "window_value",
        "index_scale",
        "key_scale",
        "value_scale",
        "out",
        "buffers",
    ),
)
def _decode_step_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index_query: torch.Tensor | None,
    index_key_new: torch.Tensor | None,
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    index_key: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    index_scale: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    out: torch.Tensor,
    buffers: list[torch.Tensor],
    sizes: list[int],
    retrieval_heads: list[int],
    index_heads: list[int],
    full_slot: list[int],
    window_slot: list[int],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    window: int,
    num_sinks: int,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    backend: str,
) -> None:
    assert _eager_step is not None
    _eager_step(
        query,
        key,
        value,
        index_query,
        index_key_new,
        full_key,
        full_value,
        index_key,
        window_key,
        window_value,
        retrieval_heads=tuple(retrieval_heads),
        index_heads=tuple(index_heads),
        full_slot=tuple(full_slot),
        window_slot=tuple(window_slot),
        length=length,
        start=start,
        top_p=top_p,
        min_tokens=min_tokens,
        block_size=block_size,
        window=window,
        num_sinks=num_sinks,
        scale=scale,
        out=out,
        softcap=softcap,
        sink_logits=sink_logits,
        index_scale=index_scale,
        key_scale=key_scale,
        value_scale=value_scale,
        workspace=DecodeWorkspace.from_buffers(buffers, sizes) if buffers else None,
        backend=backend,
    )


@_decode_step_op.register_fake
def _(*arguments: object, **keywords: object) -> None:
    return None


def compiled_decode_step(
    *tensors: torch.Tensor | None,
    retrieval_heads: tuple[int, ...],
    index_heads: tuple[int, ...],
    full_slot: tuple[int, ...],
    window_slot: tuple[int, ...],
    length: torch.Tensor,
    start: torch.Tensor | None,
    top_p: float,
    min_tokens: int,
    block_size: int,
    window: int,
    num_sinks: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    index_scale: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    workspace: DecodeWorkspace | None,
    backend: str,
) -> torch.Tensor:
    """`decode_step` as one operator of the graph; the arguments are those of `decode_step`, in its order."""
    _decode_step_op(
        *tensors,
        index_scale,
        key_scale,
        value_scale,
        out,
        [] if workspace is None else workspace.buffers(),
        [] if workspace is None else workspace.sizes(),
        list(retrieval_heads),
        list(index_heads),
        list(full_slot),
        list(window_slot),
        length,
        start,
        top_p,
        min_tokens,
        block_size,
        window,
        num_sinks,
        scale,
        softcap,
        sink_logits,
        backend,
    )
    return out
