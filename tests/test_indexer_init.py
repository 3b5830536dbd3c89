"""The SVD initialisation: the mean rotation of every kind of layer, optimality, and what it is worth at step 0."""

import pytest
import torch
from families import FAMILY_OPTIONS, everything_retrieves, tiny_base

from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.indexer_init import initialise_indexers, mean_rotation, svd_projections
from rtpurbo_hf.training.row_sampling import RowSampler
from rtpurbo_hf.training.stage1 import LayerRows, layer_kl

LENGTH = 80


def documents(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (LENGTH,), generator=generator) for _ in range(count)]


def wrapped(family, **options):
    base = tiny_base(family)
    settings = {"index_dim": 6, "index_rotary_dim": 2, "index_rotary_wavelengths": [4.0, 256.0], **options}
    return RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base), **settings)


def observed(model, document):
    seen = {}
    with torch.no_grad(), model.attention_mode("dense"):
        model(document[None], observer=lambda inputs: seen.__setitem__(inputs.layer_idx, inputs), use_cache=False)
    return seen


def kl(model, document):
    """Mean KL over heads and all rows, by a path that shares nothing with the initialisation."""
    slots = RowSampler(-1, 0, 0.0, 0).text_rows(0, document.numel())[None]
    weight = torch.full(slots.shape, 1 / slots.numel())
    values = [
        layer_kl(model.indexers()[layer], LayerRows.take(inputs, slots), weight)
        for layer, inputs in observed(model, document).items()
    ]
    return torch.cat(values).mean().item()


@pytest.mark.parametrize("family", sorted(FAMILY_OPTIONS))
def test_svd_equals_the_formula_on_every_family(family):
    """Rebuilt here from pre-RoPE vectors and the layer's own rotated ones, one distance at a time."""
    model = wrapped(family, index_dim=4, index_rotary_dim=0)
    document = documents(1)[0]
    initialise_indexers(model, [document])
    layer, inputs = max(observed(model, document).items())
    indexer, module = model.indexers()[layer], next(m for m in model.converted() if m.layer_idx == layer)
    dim, head = indexer.q_proj.shape[2], 1
    seen = {}

    def record(module, args, kwargs):
        seen["call"] = kwargs["rtpurbo_call"]

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    observed(model, document)
    handle.remove()
    cos, sin = (t.double() for t in seen["call"][:2])
    basis = torch.eye(dim, dtype=torch.float64)
    rotate = module.rtpurbo.rotation
    mean = torch.zeros(dim, dim, dtype=torch.float64)
    for distance in range(LENGTH):
        if rotate is None:
            mean += basis / LENGTH
            continue
        left, _ = rotate(basis[None, None], basis[None, None], cos[:, distance, None], sin[:, distance, None])
        _, right = rotate(basis[None, None], basis[None, None], cos[:, :1], sin[:, :1])
        mean += left[0, 0] @ right[0, 0].T / LENGTH
    q = inputs.query_pre[0, head].double()
    k = inputs.key_pre[0, module.rtpurbo.plans["sparse"].kv_head(head)].double()
    k = k - k.mean(0)
    # scores of the index, keys centred, are the best rank-4 image of q^T M k in the metric of both moments
    w_q, w_k = indexer.q_proj[head].detach().double(), indexer.k_proj[head].detach().double()
    scores = (q @ w_q.T) @ (k @ w_k.T).T
    exact = inputs.scale * q @ mean @ k.T
    error = ((scores - exact) ** 2).sum()
    singular = torch.linalg.svdvals(exact)
    best = float((singular[4:] ** 2).sum())
    assert float(error) == pytest.approx(best, rel=2e-2, abs=1e-6 * float((singular**2).sum()))


def test_rotation_is_the_same_in_pieces():
    model = wrapped("llama")
    module = model.converted()[0]
    positions = torch.arange(50)[None]
    cos, sin = model.model.model.rotary_emb(torch.zeros(1, 50, 8), positions)
    whole = mean_rotation(module.rtpurbo.rotation, cos, sin, 8)
    assert torch.allclose(whole, mean_rotation(module.rtpurbo.rotation, cos, sin, 8, budget=8 * 8 * 7))
    assert torch.equal(mean_rotation(None, cos, sin, 8), torch.eye(8, dtype=torch.float64))
    # the slowest pair hardly turns over 50 tokens, the fastest averages out
    assert whole[3, 3] > 0.9
    assert abs(whole[0, 0]) < 0.1


def test_shared_keys_are_the_joint_optimum():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 10, 10, dtype=torch.float64, generator=generator)
    moments = roots @ roots.transpose(-1, -2)
    rotation = torch.randn(10, 10, dtype=torch.float64, generator=generator)
    w_q, w_k = svd_projections(moments[:3], moments[3], rotation, scale=0.5, rank=4)
    left, right = torch.linalg.cholesky(moments[:3]), torch.linalg.cholesky(moments[3])

    def error(keys, queries):
        return sum(float(((left[h].T @ (queries[h].T @ keys - 0.5 * rotation) @ right) ** 2).sum()) for h in range(3))

    stacked = torch.cat([0.5 * left[h].T @ rotation @ right for h in range(3)])
    assert error(w_k, w_q) == pytest.approx(float((torch.linalg.svdvals(stacked)[4:] ** 2).sum()), rel=1e-6)
    single, key = svd_projections(moments[:1], moments[3], rotation, scale=0.5, rank=10)
    assert torch.allclose(single[0].T @ key, 0.5 * rotation)


@pytest.mark.parametrize("sharing", ["head", "kv_head"])
@pytest.mark.parametrize("family", ["llama", "smollm3", "phi", "gemma3_text", "qwen3", "cohere2"])
def test_svd_beats_random_at_step_0(family, sharing):
    """On held-out documents, for rotary, partly rotary and NoPE layers."""
    model = wrapped(family, index_key_sharing=sharing)
    held_out = documents(1, seed=9)[0]
    initialise_indexers(model, method="random")
    random = kl(model, held_out)
    initialise_indexers(model, documents())
    assert kl(model, held_out) < 0.8 * random


def test_rotary_dimensions_and_surplus_ranks_start_small():
    model = wrapped("llama", index_dim=12, index_rotary_dim=2)
    initialise_indexers(model, documents(), seed=1)
    for indexer in model.indexers().values():
        for weight in (indexer.q_proj, indexer.k_proj):
            # 8 dimensions a head: ranks 8 and 9 have nothing to hold, 10 and 11 rotate
            assert 0.01 < weight[:, 8:].std().item() < 0.03
            assert weight[:, :2].abs().mean().item() > 0.05
    first = {key: value.clone() for key, value in model.indexer_state_dict().items()}
    initialise_indexers(model, documents(), seed=1)
    assert all(torch.equal(first[key], value) for key, value in model.indexer_state_dict().items())
    initialise_indexers(model, documents(), seed=2)
    assert not all(torch.equal(first[key], value) for key, value in model.indexer_state_dict().items())


def test_keys_in_a_lower_dimension_do_not_break_the_whitening():
    """Dead key dimensions: eigenvalues of zero are floored, not divided by."""
    model = wrapped("llama")
    with torch.no_grad():
        for module in model.converted():
            module.k_proj.weight[:4] = 0
            module.q_proj.weight[:8] = 0
    initialise_indexers(model, documents())
    assert all(bool(torch.isfinite(value).all()) for value in model.indexer_state_dict().values())


def test_bad_input():
    model = wrapped("llama")
    with pytest.raises(ValueError, match="method must be one of"):
        initialise_indexers(model, documents(), method="pca")
    with pytest.raises(ValueError, match="at least one document"):
        initialise_indexers(model, [])
    with pytest.raises(ValueError, match="no retrieval heads"):
        initialise_indexers(RTPurboForCausalLM.from_base(tiny_base("llama")), documents())
    with torch.no_grad():
        model.model.model.layers[2].self_attn.k_proj.weight[0] = float("inf")
    with pytest.raises(ValueError, match="layer 2 are not finite"):
        initialise_indexers(model, documents())
