"""Caches of a long context without its prefill: random keys and values, and index keys that select a stated share; and
index vectors for prefills that do likewise.

With random weights the scores of an index would mean nothing, so its keys are planted: normal vectors give every
query normal scores whose spread is the query's norm times theirs. In one observed step each layer scales its index
store so that the spread is the one that `kernels_decode.spreads` asks for; later steps reuse the store, and what they
really select is counted in another observed step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.nn.functional import normalize

from ..kernels.common import index_tensor
from ..kernels.score_select import select_top_p
from ..kernels.sparse_prefill import piece_lists
from ..kernels.tile_blocks import BLOCK, TILE
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.cache_rtpurbo import RTPurboCache, RTPurboCacheLayer
from ..modeling.indexer_rtpurbo import RTPurboIndexer
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .kernels_decode import SPAN, spreads
from .kernels_sparse_prefill import KEY_OWN, KEY_SPAN, QUERY_OWN, QUERY_SPAN, spans

STEPS = 64  # room that a planted cache has for the steps that are timed


def planted_cache(model: RTPurboForCausalLM, length: int, batch: int) -> RTPurboCache:
    """A static cache with `length` random tokens; index keys have unit spread, correlated within spans of tokens."""
    torch.manual_seed(length)
    text: Any = model.config.get_text_config(decoder=True)
    cache = model.new_cache(max_length=length + STEPS)
    shape = (batch, text.num_key_value_heads, length, text.head_dim)
    key, value = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    index_dtype = torch.bfloat16 if model.dtype == torch.float32 else model.dtype
    for module in model.converted():
        plan = module.rtpurbo.plans["sparse"]
        index = None
        if plan.index_key_kv:
            places = (batch, len(plan.index_key_kv))
            span = torch.randn(*places, -(-length // SPAN), model.config.index_dim, device=model.device)
            index = span.repeat_interleave(SPAN, 2)[:, :, :length]
            index = (math.sqrt(0.5) * (index + torch.randn_like(index))).to(index_dtype)
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


class PlantedIndex:
    """While it is entered, prefills of `length` tokens are selected for by planted index vectors.

    As in `kernels_sparse_prefill`: keys are normal and correlated within spans; queries have directions that change
    every few tiles, and lengths for which a mean share `share` of the tokens holds the mass p. The model's own
    projections are computed as well, so that their time counts, and dropped.
    """

    def __init__(self, model: RTPurboForCausalLM, length: int, share: float):
        torch.manual_seed(length)
        self.indexers = list(model.indexers().values())
        self.share, self.length = share, length
        heads = max((len(indexer.plan.retrieval) for indexer in self.indexers), default=0)
        size = {"dim": model.config.index_dim, "device": model.device}
        self.keys = torch.stack([spans(length, KEY_SPAN, KEY_OWN, **size).bfloat16() for _ in range(heads)])
        queries = [normalize(spans(length, QUERY_SPAN, QUERY_OWN, **size), dim=-1).bfloat16() for _ in range(heads)]
        # by the number of heads, ahead of the prefill: scaling them there would stall the device in every layer
        self.queries = {
            count: self._scaled(torch.stack(queries[:count]))
            for count in {len(indexer.plan.retrieval) for indexer in self.indexers}
        }

    def _scaled(self, queries: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor(spreads(queries.shape[0], self.share), device=queries.device).bfloat16()
        return (queries * lengths[:, None, None])[None]

    def vectors(self, indexer: RTPurboIndexer) -> tuple[torch.Tensor, torch.Tensor]:
        """Planted index queries `[1, n, length, r]` and keys `[1, I, length, r]` of a layer, bf16."""
        plan = indexer.plan
        return self.queries[len(plan.retrieval)], self.keys[None, : len(plan.index_key_kv)]

    def __enter__(self) -> PlantedIndex:
        for indexer in self.indexers:
            for number, name in enumerate(("queries", "keys")):
                setattr(indexer, name, partial(self._instead, indexer, getattr(indexer, name), number))
        return self

    def __exit__(self, *raised) -> None:
        for indexer in self.indexers:
            del indexer.queries, indexer.keys

    def _instead(self, indexer, project, number: int, vectors: torch.Tensor, *where, **options) -> torch.Tensor:
        if vectors.shape[0] != 1 or vectors.shape[2] != self.length:
            raise ValueError(f"planted for prefills of [1, {self.length}] tokens, got {tuple(vectors.shape[::2])}")
        project(vectors, *where, **options)
        return self.vectors(indexer)[number]

    @torch.no_grad()
    def selected_blocks(self, config) -> float:
        """The share of the causal key blocks that the lists of the layer with the median of retrieval heads hold."""
        ranked = sorted(self.indexers, key=lambda indexer: len(indexer.plan.retrieval))
        indexer = ranked[len(ranked) // 2]
        query, key = self.vectors(indexer)
        heads = index_tensor(indexer.plan.index_heads, query.device)
        lists = piece_lists(
            query,
            key,
            index_heads=heads,
            q_start=0,
            start=None,
            fused=query.is_cuda,
            top_p=config.index_top_p,
            min_tokens=0,
            num_sinks=config.num_sink_tokens,
        )
        read = sum(int(counts.sum()) for _, _, counts in lists)
        tiles = -(-self.length // TILE)
        return read / (query.shape[1] * sum((tile + 1) * TILE // BLOCK for tile in range(tiles)))


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
    be compared by their logits. The values of the upper level point one way and the others the opposite way, so that
    attending to anything else shows in the logits.
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
        layer = converted_layer(self.cache, inputs.layer_idx)
        store, values = layer.index_keys, layer.values
        assert store is not None
        assert values is not None
        length = self.above.numel()
        side = torch.randn_like(values[:, :, :1])
        values[:, :, :length] += torch.where(self.above[:, None], side, -side)
        store[:, :, :length] = torch.where(self.above[:, None], direction, -direction).to(store.dtype)
        store[:, :, length:] = -direction.to(store.dtype)
