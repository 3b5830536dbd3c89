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

from ..kernels.common import index_tensor
from .plan_rtpurbo import HeadPlan

Rotation = tuple[torch.Tensor, torch.Tensor]


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


def rotate_index(vectors: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate pairs (i, i + n/2) of the last axis of fp32 `[B, H, M, n]`."""
    cos, sin = rotation
    half = vectors.shape[-1] // 2
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


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
        projected = torch.matmul(vectors.to(weight.dtype), weight.transpose(-1, -2))
        if self.rotary_dim == 0:
            return projected
        content = projected.shape[-1] - self.rotary_dim
        rotated = rotate_index(projected[..., content:], rotation or self.rotation(positions))
        return torch.cat([projected[..., :content], rotated], -1)

    def queries(
        self, query_pre: torch.Tensor, positions: torch.Tensor, rotation: Rotation | None = None
    ) -> torch.Tensor:
        """Index queries `[B, n, M, index_dim]` of pre-RoPE queries `[B, Hq, M, D]` at positions `[B, M]`."""
        heads = index_tensor(self.plan.retrieval, query_pre.device)
        return self.project(query_pre[:, heads], self.q_proj, positions, rotation)

    def keys(self, key_pre: torch.Tensor, positions: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
        """Index keys `[B, I, M, index_dim]` of pre-RoPE keys `[B, Hkv, M, D]` at positions `[B, M]`."""
        heads = index_tensor(self.plan.index_key_kv, key_pre.device)
        return self.project(key_pre[:, heads], self.k_proj, positions, rotation)
