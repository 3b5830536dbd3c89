"""The stage-1 loss: how far the index distribution is from the head's own attention (PAPER section 6).

    loss_h = sum_m w_m KL(softmax(scale * q_h(m) . k) || softmax(iq_h(m) . ik))        over the keys n <= m

with row weights `w` that sum to one (the plain mean over rows by default). The teacher side is a constant; gradients
flow to `index_query` and `index_key` only. Learned sink logits stay out of it: both sides are distributions over keys.
"""

from __future__ import annotations

import torch

from .common import masked_softmax, row_tiles, soft_cap, starts, use_triton
from .custom_op import needs_grad
from .indexer_kl_triton import MAX_HEAD_DIM, MAX_INDEX_DIM, SampledRows, indexer_kl_triton
from .top_p import index_scores_reference

# stands for a score that is not visible; its exponential is 0, and the difference of two of them is 0 and not NaN
_HIDDEN = -1e30
# H100, loss and gradients: at 64 rows of 5 heads x 32K keys Triton takes 1.9 ms and torch 2.2; at 32, 2.1 and 1.9
_FEW_ROWS = 64


def _row_weights(q_slots: torch.Tensor, first_slot: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    counted = q_slots >= first_slot[:, None]
    if row_weight is None:
        return counted.float() / counted.sum().clamp_min(1)
    return torch.where(counted, row_weight.float(), 0.0)


def indexer_kl_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    index_heads: torch.Tensor,
    q_slots: torch.Tensor,
    scale: float,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `indexer_kl`, in fp32, differentiated by autograd."""
    batch, _, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    first_slot = starts(start, batch, device)
    slots = torch.arange(kv_len, device=device)
    weight = _row_weights(q_slots, first_slot, row_weight)
    total = torch.zeros(heads.numel(), device=device)
    for rows in row_tiles(q_len, heads.numel() * batch * kv_len):
        valid = (slots <= q_slots[:, rows, None]) & (slots >= first_slot[:, None, None])
        valid = valid[:, None]
        with torch.no_grad():
            k = key[:, kv_heads].float()
            scores = torch.matmul(query[:, heads, rows].float(), k.transpose(-1, -2)) * scale
            teacher = masked_softmax(soft_cap(scores, softcap), valid)
        index = index_scores_reference(index_query[:, :, rows], index_key, heads=index_heads)
        student = torch.log_softmax(index.masked_fill(~valid, torch.finfo(torch.float32).min), -1)
        cross = torch.where(valid, teacher * student, 0.0).sum(-1)
        entropy = torch.xlogy(teacher, teacher).sum(-1)
        total = total + ((entropy - cross) * weight[:, None, rows]).sum((0, 2))
    return total


def _indexer_kl_tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    sampled: SampledRows,
    *,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `indexer_kl_triton`, in torch: one tile of rows at a time, and nothing of rows x keys outlives its tile."""
    q_slots, count = sampled.q_slots, sampled.heads.numel()
    batch, q_len = q_slots.shape
    kv_len, device = key.shape[2], query.device
    slots = torch.arange(kv_len, device=device)
    teacher_query = query[:, sampled.heads].float()
    teacher_key = key[:, sampled.kv_heads].float().transpose(-1, -2)
    index_key_of = index_key[:, sampled.index_heads].float()
    loss = torch.zeros(count, device=device)
    grad_query = torch.empty_like(index_query, dtype=torch.float32) if gradient else None
    grad_key = torch.zeros_like(index_key_of) if gradient else None
    for rows in row_tiles(q_len, count * batch * kv_len):
        hidden = (slots > q_slots[:, rows, None]) | (slots < sampled.first_slot[:, None, None])
        hidden = hidden[:, None]
        # [B, n, rows, keys]
        teacher = torch.matmul(teacher_query[:, :, rows], teacher_key).mul_(sampled.scale)
        teacher = soft_cap(teacher, sampled.softcap)
        teacher = teacher.masked_fill_(hidden, _HIDDEN)
        student = torch.matmul(index_query[:, :, rows].float(), index_key_of.transpose(-1, -2))
        student.masked_fill_(hidden, _HIDDEN)
        teacher_norm = teacher.logsumexp(-1, keepdim=True)
        student_norm = student.logsumexp(-1, keepdim=True)
        probability = torch.exp(teacher - teacher_norm)
        gap = torch.linalg.vecdot(probability, teacher.sub_(student))
        row_weight = sampled.weight[:, None, rows]
        kl = gap - (teacher_norm - student_norm).squeeze(-1)
        # a row without weight may see no key at all
        loss += torch.where(row_weight > 0, kl * row_weight, 0.0).sum((0, 2))
        if grad_query is not None and grad_key is not None:
            slope = student.sub_(student_norm).exp_().sub_(probability).mul_(row_weight[..., None])
            grad_query[:, :, rows] = torch.matmul(slope, index_key_of)
            grad_key += torch.matmul(slope.transpose(-1, -2), index_query[:, :, rows].float())
    return loss, grad_query, grad_key


class _IndexerKL(torch.autograd.Function):
    """Loss and gradients in one go: what `compute` makes in the forward, the backward only scales."""

    @staticmethod
    def forward(ctx, index_query, index_key, query, key, wanted, compute, sampled):
        loss, grad_query, grad_key = compute(query, key, index_query, index_key, sampled, gradient=wanted)
        if wanted:
            ctx.save_for_backward(grad_query, grad_key, sampled.index_heads)
            ctx.shapes = index_key.shape, index_query.dtype, index_key.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_query, grad_key, index_heads = ctx.saved_tensors
        shape, query_dtype, key_dtype = ctx.shapes
        scaled = grad_loss.float()[None, :, None, None]
        into = grad_key.new_zeros(shape)
        # sums in a fixed order, as index_add_ on a GPU does not
        into.transpose(0, 1).index_put_((index_heads,), (grad_key * scaled).transpose(0, 1), accumulate=True)
        return (grad_query * scaled).to(query_dtype), into.to(key_dtype), None, None, None, None, None


def indexer_kl(
    query: torch.Tensor,
    key: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    *,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    index_heads: torch.Tensor,
    q_slots: torch.Tensor,
    scale: float,
    start: torch.Tensor | None = None,
    softcap: float | None = None,
    row_weight: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Per-head loss `[n]` in nats, fp32, with gradients for the index only; memory O(rows + keys).

    Args:
        query: `[B, Hq, M, D]` rotated queries of the sampled rows. `key`: `[B, Hkv, N, D]` rotated.
        index_query: `[B, n, M, r]`. `index_key`: `[B, I, N, r]`.
        heads, kv_heads, index_heads: int64 `[n]`: query head, its row in `key`, its row in `index_key`.
        q_slots: int64 `[B, M]`, the slot of each sampled row; -1 marks a row that does not count.
        scale: softmax scale of the teacher. start, softcap: as everywhere.
        row_weight: fp32 `[B, M]`, the weight (>= 0) of each row; None: the mean over all rows that count.
        backend: `"auto"` (Triton for 64 rows and more of half precision on CUDA, else tiles of rows in torch),
            `"triton"` or `"reference"`. The kernels take head_dim <= 256 and r <= 64; `"auto"` leaves others to torch.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or a size that `"triton"` cannot serve.
    """
    n = heads.numel()
    if index_query.shape[:3] != (query.shape[0], n, query.shape[2]) or q_slots.shape != (
        query.shape[0],
        query.shape[2],
    ):
        raise ValueError(
            f"expected index_query [B, {n}, M, r] and q_slots [B, M] for query {tuple(query.shape)}, got "
            f"{tuple(index_query.shape)} and {tuple(q_slots.shape)}"
        )
    if index_key.shape[2] != key.shape[2] or index_key.shape[3] != index_query.shape[3]:
        raise ValueError(
            f"expected index_key [B, I, {key.shape[2]}, {index_query.shape[3]}], got {tuple(index_key.shape)}"
        )
    if row_weight is not None and row_weight.shape != q_slots.shape:
        raise ValueError(f"row_weight must have the shape of q_slots {tuple(q_slots.shape)}, got {row_weight.shape}")
    if backend == "reference":
        return indexer_kl_reference(
            query,
            key,
            index_query,
            index_key,
            heads=heads,
            kv_heads=kv_heads,
            index_heads=index_heads,
            q_slots=q_slots,
            scale=scale,
            start=start,
            softcap=softcap,
            row_weight=row_weight,
        )
    first_slot = starts(start, query.shape[0], query.device)
    weight = _row_weights(q_slots, first_slot, row_weight)
    fits = query.shape[3] <= MAX_HEAD_DIM and index_query.shape[3] <= MAX_INDEX_DIM
    # one program for a tile of rows of a head: fewer rows than a tile would leave most of a device idle
    fused = use_triton(backend, query) and (backend == "triton" or query.shape[2] >= _FEW_ROWS)
    if backend == "triton" and not fits:
        raise ValueError(
            f"backend='triton' takes head_dim <= {MAX_HEAD_DIM} and index_dim <= {MAX_INDEX_DIM}, got "
            f"{query.shape[3]} and {index_query.shape[3]}: use 'auto'"
        )
    sampled = SampledRows(heads, kv_heads, index_heads, q_slots, weight, first_slot, scale, softcap)
    compute = indexer_kl_triton if fused and fits else _indexer_kl_tiled
    # a Function cannot tell by itself that gradients are off
    wanted = needs_grad(index_query, index_key)
    return _IndexerKL.apply(index_query, index_key, query, key, wanted, compute, sampled)
