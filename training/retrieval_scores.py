"""Retrieval scores of every head from one dense pass: how much a repeated needle looks at its first copy.

    R_h = 1/|post| * sum_{t in post} sum_{j in pre} A_h(t, j)          (PAPER section 2)

Only the needle's rows are ever scored, against the keys in pieces: memory grows with the length, not its square.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ..kernels.common import soft_cap
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM

_BUDGET = 1 << 24


def span_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    span: slice,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean attention mass of the last rows on a span of keys, fp32 `[Hq]`.

    Args:
        query: `[1, Hq, n, D]`, the rows at the last n slots. `key`: `[1, Hkv, N, D]`, all keys; both rotated.
        span: slots of the span, before the first row.
        scale, softcap, sink_logits: of the layer's softmax.
    """
    _, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    # [Hkv, group * n, D]: the heads of a KV group share one matrix product
    grouped = query[0].reshape(kv_heads, -1, dim).float() * scale
    slot = torch.arange(length - rows, length, device=query.device).repeat(heads // kv_heads)
    total = grouped.new_full((kv_heads, grouped.shape[1]), float("-inf"))
    inside = total.clone()
    step = max(1, _BUDGET // (heads * rows))
    for first in range(0, length, step):
        last = min(first + step, length)
        scores = soft_cap(torch.matmul(grouped, key[0, :, first:last].float().transpose(-1, -2)), softcap)
        later = torch.arange(first, last, device=query.device) > slot[:, None]
        scores = scores.masked_fill_(later, float("-inf"))
        total = torch.logaddexp(total, scores.logsumexp(-1))
        low, high = max(span.start, first), min(span.stop, last)
        if low < high:
            inside = torch.logaddexp(inside, scores[..., low - first : high - first].logsumexp(-1))
    total, inside = (t.reshape(heads, rows) for t in (total, inside))
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.float()[:, None].expand_as(total))
    return torch.exp(inside - total).mean(-1)


class _Scores:
    """Observer that scores each converted layer once the needle's second copy has arrived."""

    def __init__(self, span: slice, rows: int, length: int, cache):
        self.span, self.rows, self.length, self.cache = span, rows, length, cache
        self.by_layer: dict[int, list[float]] = {}

    def __call__(self, inputs: AttentionInputs) -> None:
        past = 0 if self.cache is None else self.cache.layers[inputs.layer_idx].length
        if past + inputs.key.shape[2] < self.length:
            return
        key = inputs.key
        if past:
            key = torch.cat([self.cache.layers[inputs.layer_idx].keys[:, :, :past], key], 2)
        mass = span_mass(
            inputs.query[:, :, -self.rows :],
            key,
            self.span,
            scale=inputs.scale,
            softcap=inputs.softcap,
            sink_logits=inputs.sink_logits,
        )
        self.by_layer[inputs.layer_idx] = mass.tolist()


@torch.no_grad()
def retrieval_scores(
    model: RTPurboForCausalLM, input_ids: torch.Tensor, *, span: slice, rows: int, chunk: int | None = None
) -> dict[int, list[float]]:
    """Scores of all heads of each full-attention layer for one document, by layer index.

    Args:
        input_ids: int64 `[N]`; its last `rows` tokens repeat those of `span`.
        chunk: tokens of a forward; None takes the document in one. Pieces keep a dense cache, and need less memory
            for everything else.
    """
    ids = input_ids[None].to(model.device)
    length = ids.shape[1]
    step = length if chunk is None else max(chunk, rows)
    with model.attention_mode("dense"):
        cache = None if step >= length else model.new_cache()
        observer = _Scores(span, rows, length, cache)
        if cache is None:
            model(ids, observer=observer, use_cache=False, logits_to_keep=1)
        else:
            cache.in_prefill = True
            cuts = [*range(0, length - rows, step), length]
            for first, last in pairwise(cuts):
                model(ids[:, first:last], past_key_values=cache, use_cache=True, observer=observer, logits_to_keep=1)
    return observer.by_layer
