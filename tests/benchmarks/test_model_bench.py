"""The model benchmark's plan and its planted caches, without a GPU."""

import pytest
import torch
from families import tiny_base

from rtpurbo_hf.benchmarks.model import longest
from rtpurbo_hf.benchmarks.model_plan import SHAPES, draw_retrieval_heads, make_plan, selected_share
from rtpurbo_hf.benchmarks.model_planted import CountSelected, ScaleIndex, TwoLevels, planted_cache
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM


def test_paper_preset_reaches_256k_with_the_real_geometry():
    plan = make_plan("paper", batches=(1, 4))
    assert plan.prefill[-1] == plan.decode[-1] == 262_144
    assert plan.decode[0] == 8192
    config = plan.shape.config()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (36, 4096, 12_288)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    moe = SHAPES["qwen3-30b-a3b"]
    assert (moe.whole, moe.config(moe.whole).num_key_value_heads, moe.config().num_hidden_layers) == (48, 4, 12)


def test_lengths_and_layers_replace_the_preset():
    plan = make_plan("quick", shape="qwen3-30b-a3b", lengths=[65_536], layers=3)
    assert plan.prefill == plan.decode == (65_536,)
    assert plan.shape.layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "full"}, "preset must be one of"),
        ({"preset": "quick", "shape": "llama"}, "shape must be one of"),
        ({"preset": "quick", "lengths": [4096]}, "start at the window"),
        ({"preset": "quick", "batches": ()}, "positive numbers"),
        ({"preset": "quick", "layers": 37}, "1..36"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(arguments.pop("preset"), **arguments)


def test_retrieval_heads_are_uneven_and_the_stated_share():
    heads = draw_retrieval_heads(36, 32, 8, ratio=0.15)
    counts = [len(layer) for layer in heads]
    assert sum(counts) == round(0.15 * 36 * 32)
    assert max(counts) >= 3 * max(min(counts), 1)
    assert all(layer == sorted(set(layer)) for layer in heads)
    assert heads == draw_retrieval_heads(36, 32, 8, ratio=0.15)


def test_selected_share_is_that_of_the_length_below():
    assert selected_share(8192) > selected_share(40_000) == selected_share(32_768) > selected_share(262_144)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = RTPurboForCausalLM.from_base(
        tiny_base("llama").eval(), retrieval_heads=[[0, 1], [], [3], [0, 1, 2, 3]], sliding_window=64, num_sink_tokens=4
    )
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj)
    return model


@torch.no_grad()
def test_planted_share_is_what_the_model_selects(model):
    cache = planted_cache(model, 4000, 2)
    ids = torch.ones(2, 1, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache, observer=ScaleIndex(cache, 0.15))
    counter = CountSelected(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=counter)
    assert counter.mean() == pytest.approx(0.15, rel=0.25)


@torch.no_grad()
def test_two_levels_leave_one_possible_selection(model):
    cache = planted_cache(model, 640, 1)
    ids = torch.ones(1, 1, dtype=torch.long)
    levels = TwoLevels(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=levels)
    cache.crop(-1)
    model.config.index_min_tokens = levels.count
    counter = CountSelected(model, cache)
    first = model(input_ids=ids, past_key_values=cache, observer=counter).logits
    assert counter.mean() == pytest.approx(levels.count / 640)
    cache.crop(-1)
    assert torch.equal(first, model(input_ids=ids, past_key_values=cache).logits)


def test_longest_finds_the_last_length_that_fits():
    def allocate(length: int) -> int:
        if length > 100_000:
            raise torch.cuda.OutOfMemoryError("full")
        return length

    assert longest(allocate, 1 << 20) == 98_304
    assert longest(allocate, 50_000) == 49_152
