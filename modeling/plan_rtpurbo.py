"""Which query head of a layer does what, and where its keys and values are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class HeadPlan:
    """The partition of one layer's heads.

    Args:
        num_heads: query heads of the layer.
        num_kv_heads: KV heads of the layer.
        retrieval: query heads that keep the whole context, ascending; the others are local.
        indexed: whether retrieval heads select by an index (else they attend to everything).
        key_sharing: `"head"` or `"kv_head"`: who has an index key of its own.
    """

    num_heads: int
    num_kv_heads: int
    retrieval: tuple[int, ...]
    indexed: bool = True
    key_sharing: str = "head"

    def kv_head(self, head: int) -> int:
        return head * self.num_kv_heads // self.num_heads

    @cached_property
    def whole(self) -> HeadPlan:
        """The plan of the dense base: every head sees everything."""
        return HeadPlan(self.num_heads, self.num_kv_heads, tuple(range(self.num_heads)), False)

    @cached_property
    def local(self) -> tuple[int, ...]:
        return tuple(h for h in range(self.num_heads) if h not in self.retrieval)

    @cached_property
    def full_kv(self) -> tuple[int, ...]:
        """KV heads that keep every token: they serve at least one retrieval head."""
        return tuple(sorted({self.kv_head(h) for h in self.retrieval}))

    @cached_property
    def window_kv(self) -> tuple[int, ...]:
        """KV heads that keep sinks and window only."""
        return tuple(k for k in range(self.num_kv_heads) if k not in self.full_kv)

    @cached_property
    def full_slot(self) -> tuple[int, ...]:
        """Per KV head, its row in the full store, or -1."""
        return tuple(self.full_kv.index(k) if k in self.full_kv else -1 for k in range(self.num_kv_heads))

    @cached_property
    def window_slot(self) -> tuple[int, ...]:
        """Per KV head, its row in the window store, or -1."""
        return tuple(self.window_kv.index(k) if k in self.window_kv else -1 for k in range(self.num_kv_heads))

    @cached_property
    def retrieval_kv(self) -> tuple[int, ...]:
        """Per retrieval head, its KV head."""
        return tuple(self.kv_head(h) for h in self.retrieval)

    @cached_property
    def retrieval_rows(self) -> tuple[int, ...]:
        """Per retrieval head, its row in the full store."""
        return tuple(self.full_slot[k] for k in self.retrieval_kv)

    @cached_property
    def local_kv(self) -> tuple[int, ...]:
        """Per local head, its KV head."""
        return tuple(self.kv_head(h) for h in self.local)

    @cached_property
    def local_full(self) -> tuple[int, ...]:
        """Local heads that read the full store: their KV head serves a retrieval head too."""
        return tuple(h for h in self.local if self.kv_head(h) in self.full_kv)

    @cached_property
    def local_window(self) -> tuple[int, ...]:
        """Local heads that read the window store."""
        return tuple(h for h in self.local if self.kv_head(h) in self.window_kv)

    @cached_property
    def index_key_kv(self) -> tuple[int, ...]:
        """Per row of the index store, the KV head whose keys it projects."""
        if not self.indexed:
            return ()
        return self.full_kv if self.key_sharing == "kv_head" else self.retrieval_kv

    @cached_property
    def index_heads(self) -> tuple[int, ...]:
        """Per retrieval head, its row in the index store."""
        if self.key_sharing == "kv_head":
            return self.retrieval_rows
        return tuple(range(len(self.retrieval)))
