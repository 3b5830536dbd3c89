"""A model's decode steps with the Triton kernels (through the interpreter here) and with the reference."""

import pytest
import torch
from families import tiny_base

from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM


def run(backend: str, form: dict, **options):
    torch.manual_seed(0)
    model = RTPurboForCausalLM.from_base(
        tiny_base("llama").eval(), retrieval_heads=[[0, 2], [], [3], [0, 1, 2, 3]], sliding_window=6, num_sink_tokens=2,
        index_dim=8, **options,
    )  # fmt: skip
    ids = torch.randint(3, 97, (2, 24))
    cache = model.new_cache(**form)
    model.config.attention_backend = "reference"
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=cache)
    model.config.attention_backend = backend
    logits = [
        model(
            ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache
        ).logits
        for a, b in ((20, 21), (21, 24))
    ]  # fmt: skip
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("form", [{}, {"max_length": 32}], ids=["growing", "static"])
@pytest.mark.parametrize("rotary", [0, 4])
@torch.no_grad()
def test_fused_step_equals_the_reference(form, rotary):
    # a floor of more tokens than there are makes every selection the same set
    options = {"index_rotary_dim": rotary, "index_min_tokens": 64}
    out, cache = run("triton", form, **options)
    expected, reference = run("reference", form, **options)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == reference.get_seq_length() == 24
    for index in cache.converted:
        layer, other = cache.layers[index], reference.layers[index]
        for name in ("keys", "values", "window_keys", "window_values"):
            torch.testing.assert_close(getattr(layer, name), getattr(other, name), rtol=1e-3, atol=1e-4)
        # the interpreter cuts bf16 off instead of rounding it
        torch.testing.assert_close(layer.index_keys, other.index_keys, rtol=2**-6, atol=1e-3)


@torch.no_grad()
def test_a_step_without_selection_still_writes():
    out, cache = run("triton", {}, index_top_p=1.0)
    expected, _ = run("reference", {}, index_top_p=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert cache.layers[0].keys[:, :, 23].abs().sum() > 0
