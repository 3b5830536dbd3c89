"""Starting values of the indexers: a whitened SVD of attention with RoPE averaged over distance.

For head h with second moments `C_q` of its pre-RoPE queries and `C_k` of its *centred* pre-RoPE keys (a shift common to
all keys leaves the softmax alone), and `M = mean over d in [0, L) of R(d)` the rotation matrices of its layer:

    U S V^T = svd(C_q^{1/2} M C_k^{1/2})
    W_q = (scale S_r)^{1/2} U_r^T C_q^{-1/2}        W_k = (scale S_r)^{1/2} V_r^T C_k^{-1/2}

the best rank-r index that does not know the distance. With keys shared by a KV group, one `V` has to serve all its
heads: their matrices are stacked, `V_r` and `S_r` come from the SVD of the stack, and each head's `W_q` projects its
own matrix on them, which is the joint optimum. Rotated index dimensions start as small random numbers. fp64 inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from ..kernels.common import index_tensor
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.indexer_rtpurbo import RTPurboIndexer
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM

logger = logging.getLogger(__name__)

METHODS = ("svd", "random")
_ROTARY_STD = 0.02
_EIGENVALUE_FLOOR = 1e-6
_RANK_FLOOR = 1e-12
_BUDGET = 1 << 24


def mean_rotation(
    rotate: Callable | None, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, *, budget: int = _BUDGET
) -> torch.Tensor:
    """`M [D, D]`, fp64: q^T M k is the mean of the rotated product over the distances 0 to L - 1.

    Args:
        rotate: the layer's `(q, k, cos, sin) -> (q, k)`; None: the layer does not rotate, and M is the identity.
        cos, sin: `[1, L, d]`, what the layer gets for positions 0 to L - 1.
        budget: numbers in memory at a time.
    """
    identity = torch.eye(head_dim, dtype=torch.float64, device=cos.device)
    if rotate is None:
        return identity
    cos, sin = cos[:1].double(), sin[:1].double()
    length = cos.shape[1]
    # [1, D, 1, D]: one head for each basis vector
    basis = identity[None, :, None, :]
    total = torch.zeros_like(identity)
    step = max(1, budget // head_dim**2)
    for first in range(0, length, step):
        last = min(first + step, length)
        vectors = basis.expand(1, head_dim, last - first, head_dim)
        rotated, _ = rotate(vectors, vectors, cos[:, first:last], sin[:, first:last])
        total += rotated[0].sum(1)
    _, origin = rotate(basis, basis, cos[:, :1], sin[:, :1])
    # row i of total is R(d) e_i, row j of origin is R(0) e_j
    return (total / length) @ origin[0, :, 0].T


@dataclass
class _Moments:
    """Sums over tokens of one layer's retrieval heads and their KV heads; the mean of the keys is taken out later."""

    scale: float
    query: torch.Tensor
    key: torch.Tensor
    key_sum: torch.Tensor
    count: int = 0


@dataclass
class _Statistics:
    """Observer that collects moments and, by a hook on each module, the cos and sin that the layer really gets."""

    model: RTPurboForCausalLM
    moments: dict[int, _Moments] = field(default_factory=dict)
    rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __call__(self, inputs: AttentionInputs) -> None:
        plan = inputs.plan
        if not plan.retrieval:
            return
        device = inputs.query_pre.device
        # MPS aside, every device adds up in fp64; the products of a document are exact enough in fp32
        query = inputs.query_pre[:, index_tensor(plan.retrieval, device)].float().transpose(0, 1).flatten(1, 2)
        key = inputs.key_pre[:, index_tensor(plan.full_kv, device)].float().transpose(0, 1).flatten(1, 2)
        found = self.moments.get(inputs.layer_idx)
        if found is None:
            n, kv, dim = query.shape[0], key.shape[0], query.shape[-1]
            found = _Moments(
                inputs.scale,
                torch.zeros(n, dim, dim, dtype=torch.float64),
                torch.zeros(kv, dim, dim, dtype=torch.float64),
                torch.zeros(kv, dim, dtype=torch.float64),
            )
            self.moments[inputs.layer_idx] = found
        found.query += torch.matmul(query.transpose(-1, -2), query).double().cpu()
        found.key += torch.matmul(key.transpose(-1, -2), key).double().cpu()
        found.key_sum += key.double().sum(1).cpu()
        found.count += query.shape[1]

    def _record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cos, sin, _ = kwargs["rtpurbo_call"]
        layer: int = module.rtpurbo.layer_idx  # type: ignore[union-attr, assignment]
        known = self.rotations.get(layer)
        if known is None or known[0].shape[1] < cos.shape[1]:
            self.rotations[layer] = (cos.detach(), sin.detach())

    @contextmanager
    def recording(self):
        """Watch what each converted module with an indexer is called with, after the model's own hook."""
        watched = [m for m in self.model.converted() if m.indexer is not None]
        handles = [m.register_forward_pre_hook(self._record, with_kwargs=True) for m in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _root(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`C^{1/2}` and `C^{-1/2}` of symmetric `[.., D, D]`; eigenvalues floored at 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(moment)
    largest = values[..., -1:]
    # a head that is dead altogether has nothing to whiten
    values = torch.where(largest > 0, torch.maximum(values, largest * _EIGENVALUE_FLOOR), 1.0)
    root = values.sqrt()[..., None, :]
    return vectors * root @ vectors.transpose(-1, -2), vectors / root @ vectors.transpose(-1, -2)


def svd_projections(
    query_moment: torch.Tensor, key_moment: torch.Tensor, rotation: torch.Tensor, *, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_q [n, r, D]` and the shared `W_k [r, D]` of n heads that read one KV head; n = 1 is the plain SVD.

    Args:
        query_moment: `[n, D, D]`. key_moment: `[D, D]`, centred. rotation: `[D, D]`, the mean rotation.
        scale: softmax scale of the exact attention. rank: at most D.
    """
    query_root, query_whitened = _root(query_moment)
    key_root, key_whitened = _root(key_moment)
    # [n, D, D]
    matrices = query_root @ rotation @ key_root
    _, values, basis = torch.linalg.svd(matrices.flatten(0, 1), full_matrices=False)
    values, basis = values[:rank], basis[:rank]
    root = (scale * values).sqrt()[:, None]
    # S_r^{-1} V_r^T A_h^T is U_r^T when there is one head
    inverse = torch.where(values > _RANK_FLOOR * values[:1], 1 / values, 0.0)[:, None]
    left = inverse * (basis @ matrices.transpose(-1, -2))
    return root * left @ query_whitened, root * basis @ key_whitened


def _fill(indexer: RTPurboIndexer, moments: _Moments, rotation: torch.Tensor, generator: torch.Generator) -> None:
    plan = indexer.plan
    content = indexer.q_proj.shape[1] - indexer.rotary_dim
    rank = min(content, indexer.q_proj.shape[2])
    mean = moments.key_sum / moments.count
    key_moment = moments.key / moments.count - mean[:, :, None] * mean[:, None, :]
    query_moment = moments.query / moments.count
    q_proj = torch.empty(indexer.q_proj.shape, dtype=torch.float64).normal_(0, _ROTARY_STD, generator=generator)
    k_proj = torch.empty(indexer.k_proj.shape, dtype=torch.float64).normal_(0, _ROTARY_STD, generator=generator)
    for row in range(k_proj.shape[0]):
        heads = [i for i, index_head in enumerate(plan.index_heads) if index_head == row]
        kv_row = plan.full_kv.index(plan.index_key_kv[row])
        w_q, w_k = svd_projections(query_moment[heads], key_moment[kv_row], rotation, scale=moments.scale, rank=rank)
        q_proj[heads, :rank], k_proj[row, :rank] = w_q, w_k
    with torch.no_grad():
        indexer.q_proj.copy_(q_proj)
        indexer.k_proj.copy_(k_proj)


@torch.no_grad()
def initialise_indexers(
    model: RTPurboForCausalLM,
    documents: Sequence[torch.Tensor | Sequence[int]] = (),
    *,
    method: str = "svd",
    seed: int = 0,
) -> None:
    """Give every indexer of the model its starting values.

    Args:
        model: a wrapped model with retrieval heads.
        documents: token ids int `[N]` of ordinary text for the moments, of the length to serve; one dense forward
            each, and one or two are enough. The longest one is the L that rotations are averaged over.
        method: `"svd"`, or `"random"`: normal with standard deviation 0.02 throughout.
        seed: of all random numbers.

    Raises:
        ValueError: unknown method, no retrieval heads, no documents for `"svd"`, or activations that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    indexers = model.indexers()
    if not indexers:
        raise ValueError("the model has no retrieval heads: call set_retrieval_heads before initialising indexers")
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        for indexer in indexers.values():
            for weight in (indexer.q_proj, indexer.k_proj):
                weight.copy_(torch.empty(weight.shape).normal_(0, _ROTARY_STD, generator=generator))
        return
    if not documents:
        raise ValueError("the SVD initialisation needs at least one document of token ids, got none")
    statistics = _Statistics(model)
    with model.attention_mode("dense"), statistics.recording():
        for document in tqdm(documents, desc="initialise", unit="doc"):
            ids = torch.as_tensor(document).long()[None].to(model.device)
            model(ids, observer=statistics, use_cache=False, logits_to_keep=1)
    modules = {module.layer_idx: module for module in model.converted()}
    for layer, indexer in indexers.items():
        moments = statistics.moments[layer]
        if not all(bool(torch.isfinite(t).all()) for t in (moments.query, moments.key)):
            raise ValueError(f"queries or keys of layer {layer} are not finite: check the model's weights and dtype")
        cos, sin = statistics.rotations[layer]
        rotation = mean_rotation(modules[layer].rtpurbo.rotation, cos, sin, indexer.q_proj.shape[2]).cpu()
        _fill(indexer, moments, rotation, generator)
    logger.info("SVD initialisation of %d layers from %d documents", len(indexers), len(documents))
