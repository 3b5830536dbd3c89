"""Every family on the list: with all heads retrieving and p = 1, the wrapped model is the base model."""

import copy
import pickle

import pytest
import torch
from families import FAMILY_OPTIONS, everything_retrieves, padded_batch, tiny_base

from rtpurbo_hf.modeling.families_rtpurbo import FAMILIES
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_every_family_has_a_test():
    assert set(FAMILY_OPTIONS) == set(FAMILIES)


def generate(model, ids, mask):
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dense_setting_equals_base(family):
    base = tiny_base(family)
    ids, mask = padded_batch()
    real = mask.bool()
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits
        single = base(ids[1:]).logits
        decoded = generate(base, ids, mask)
    # fp32 rounding grows with the numbers
    tolerance = 1e-5 * max(1.0, float(expected[real].abs().max()))
    model = RTPurboForCausalLM.from_base(
        copy.deepcopy(base), retrieval_heads=everything_retrieves(base), index_top_p=1.0, sliding_window=4
    )
    with torch.no_grad():
        assert (model(ids, attention_mask=mask).logits - expected)[real].abs().max() < tolerance
        assert (model(ids[1:]).logits - single).abs().max() < tolerance
        got = generate(model, ids, mask)
        with model.attention_mode("dense"):
            assert (model(ids, attention_mask=mask).logits - expected)[real].abs().max() < tolerance
    assert torch.equal(got.sequences, decoded.sequences)
    for ours, theirs in zip(got.logits, decoded.logits, strict=True):
        assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sparse_prefill_and_decode_equal_one_forward(family):
    """Row-wise sparse prefill plus cached decode is one uncached forward, whatever else the family does."""
    torch.manual_seed(0)
    base = tiny_base(family)
    heads = [[h for h in layer if h != 1] for layer in everything_retrieves(base)]
    model = RTPurboForCausalLM.from_base(
        base, retrieval_heads=heads, index_top_p=0.6, index_dim=8, index_rotary_dim=4, sliding_window=5,
        num_sink_tokens=2, retrieval_prefill="sparse", index_rotary_wavelengths=[4.0, 64.0],
    )  # fmt: skip
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj, std=0.5)
        torch.nn.init.normal_(indexer.k_proj, std=0.5)
    ids, mask = padded_batch((9, 13))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    split = 10
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        first = model(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split], use_cache=True)
        pieces = [first.logits]
        for i in range(split, ids.shape[1]):
            step = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=first.past_key_values, use_cache=True,
            )  # fmt: skip
            pieces.append(step.logits)
    real = mask.bool()
    assert (torch.cat(pieces, 1) - whole)[real].abs().max() < 1e-4
    with torch.no_grad(), model.attention_mode("dense"):
        dense = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert (dense - whole)[real].abs().max() > 1e-3, "the sparse setting must really drop something"


@torch.no_grad()
def test_windows_that_only_the_mask_knows():
    """Regression: sliding layers of Qwen2-MoE do not tell attention their window, and were refused in the forward."""
    base = tiny_base("qwen2_moe", use_sliding_window=True, sliding_window=5, max_window_layers=2)
    ids, mask = padded_batch((20, 31))
    expected = generate(base, ids, mask).sequences
    model = RTPurboForCausalLM.from_base(
        copy.deepcopy(base), retrieval_heads=everything_retrieves(base), index_top_p=1.0, sliding_window=4
    )
    assert [module.layer_idx for module in model.converted()] != list(range(4))
    assert torch.equal(generate(model, ids, mask).sequences, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), expected)


@torch.no_grad()
def test_rotation_that_changes_with_the_length():
    """Regression: past its short context, Phi-3 turns all keys anew; ours kept those of the short one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    limit = {"original_max_position_embeddings": 35}
    base = tiny_base("phi3", sliding_window=None, rope_parameters={**rope, **limit}, **limit)
    ids, mask = padded_batch((20, 31))
    model = RTPurboForCausalLM.from_base(
        copy.deepcopy(base), retrieval_heads=everything_retrieves(base), index_top_p=1.0, sliding_window=4
    )
    found = generate(model, ids, mask)
    # without a cache: the base's own generate() loses its context there before transformers 5.24
    for step, logits in enumerate(found.logits):
        seen = torch.cat([mask, mask.new_ones(2, step)], 1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        whole = base(found.sequences[:, : 31 + step], attention_mask=seen, position_ids=positions, use_cache=False)
        assert (whole.logits[:, -1] - logits).abs().max() < 1e-4, step
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, found.sequences)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@torch.no_grad()
def test_models_with_partial_rotation_are_pickled(family):
    """Regression: their rotation was a local function, which pickle refuses."""
    base = tiny_base(family)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base), sliding_window=4)
    ids = padded_batch((11,))[0]
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)
