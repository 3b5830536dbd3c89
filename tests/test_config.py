"""RTPurboConfig: ranges, validation messages, delegation to the base config."""

import copy
import json
import types

import pytest
import torch
from families import tiny_base
from transformers import AutoConfig, GPT2Config, MistralConfig

from rtpurbo_hf import RTPurboConfig, RTPurboForCausalLM

BASE = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("index_top_p", 0.0, r"index_top_p must be in \(0, 1\]"),
        ("index_top_p", 1.5, r"index_top_p must be in \(0, 1\]"),
        ("index_top_p", "0.9", r"index_top_p must be in \(0, 1\]"),
        ("index_top_p", float("nan"), r"index_top_p must be in \(0, 1\]"),
        ("sliding_window", 0, "sliding_window must be an integer in"),
        ("sliding_window", 1 << 40, "sliding_window must be an integer in"),
        ("sliding_window", True, "sliding_window must be an integer in"),
        ("num_sink_tokens", -1, "num_sink_tokens must be an integer in"),
        ("index_dim", 0, "index_dim must be an integer in"),
        ("index_rotary_dim", 3, "index_rotary_dim must be even"),
        ("index_rotary_dim", 18, "at most index_dim = 16"),
        ("index_block_size", 8, "index_block_size must be one of"),
        ("index_key_sharing", "group", "index_key_sharing must be one of"),
        ("retrieval_prefill", "fast", "retrieval_prefill must be one of"),
        ("attention_backend", "cuda", "attention_backend must be one of"),
        ("index_rotary_wavelengths", [10.0], "index_rotary_wavelengths must be"),
        ("index_rotary_wavelengths", [100.0, 10.0], "index_rotary_wavelengths must be"),
        ("decode_max_queries", 0, "decode_max_queries must be an integer in"),
        ("format_version", 2, "upgrade rtpurbo_hf"),
        ("format_version", 0, "format_version must be a positive integer"),
        ("retrieval_heads", [[0]], "has 1 layers, the base model has 2"),
        ("retrieval_heads", [[0], [4]], r"retrieval_heads\[1\]: head \[4\] is not in \[0, 4\)"),
        ("retrieval_heads", [[0], [-1]], r"retrieval_heads\[1\]: head \[-1\]"),
        ("retrieval_heads", [[0, 0], []], "lists a head twice"),
        ("retrieval_heads", [["a"], []], "must be a list of integers"),
        ("retrieval_heads", "all", "must be a list per layer"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        RTPurboConfig(base_config=BASE, **{field: value})


def test_unknown_families_are_refused_by_name():
    with pytest.raises(ValueError, match=r"family 'gpt2' are not supported.*llama"):
        RTPurboForCausalLM(RTPurboConfig(base_config=GPT2Config()))


def test_base_without_full_attention_is_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(sliding_window=16, vocab_size=50, intermediate_size=32, **small)
    with pytest.raises(ValueError, match="no full-attention layer"):
        RTPurboForCausalLM(RTPurboConfig(base_config=config))


def test_heads_of_a_native_sliding_layer_are_refused():
    base = tiny_base("gemma3_text")
    with pytest.raises(ValueError, match=r"layer 0, which is not a full-attention layer.*\[1, 3\]"):
        RTPurboForCausalLM.from_base(base, retrieval_heads=[[0], [], [], []])


def test_reads_through_to_the_base_and_round_trips(tmp_path):
    config = RTPurboConfig(base_config=BASE, retrieval_heads=[[3, 1], []], index_top_p=0.95, sliding_window=7)
    assert config.num_hidden_layers == 2
    assert config.vocab_size == BASE.vocab_size
    assert config.retrieval_heads == [[1, 3], []]
    assert not hasattr(config, "no_such_field")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "rtpurbo"
    assert "num_hidden_layers" not in stored
    assert stored["base_config"]["model_type"] == "llama"
    again = RTPurboConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert copy.deepcopy(again).retrieval_heads == config.retrieval_heads


def test_wrapping_leaves_the_live_base_config_alone():
    """Setting our attention implementation must not reach a base config that someone else still uses."""
    base = tiny_base()
    before = base.config._attn_implementation
    RTPurboConfig(base_config=base.config, retrieval_heads=[[0]] * 4)
    assert base.config._attn_implementation == before


def test_rotations_of_several_kinds_stay_as_the_base_has_them(tmp_path):
    """transformers 5.17 wrote the wrapper's theta beside those of Gemma 3's kinds of layers, and refused to save."""
    base = tiny_base("gemma3_text").config
    base.rope_parameters = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    config = RTPurboConfig(base_config=base)
    assert config.rope_parameters == base.rope_parameters
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["base_config"]["rope_parameters"] == base.rope_parameters
    assert RTPurboConfig.from_pretrained(tmp_path).rope_parameters == base.rope_parameters


def test_resizing_embeddings_keeps_configs_in_step():
    model = RTPurboForCausalLM.from_base(tiny_base(), retrieval_heads=[[0]] * 4)
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == 101
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape[-1] == 101


def test_public_names_stay_what_they_are():
    """A module of the same name would take a function's place once it is imported."""
    import rtpurbo_hf

    for _ in range(2):
        for name in rtpurbo_hf.__all__:
            assert not isinstance(getattr(rtpurbo_hf, name), types.ModuleType), name
