"""Caches of a long context without its prefill: random keys and values, and index keys that select a stated share.

With random weights the scores of an index would mean nothing, so its keys are planted: normal vectors give every
query normal scores whose spread is the query's norm times theirs. In one observed step each layer scales its index
store so that the spread is the one that `kernels_decode.spreads` asks for; later steps reuse the store, and what they
really select is counted in another observed step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels.score_select import select_top_p
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.cache_rtpurbo import RTPurboCache, RTPurboCacheLayer
from ..modeling.indexer_rtpurbo import RTPurboIndexer
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .kernels_decode import SPAN, spreads

STEPS = 64  # room that a planted cache has for the steps that are timed


def planted_cache(model: RTPurboForCausalLM, length: int, batch: int) -> RTPurboCache:
    """A static cache with `length` random tokens; index keys have unit spread, correlated within spans of tokens."""
    torch.manual_seed(length)
    text: Any = model.config.get_text_config(decoder=True)
    cache = model.new_cache(max_length=length + STEPS)
    shape = (batch, text.num_key_value_heads, length, text.head_dim)
    key, value = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    for module in model.converted():
        plan = module.rtpurbo.plans["sparse"]
        index = None
        if plan.index_key_kv:
            places = (batch, len(plan.index_key_kv))
            span = torch.randn(*places, -(-length // SPAN), model.config.index_dim, device=model.device)
            index = span.repeat_interleave(SPAN, 2)[:, :, :length]
            index = (math.sqrt(0.5) * (index + torch.randn_like(index))).bfloat16()
        converted_layer(cache, module.layer_idx).update(key, value, index_key=index)
    return cache


def converted_layer(cache: RTPurboCache, layer_idx: int) -> RTPurboCacheLayer:
    layer = cache.layers[layer_idx]
    assert isinstance(layer, RTPurboCacheLayer)
    return layer


def index_queries(inputs: AttentionInputs) -> torch.Tensor:
    """The index queries `[B, n, M, r]` of an observed layer, fp32."""
    assert isinstance(inputs.indexer, RTPurboIndexer)
    with torch.no_grad():
        return inputs.indexer.queries(inputs.query_pre, inputs.positions)


class ScaleIndex:
    """An observer that scales each layer's index store to the spreads for a mean selected share."""

    def __init__(self, cache: RTPurboCache, share: float):
        self.cache, self.share = cache, share

    def __call__(self, inputs: AttentionInputs) -> None:
        if not inputs.plan.retrieval:
            return
        norm = index_queries(inputs).norm(dim=-1)[..., 0]
        wanted = torch.tensor(spreads(norm.shape[1], self.share), device=norm.device)
        store = converted_layer(self.cache, inputs.layer_idx).index_keys
        assert store is not None
        store.mul_((wanted / norm)[..., None, None].to(store.dtype))


class CountSelected:
    """An observer that counts what the retrieval heads of each layer select."""

    def __init__(self, model: RTPurboForCausalLM, cache: RTPurboCache):
        self.config, self.cache = model.config, cache
        self.shares: list[torch.Tensor] = []

    def __call__(self, inputs: AttentionInputs) -> None:
        if not inputs.plan.retrieval:
            return
        layer = converted_layer(self.cache, inputs.layer_idx)
        assert layer.index_keys is not None
        chosen = select_top_p(
            index_queries(inputs).to(layer.index_keys.dtype),
            layer.index_keys,
            index_heads=inputs.plan.index_heads,
            length=torch.full((1,), layer.length, dtype=torch.int32, device=layer.index_keys.device),
            start=None,
            top_p=self.config.index_top_p,
            min_tokens=self.config.index_min_tokens,
            block_size=self.config.index_block_size,
            backend=self.config.attention_backend,
        )
        self.shares.append(chosen.counts.float().flatten() / layer.length)

    def mean(self) -> float:
        return float(torch.cat(self.shares).mean())


class TwoLevels:
    """An observer that plants an unambiguous selection: every tenth span far above the rest, in exact ties.

    Any correct selection whose floor is `count` tokens is the same set, whatever the rounding: two backends can then
    be compared by their logits.
    """

    def __init__(self, model: RTPurboForCausalLM, cache: RTPurboCache):
        self.cache = cache
        self.above = (torch.arange(cache.get_seq_length(), device=model.device) // SPAN) % 10 == 3
        self.count = int(self.above.sum())

    def __call__(self, inputs: AttentionInputs) -> None:
        if not inputs.plan.retrieval:
            return
        query = index_queries(inputs)
        direction = 10 * query / query.square().sum(-1, keepdim=True)
        store = converted_layer(self.cache, inputs.layer_idx).index_keys
        assert store is not None
        length = self.above.numel()
        store[:, :, :length] = torch.where(self.above[:, None], direction, -direction).to(store.dtype)
        store[:, :, length:] = -direction.to(store.dtype)
