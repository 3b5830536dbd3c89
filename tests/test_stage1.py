"""A layer's stage-1 loss: its gradients by head, and what it leaves in memory."""

import gc
import weakref

import pytest
import torch
from families import tiny_base

from rtpurbo_hf.kernels.indexer_kl import indexer_kl_reference
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training import stage1
from rtpurbo_hf.training.indexer_init import initialise_indexers
from rtpurbo_hf.training.stage1 import LayerRows, layer_kl

LENGTH, HEADS = 40, [[0, 1, 3], [], [2], []]


def wrapped(**options):
    settings = {"index_dim": 6, "index_rotary_dim": 2, "index_rotary_wavelengths": [4.0, 256.0], **options}
    model = RTPurboForCausalLM.from_base(tiny_base("llama"), retrieval_heads=HEADS, **settings)
    initialise_indexers(model, method="random")
    for indexer in model.indexers().values():
        indexer.q_proj.data.mul_(20)
        indexer.k_proj.data.mul_(20)
    return model


def observed(model, observer):
    ids = torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), model.attention_mode("dense"):
        model(ids, observer=observer, use_cache=False)


@pytest.mark.parametrize("sharing", ["head", "kv_head"])
def test_gradients_of_each_head_are_those_of_autograd(sharing):
    model, seen = wrapped(index_key_sharing=sharing), {}
    slots = torch.arange(LENGTH)[None]
    observed(model, lambda inputs: seen.__setitem__(inputs.layer_idx, inputs))
    indexer, inputs = model.indexers()[0], seen[0]
    weights = list(indexer.parameters())
    upstream = torch.tensor([1.0, -3.0, 0.5])
    row_weight = torch.linspace(0, 1, LENGTH)[None] / LENGTH
    kl = layer_kl(indexer, LayerRows.take(inputs, slots), row_weight)
    found = torch.autograd.grad(kl @ upstream, weights)
    plan = inputs.plan
    reference = indexer_kl_reference(
        inputs.query,
        inputs.key,
        indexer.queries(inputs.query_pre, inputs.positions),
        indexer.keys(inputs.key_pre, inputs.positions),
        heads=torch.tensor(plan.retrieval),
        kv_heads=torch.tensor(plan.retrieval_kv),
        index_heads=torch.tensor(plan.index_heads),
        q_slots=slots,
        scale=inputs.scale,
        row_weight=row_weight,
    )
    torch.testing.assert_close(kl, reference, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(found, torch.autograd.grad(reference @ upstream, weights), strict=True):
        assert (ours - expected).norm() / expected.norm() < 1e-5


def test_a_layer_is_freed_once_its_loss_is_taken():
    model, losses, alive = wrapped(), [], []

    def observe(inputs):
        if not inputs.plan.retrieval:
            return
        data = LayerRows.take(inputs, torch.arange(LENGTH)[None])
        with torch.enable_grad():
            losses.append(layer_kl(model.indexers()[inputs.layer_idx], data, torch.full((1, LENGTH), 1 / LENGTH)))
        alive.extend(weakref.ref(tensor) for tensor in (data.query, data.query_pre, data.key, data.key_pre))

    observed(model, observe)
    gc.collect()
    assert len(alive) == 8
    assert not any(reference() is not None for reference in alive)
    assert all(loss.requires_grad for loss in losses)
    kept = []

    def walk(node):
        kept.extend(tensor.numel() for tensor in getattr(node, "saved_tensors", ()))
        for parent, _ in node.next_functions:
            if parent is not None and not hasattr(parent, "variable"):
                walk(parent)

    walk(losses[0].grad_fn)
    weights = sum(weight.numel() for weight in model.indexers()[0].parameters())
    assert 0 < sum(kept) <= weights + len(HEADS[0])


def test_nothing_is_differentiated_unasked(monkeypatch):
    model, seen = wrapped(), {}
    observed(model, lambda inputs: seen.__setitem__(inputs.layer_idx, inputs))

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(stage1.torch.autograd, "grad", refuse)
    with torch.no_grad():
        data = LayerRows.take(seen[0], torch.arange(LENGTH)[None])
        kl = layer_kl(model.indexers()[0], data, torch.full((1, LENGTH), 1 / LENGTH))
    assert not kl.requires_grad
