"""Scratch memory of a decode step, allocated once by the cache and used by every layer in turn."""

from __future__ import annotations

from functools import lru_cache

import torch

HISTOGRAM_BINS = 256
# the steps of a row's histogram, and where step 0 is: a multiple of HISTOGRAM_BINS, as is their number. The counts of a
# program take 11 KiB of shared memory; with what the compiler takes they must stay within 48 KiB
HISTOGRAM_SPAN, HISTOGRAM_ZERO = 2816, 1280
MIN_TILE_KEYS = 128


@lru_cache(maxsize=4096)
def head_table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The int32 device copy of a head table known at model build; made once for each device."""
    return torch.tensor(values or (0,), dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 for the interpreter on a CPU, so that splits are exercised."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


class DecodeWorkspace:
    """Buffers of `select_top_p` and `decode_attention` for one stream of decode steps.

    Layers run one after the other, so one workspace serves all of them; steps that run at the same time (several
    streams) need one each. Nothing is allocated or cleared between steps: safe in CUDA graphs. A `Selection` made
    with a workspace lives in it, until the next one.

    Args:
        batch: B. retrieval_heads: the most that one layer has. queries: the most query rows a step has (M).
        capacity: slots of the largest cache. query_heads: Hq. kv_heads: Hkv. head_dim: D.
        block_size: of the selection. device: of the cache.

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(
        self,
        *,
        batch: int,
        retrieval_heads: int,
        queries: int,
        capacity: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device | str,
    ) -> None:
        sizes = {"batch": batch, "queries": queries, "capacity": capacity, "query_heads": query_heads}
        sizes |= {"kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DecodeWorkspace: {name} must be at least 1, got {size}")
        device = torch.device(device)
        rows = batch * max(retrieval_heads, 1) * queries
        units = -(-capacity // block_size)
        self.ctas = 4 * num_processors(device)
        self.rows = rows
        self.items = rows + batch * kv_heads
        self.tile_rows = tile_rows(query_heads // kv_heads, queries)
        self.head_dim = head_dim
        self.indices = torch.zeros(rows * units, dtype=torch.int32, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        # one for each MIN_TILE_KEYS keys, the last of them partial
        self.tiles = capacity // MIN_TILE_KEYS + 1
        # rows of a multiple of 16; a few of the last may be read past their end
        self.codes = torch.empty(rows * (units + 16) + 16, dtype=torch.uint8, device=device)
        self.tile_max = torch.empty(rows * self.tiles, dtype=torch.int32, device=device)
        splits = max(rows, self.ctas)
        self.histogram = torch.zeros(rows * 2 * HISTOGRAM_SPAN, dtype=torch.int32, device=device)
        self.sums = torch.empty(splits * HISTOGRAM_BINS, dtype=torch.int32, device=device)
        self.peak = torch.empty(splits, dtype=torch.int32, device=device)
        self.state = torch.zeros(rows * 2, dtype=torch.int32, device=device)
        slots = 4 * self.ctas * self.tile_rows
        self.partial = torch.empty(slots * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(slots * 2, dtype=torch.float32, device=device)

    def buffers(self) -> list[torch.Tensor]:
        """Every tensor, in the order of `BUFFERS`."""
        return [getattr(self, name) for name in BUFFERS]

    def sizes(self) -> list[int]:
        """The numbers that are no tensor's size, in the order of `SIZES`."""
        return [getattr(self, name) for name in SIZES]

    @classmethod
    def from_buffers(cls, buffers: list[torch.Tensor], sizes: list[int]) -> DecodeWorkspace:
        """The workspace that `buffers()` and `sizes()` describe; it shares the memory."""
        workspace = cls.__new__(cls)
        for name, value in zip((*BUFFERS, *SIZES), (*buffers, *sizes), strict=True):
            setattr(workspace, name, value)
        return workspace


SIZES = ("ctas", "rows", "items", "tile_rows", "head_dim", "tiles")
BUFFERS = (
    "indices",
    "counts",
    "codes",
    "tile_max",
    "histogram",
    "sums",
    "peak",
    "state",
    "partial",
    "stats",
)


def tile_rows(group: int, queries: int) -> int:
    """Rows of a query tile: a whole GQA group times the step's queries, a power of two from 8 on."""
    rows = 8
    while rows < group * queries:
        rows *= 2
    return rows
