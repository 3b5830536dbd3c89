"""The indexer of one layer: low-dimensional queries and keys that route retrieval heads (PAPER section 3).

Content dimensions are projected from the vectors before RoPE. The last `index_rotary_dim` dimensions are projected
likewise and then rotated by their logical position with wavelengths of their own, log-spaced between two bounds, so
that the index can also tell near from far. Keys are rotated when they are written: scoring stays a dot product.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import nn

from ..kernels.index_project import Rotation, index_project, index_project_reference, index_rows
from .plan_rtpurbo import HeadPlan


@lru_cache(maxsize=64)
def _periods(wavelengths: tuple[float, float], pairs: int, device: torch.device) -> torch.Tensor:
    low, high = (math.log(w) for w in wavelengths)
    with torch.inference_mode(False):
        steps = (
            torch.linspace(0, 1, pairs, device=device, dtype=torch.float64) if pairs > 1 else torch.zeros(1).to(device)
        )
        return torch.exp(low + (high - low) * steps).float()


def index_rotation(positions: torch.Tensor, wavelengths: tuple[float, float], rotary_dim: int) -> Rotation:
    """fp32 cos and sin `[B, 1, M, rotary_dim / 2]` of 2 pi * position / wavelength, at int64 positions `[B, M]`.

    `wavelengths`: shortest and longest, in tokens; the others lie between them, log-spaced.
    """
    period = _periods(wavelengths, rotary_dim // 2, positions.device).double()
    # the remainder keeps the angle small, so that fp32 stays exact at positions of a million
    turns = torch.remainder(positions[:, None, :, None].double(), period) / period
    angle = (2 * math.pi * turns).float()
    return angle.cos(), angle.sin()


class RTPurboIndexer(nn.Module):
    """Projections of one layer's retrieval heads.

    `q_proj` is `[n, index_dim, head_dim]`, one for each retrieval head; `k_proj` is `[n, ...]`, or one for each of
    their KV heads when index keys are shared. The softmax scale is part of the weights.
    """

    def __init__(self, plan: HeadPlan, head_dim: int, index_dim: int, rotary_dim: int, wavelengths):
        super().__init__()
        self.plan = plan
        self.rotary_dim = rotary_dim
        self.wavelengths = (float(wavelengths[0]), float(wavelengths[1]))
        # fp32 whatever the model's dtype: they are small, and what was trained is what routes
        self.q_proj = nn.Parameter(torch.empty(len(plan.retrieval), index_dim, head_dim, dtype=torch.float32))
        self.k_proj = nn.Parameter(torch.empty(len(plan.index_key_kv), index_dim, head_dim, dtype=torch.float32))

    def rotation(self, positions: torch.Tensor) -> Rotation | None:
        """What `queries` and `keys` rotate by at positions `[B, M]`; the same in every layer. None: nothing rotates."""
        return index_rotation(positions, self.wavelengths, self.rotary_dim) if self.rotary_dim else None

    def project(
        self, vectors: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, rotation: Rotation | None = None
    ) -> torch.Tensor:
        """Index vectors `[B, h, M, index_dim]` of `[B, h, M, D]` by a weight `[h, index_dim, D]`, rotated."""
        every = tuple(range(weight.shape[0]))
        return index_project_reference(vectors, weight, heads=every, rotation=rotation or self.rotation(positions))

    def queries(
        self,
        query_pre: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "reference",
    ) -> torch.Tensor:
        """Index queries `[B, n, M, index_dim]` of pre-RoPE queries `[B, Hq, M, D]` at positions `[B, M]`.

        Projected in fp32 and rounded to `dtype`; `backend` as in `config.attention_backend`.
        """
        rotation = rotation or self.rotation(positions)
        heads = self.plan.retrieval
        return index_rows(query_pre, self.q_proj, heads=heads, rotation=rotation, dtype=dtype, backend=backend)

    def keys(
        self,
        key_pre: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "reference",
    ) -> torch.Tensor:
        """Index keys `[B, I, M, index_dim]` of pre-RoPE keys `[B, Hkv, M, D]` at positions `[B, M]`; see `queries`."""
        rotation = rotation or self.rotation(positions)
        heads = self.plan.index_key_kv
        return index_rows(key_pre, self.k_proj, heads=heads, rotation=rotation, dtype=dtype, backend=backend)

    def step(
        self,
        query_pre: torch.Tensor,
        key_pre: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation | None,
        *,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`queries` and `keys` of a decode step's few tokens, in one launch, rounded to `dtype`; no gradients."""
        return index_project(
            query_pre,
            key_pre,
            self.q_proj,
            self.k_proj,
            heads=self.plan.retrieval,
            kv_heads=self.plan.index_key_kv,
            rotation=rotation or self.rotation(positions),
            dtype=dtype,
            backend=backend,
        )
