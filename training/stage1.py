"""Stage 1, layer by layer: what it needs of a layer, its loss, and how well its index selects."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.common import index_tensor, masked_softmax, row_tiles, soft_cap, starts
from ..kernels.custom_op import needs_grad
from ..kernels.indexer_kl import indexer_kl
from ..kernels.top_p import index_scores_reference, top_p_set_reference
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.indexer_rtpurbo import RTPurboIndexer
from ..modeling.plan_rtpurbo import HeadPlan

STATISTICS = ("kl", "recall", "tokens", "oracle_tokens", "kept_mass", "selected_fraction")


@dataclass(frozen=True)
class LayerRows:
    """One layer's queries at some rows and all its keys, for retrieval heads and the KV heads that serve them.

    `query`, `query_pre` `[B, n, R, D]` and `key`, `key_pre` `[B, F, N, D]`, after and before RoPE; `slots` `[B, R]`
    of the rows (-1: not a row), `row_positions` `[B, R]` and `positions` `[B, N]` logical; `start` `[B]` or None.
    """

    plan: HeadPlan
    query: torch.Tensor
    query_pre: torch.Tensor
    key: torch.Tensor
    key_pre: torch.Tensor
    slots: torch.Tensor
    row_positions: torch.Tensor
    positions: torch.Tensor
    start: torch.Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def take(cls, inputs: AttentionInputs, slots: torch.Tensor) -> LayerRows:
        """What an observer sees, reduced to rows `[B, R]` and to the heads that stage 1 is about."""
        plan, device = inputs.plan, inputs.query.device
        heads, full_kv = index_tensor(plan.retrieval, device), index_tensor(plan.full_kv, device)
        batch = torch.arange(slots.shape[0], device=device)[:, None, None]
        where = slots.clamp_min(0)
        at = batch, heads[None, :, None], where[:, None]
        return cls(
            plan,
            inputs.query[at],
            inputs.query_pre[at],
            inputs.key[:, full_kv],
            inputs.key_pre[:, full_kv],
            slots,
            inputs.positions.gather(1, where),
            inputs.positions,
            inputs.start,
            inputs.scale,
            inputs.softcap,
        )

    def index(self, indexer: RTPurboIndexer) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries `[B, n, R, r]` and keys `[B, I, N, r]`, fp32 whatever autocast says."""
        rows = tuple(self.plan.full_kv.index(kv_head) for kv_head in self.plan.index_key_kv)
        key_pre = self.key_pre[:, index_tensor(rows, self.key_pre.device)]
        with torch.autocast(self.key.device.type, enabled=False):
            return (
                indexer.project(self.query_pre, indexer.q_proj, self.row_positions),
                indexer.project(key_pre, indexer.k_proj, self.positions),
            )

    @property
    def head_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per retrieval head: its row in `query`, in `key`, and in the index keys."""
        device = self.query.device
        every = index_tensor(tuple(range(len(self.plan.retrieval))), device)
        return every, index_tensor(self.plan.retrieval_rows, device), index_tensor(self.plan.index_heads, device)


class _LayerKL(torch.autograd.Function):
    """Loss of a layer's heads whose gradients are taken at once, so that nothing as long as the document is kept.

    Heads are independent: with a key projection of its own for each, shared or not, the gradient of the sum over heads
    is that of every one, and the backward weighs them.
    """

    @staticmethod
    def forward(ctx, q_proj, k_proj, indexer, data, weight, wanted):
        heads, kv_heads, index_heads = data.head_rows
        leaves = q_proj.detach().requires_grad_(wanted), k_proj.detach()[index_heads].requires_grad_(wanted)
        with torch.autocast(data.key.device.type, enabled=False), torch.set_grad_enabled(wanted):
            kl = indexer_kl(
                data.query,
                data.key,
                indexer.project(data.query_pre, leaves[0], data.row_positions),
                indexer.project(data.key_pre[:, kv_heads], leaves[1], data.positions),
                heads=heads,
                kv_heads=kv_heads,
                index_heads=heads,
                q_slots=data.slots,
                scale=data.scale,
                start=data.start,
                softcap=data.softcap,
                row_weight=weight,
            )
            if wanted:
                ctx.save_for_backward(*torch.autograd.grad(kl.sum(), leaves), index_heads)
                ctx.key_shape = k_proj.shape
        return kl.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        grad_q, grad_k, index_heads = ctx.saved_tensors
        scaled = grad_kl[:, None, None]
        # sums in a fixed order, as index_add_ on a GPU does not
        into = grad_k.new_zeros(ctx.key_shape).index_put_((index_heads,), grad_k * scaled, accumulate=True)
        return grad_q * scaled, into, None, None, None, None


def layer_kl(indexer: RTPurboIndexer, data: LayerRows, weight: torch.Tensor) -> torch.Tensor:
    """KL of each retrieval head `[n]`, its rows weighted by `weight` `[B, R]`; differentiable in the indexer.

    The result holds on to nothing of `data`: a layer's queries and keys can go once its loss is taken.
    """
    weights = indexer.q_proj, indexer.k_proj
    return _LayerKL.apply(*weights, indexer, data, weight, needs_grad(*weights))


@torch.no_grad()
def layer_statistics(
    indexer: RTPurboIndexer, data: LayerRows, *, top_p: float, min_tokens: int, block_size: int
) -> torch.Tensor:
    """`STATISTICS` of each retrieval head and row, fp32 `[B, n, R, 6]`; rows that do not count hold zeros.

    The index selects as it does in the model (16-bit vectors, floor, blocks); the oracle is the smallest set of tokens
    that holds `top_p` of the head's own attention. Recall is the selected part of that set.
    """
    heads, kv_heads, index_heads = data.head_rows
    index_query, index_key = data.index(indexer)
    kv_len, device = data.key.shape[2], data.key.device
    first_slot = starts(data.start, data.slots.shape[0], device)
    every = torch.arange(kv_len, device=device)
    out = data.query.new_zeros(*data.query.shape[:3], len(STATISTICS), dtype=torch.float32)
    served = torch.bfloat16 if data.key.dtype == torch.float32 else data.key.dtype
    for rows in row_tiles(data.slots.shape[1], heads.numel() * data.slots.shape[0] * kv_len):
        slots = data.slots[:, rows]
        valid = ((every <= slots[..., None]) & (every >= first_slot[:, None, None]))[:, None]
        key = data.key[:, kv_heads].float()
        scores = torch.matmul(data.query[:, :, rows].float(), key.transpose(-1, -2)) * data.scale
        teacher = masked_softmax(soft_cap(scores, data.softcap), valid)
        exact = index_scores_reference(index_query[:, :, rows], index_key, heads=index_heads)
        student = torch.log_softmax(exact.masked_fill(~valid, torch.finfo(torch.float32).min), -1)
        rounded = index_scores_reference(index_query[:, :, rows].to(served), index_key.to(served), heads=index_heads)
        chosen = top_p_set_reference(
            rounded, valid, top_p=top_p, min_tokens=min_tokens, block_size=block_size, start=data.start
        )
        oracle = top_p_set_reference(teacher.log(), valid, top_p=top_p)
        needed, tokens = oracle.sum(-1), chosen.sum(-1)
        kl = torch.xlogy(teacher, teacher).sum(-1) - torch.where(valid, teacher * student, 0.0).sum(-1)
        values = torch.stack(
            [
                kl,
                (oracle & chosen).sum(-1) / needed.clamp_min(1),
                tokens.float(),
                needed.float(),
                (teacher * chosen).sum(-1),
                tokens / valid.sum(-1).clamp_min(1),
            ],
            -1,
        )
        out[:, :, rows] = torch.where((slots >= 0)[:, None, :, None], values, 0.0)
    return out
