"""Scratch memory of a decode step, allocated once by the cache and used by every layer in turn."""

from __future__ import annotations

from functools import lru_cache

import torch

HISTOGRAM_BINS = 256
MAX_SPLITS = 512


@lru_cache(maxsize=4096)
def head_table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The int32 device copy of a head table known at model build; made once for each device."""
    return torch.tensor(values or (0,), dtype=torch.int32, device=device)


class DecodeWorkspace:
    """Buffers of `select_top_p` and `decode_attention` for one stream of decode steps.

    Layers run one after the other, so one workspace serves all of them; steps that run at the same time (several
    streams) need one each. Nothing is allocated or cleared between steps: safe in CUDA graphs.

    Args:
        batch: B. retrieval_heads: the most that one layer has. queries: the most query rows a step has (M).
        capacity: slots of the largest cache. query_heads: Hq. head_dim: D. block_size: of the selection.
        device: of the cache.

    Raises:
        ValueError: a size that is not positive, or a step that does not fit (from the operations).
    """

    def __init__(
        self,
        *,
        batch: int,
        retrieval_heads: int,
        queries: int,
        capacity: int,
        query_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device | str,
    ) -> None:
        sizes = {"batch": batch, "queries": queries, "capacity": capacity, "query_heads": query_heads}
        sizes |= {"head_dim": head_dim, "block_size": block_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DecodeWorkspace: {name} must be at least 1, got {size}")
        self.batch, self.retrieval_heads, self.queries = batch, retrieval_heads, queries
        self.capacity, self.query_heads, self.head_dim = capacity, query_heads, head_dim
        self.block_size = block_size
