"""A model's decode steps with the Triton kernels (through the interpreter here) and with the reference."""

import pytest
import torch
from families import tiny_base

from rtpurbo_hf.modeling.cache_rtpurbo import RTPurboCache
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM


def small_model(**options):
    torch.manual_seed(0)
    return RTPurboForCausalLM.from_base(
        tiny_base("llama").eval(), retrieval_heads=[[0, 2], [], [3], [0, 1, 2, 3]], sliding_window=6, num_sink_tokens=2,
        index_dim=8, **options,
    )  # fmt: skip


def steps(model, cache, backend: str):
    """Logits of a step of one token and of one of three, after a prefill with the reference."""
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
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
    return torch.cat(logits, 1)


def run(backend: str, form: dict, **options):
    model = small_model(**options)
    cache = model.new_cache(**form)
    return steps(model, cache, backend), cache


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


class MovingCache(RTPurboCache):
    """A cache whose layers are elsewhere, as copies, once they are updated: what offloading does, on one device."""

    def update(self, key, value, layer_idx, **kwargs):
        layer = self.layers[layer_idx]
        updated = layer.update(key, value, **kwargs)
        layer.offload()
        layer._map(torch.clone)
        return updated


@torch.no_grad()
def test_offloaded_layers_hold_every_token():
    """Regression: the fused step wrote its token after the layer had been offloaded, and it was lost."""
    expected, cache = run("reference", {}, index_min_tokens=64)
    model = small_model(index_min_tokens=64)
    plans = {module.layer_idx: module.rtpurbo.plans["sparse"] for module in model.converted()}
    moving = MovingCache(model.config, plans)
    moving.offloading = True
    got = steps(model, moving, "triton")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    for index in cache.converted:
        for name in ("keys", "values", "window_keys", "window_values"):
            held, moved = (getattr(each.layers[index], name) for each in (cache, moving))
            torch.testing.assert_close(moved, held, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_native_windows_of_a_static_cache(family):
    """The kernels on a base's own sliding windows (soft-caps and learned sinks too), against an uncached forward."""
    torch.manual_seed(0)
    base = tiny_base(family)
    model = RTPurboForCausalLM.from_base(
        base, retrieval_heads=[[], [0, 2], [], [1]], sliding_window=6, num_sink_tokens=2, index_dim=8,
        index_top_p=1.0, attention_backend="reference",
    )  # fmt: skip
    ids, mask = torch.randint(3, 97, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model.new_cache(max_length=90)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert cache.native_windows == (0, 2)

    def run(first, last):
        return model(
            ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
            past_key_values=cache,
        ).logits  # fmt: skip

    run(0, 20)
    for index in cache.native_windows:
        cache.layers[index].backend = "triton"
    for module in model.modules():
        if hasattr(module, "rtpurbo_backend"):
            module.rtpurbo_backend = "triton"
    out = torch.cat([run(20, 21), run(21, 24)], 1)
    torch.testing.assert_close(out, whole[:, 20:], rtol=1e-3, atol=1e-3)
