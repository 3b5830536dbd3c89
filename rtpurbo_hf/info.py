"""What a checkpoint holds and what its cache will take, from its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedConfig

from .modeling.cache_rtpurbo import full_row_bytes, predicted_nbytes
from .modeling.configuration_rtpurbo import RTPurboConfig
from .modeling.families_rtpurbo import full_attention_layers, head_counts
from .modeling.plan_rtpurbo import HeadPlan


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts of an RTPurbo checkpoint.

    Attributes:
        base_model, base_family: what it was made from.
        layers, converted_layers: of the base, and how many of them attend the RTPurbo way.
        query_heads, retrieval_heads: in the converted layers, and how many of them retrieve.
        kv_heads, freeable_kv_heads: in the converted layers, and how many of them keep a window only. A KV head is
            freeable when all its query heads are local.
        index_parameters: weights of all indexers.
        kv_cache_dtype: of keys and values in the full part: "auto" (the model's), "int8" or "fp8".
        context: the length that the bytes below are for, batch 1.
        kv_bytes: by kind (`full`, `index`, `window`, `total`) of the converted layers, as the cache allocates them.
        kv_bytes_dense: of a dense cache of the same layers.
        kv_bytes_per_1k_tokens, kv_bytes_per_1k_tokens_dense: growth with the context beyond the window.
    """

    base_model: str | None
    base_family: str
    layers: int
    converted_layers: int
    query_heads: int
    retrieval_heads: int
    kv_heads: int
    freeable_kv_heads: int
    index_parameters: int
    kv_cache_dtype: str
    context: int
    kv_bytes: dict[str, int]
    kv_bytes_dense: int
    kv_bytes_per_1k_tokens: int
    kv_bytes_per_1k_tokens_dense: int

    def to_dict(self) -> dict:
        return asdict(self)


def head_plans(config: RTPurboConfig) -> dict[int, HeadPlan]:
    """The head plan of each converted layer."""
    size = head_counts(config)
    heads = config.retrieval_heads or [[]] * config.get_text_config(decoder=True).num_hidden_layers
    return {
        layer: HeadPlan(*size, tuple(heads[layer]), True, config.index_key_sharing)
        for layer in full_attention_layers(config.base_config)
    }


def checkpoint_info(
    config: RTPurboConfig, *, context: int = 131072, dtype: torch.dtype = torch.bfloat16
) -> CheckpointInfo:
    """Count what `config` describes.

    Args:
        config: of an RTPurbo checkpoint.
        context: tokens in the cache, for the byte counts.
        dtype: of keys and values that are not quantised (index keys always take two bytes a number).

    Raises:
        ValueError: `context` below 1.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    if not isinstance(config.base_config, PreTrainedConfig):
        raise ValueError("the config names no base model: it is no RTPurbo checkpoint's")
    plans = head_plans(config)
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {"window": config.sliding_window, "num_sinks": config.num_sink_tokens, "index_dim": config.index_dim}
    stored = config.kv_cache_dtype
    kv_bytes = {"full": 0, "index": 0, "window": 0}
    for plan in plans.values():
        options = {**sizes, "head_dim": head_dim, "itemsize": dtype.itemsize, "kv_cache_dtype": stored}
        for kind, size in predicted_nbytes(plan, batch=1, length=context, **options).items():
            kv_bytes[kind] += size
    kv_heads = sum(plan.num_kv_heads for plan in plans.values())
    row, full_row = 2 * head_dim * dtype.itemsize, full_row_bytes(head_dim, dtype.itemsize, stored)
    full = sum(len(plan.full_kv) for plan in plans.values())
    index_rows = sum(len(plan.index_key_kv) for plan in plans.values())
    retrieval = sum(len(plan.retrieval) for plan in plans.values())
    return CheckpointInfo(
        base_model=config.base_model_name_or_path,
        base_family=config.base_config.model_type,
        layers=text.num_hidden_layers,
        converted_layers=len(plans),
        query_heads=sum(plan.num_heads for plan in plans.values()),
        retrieval_heads=retrieval,
        kv_heads=kv_heads,
        freeable_kv_heads=kv_heads - full,
        index_parameters=(retrieval + index_rows) * config.index_dim * head_dim,
        kv_cache_dtype=stored,
        context=context,
        kv_bytes={**kv_bytes, "total": sum(kv_bytes.values())},
        kv_bytes_dense=kv_heads * row * context,
        kv_bytes_per_1k_tokens=1024 * (full * full_row + index_rows * config.index_dim * 2),
        kv_bytes_per_1k_tokens_dense=1024 * kv_heads * row,
    )
