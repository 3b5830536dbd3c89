"""The whole model on a GPU: Triton against the reference, CUDA graphs, no synchronisation, memory really freed."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from rtpurbo_hf.modeling.cache_rtpurbo import predicted_nbytes
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS = [[0, 9], [], [4, 5, 6, 7], [15]]


def make(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=1 << 20,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda", dtype).eval()
    settings = {"index_rotary_dim": 4, "index_min_tokens": 64, "sliding_window": 512, "index_top_p": 0.7, **options}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=HEADS, **settings)
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj, std=0.3)
        torch.nn.init.normal_(indexer.k_proj, std=0.3)
    return model


def decode_logits(model, ids, mask, steps, cache=None):
    """Teacher-forced logits of the last `steps` tokens, one cached step each."""
    cache = model.new_cache() if cache is None else cache
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    split = ids.shape[1] - steps
    logits = []
    with torch.inference_mode():
        model(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split], past_key_values=cache)
        for i in range(split, ids.shape[1]):
            step = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            )  # fmt: skip
            logits.append(step.logits.float())
    return torch.cat(logits, 1)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(1, 512, (2, 3000), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :700] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 0.03), ({"index_key_sharing": "kv_head"}, 0.03), ({"index_block_size": 16}, 0.12)],
    ids=["tokens", "shared keys", "blocks"],
)
def test_triton_equals_reference(batch, options, tolerance):
    """fp32 everywhere in the reference; the difference is bf16 rounding, and the bins that the selection may add:
    random weights attend to everything alike, so that one more block of 16 tokens shows."""
    ids, mask = batch
    fast = decode_logits(make(**options), ids, mask, 24)
    slow = decode_logits(make(attention_backend="reference", **options), ids, mask, 24)
    assert torch.isfinite(fast).all()
    assert (fast - slow).norm() / slow.norm() < tolerance


def test_static_graph_equals_eager_steps(batch):
    ids, mask = batch
    model = make()
    eager = decode_logits(model, ids, mask, 40)
    cache = model.new_cache(max_length=3000)
    graphed = decode_logits(model, ids, mask, 40, cache)
    assert cache.graphs[2] is not None, "the step must really have been captured"
    assert cache.graphs[2].graph is not None
    assert (eager - graphed).norm() / eager.norm() < 1e-2


def test_generate_with_static_cache_equals_dynamic(batch):
    ids, mask = batch
    model = make()
    options = {"attention_mask": mask, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    dynamic = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    same = (dynamic == static)[:, ids.shape[1] :].float().mean().item()
    # random weights: a near tie may turn a token and all that follow it
    assert same > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["kernels", "reference"])
def test_offloaded_cache_equals_dynamic(batch, dtype):
    """Teacher-forced logits through an offloaded cache; afterwards all layers but those in flight are on the CPU."""
    ids, mask = batch
    model = make(dtype)
    resident = model.new_cache()
    expected = decode_logits(model, ids, mask, 24, resident)
    cache = model.new_cache(offloading=True)
    got = decode_logits(model, ids, mask, 24, cache)
    # kernels: the resident step appends and selects in one launch, the offloaded one in several
    assert (got - expected).norm() / expected.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.cuda.synchronize()
    places = [layer.keys.device.type for layer in cache.layers]
    assert places.count("cpu") >= len(places) - 2, places
    for moved, held in zip(cache.layers, resident.layers, strict=True):
        for name in ("keys", "values", "index_keys", "window_keys", "window_values"):
            stored, kept = getattr(moved, name), getattr(held, name)
            end = slice(None, held.length) if name in ("keys", "values", "index_keys") else slice(None)
            difference = (stored[:, :, end].cuda().float() - kept[:, :, end].float()).abs()
            assert difference.numel() == 0 or difference.max() < 0.2, name
    assert cache.get_seq_length() == resident.get_seq_length() == 3000


def test_offloaded_generation_takes_less_memory():
    model = make()
    ids = torch.randint(1, 512, (1, 32_768), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    held, tokens = {}, {}
    for kind in ("dynamic", "offloaded"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = model.generate(
            ids, cache_implementation=kind, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        torch.cuda.synchronize()
        held[kind] = torch.cuda.memory_allocated() - before
        tokens[kind] = output.sequences[:, ids.shape[1] :]
        del output
    assert (tokens["dynamic"] == tokens["offloaded"]).float().mean() > 0.5  # random weights: near ties may turn
    assert held["offloaded"] < 0.75 * held["dynamic"]


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, sliding_window=256, max_position_embeddings=1 << 17,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config).to("cuda", torch.bfloat16).eval()
    settings = {"index_min_tokens": 64, "sliding_window": 512, "index_top_p": 0.7}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[], [0, 5], [], [2, 3]], **settings)
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj, std=0.3)
        torch.nn.init.normal_(indexer.k_proj, std=0.3)
    return model


def test_static_graph_of_a_hybrid_base(hybrid, batch):
    """Native windows of 256 tokens in the captured graph, padding beyond them in one row; two prompts on one cache."""
    ids, mask = batch
    eager = decode_logits(hybrid, ids, mask, 40)
    cache = hybrid.new_cache(max_length=3200)
    graphed = decode_logits(hybrid, ids, mask, 40, cache)
    assert cache.native_windows == (0, 2)
    assert cache.graphs[2].graph is not None, "the step must really have been captured"
    assert (eager - graphed).norm() / eager.norm() < 2e-2
    # a second turn is written into the stores that the graph reads
    more = torch.cat([ids, ids[:, 700:800]], 1)
    longer = torch.cat([mask, torch.ones_like(mask[:, :100])], 1)
    positions = (longer.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        for first, last in ((3000, 3096), *((i, i + 1) for i in range(3096, 3100))):
            out = hybrid(
                more[:, first:last], attention_mask=longer[:, :last], position_ids=positions[:, first:last],
                past_key_values=cache,
            ).logits  # fmt: skip
        whole = hybrid.new_cache()
        hybrid(more[:, :3096], attention_mask=longer[:, :3096], position_ids=positions[:, :3096], past_key_values=whole)
        for i in range(3096, 3100):
            expected = hybrid(
                more[:, i : i + 1], attention_mask=longer[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=whole,
            ).logits  # fmt: skip
    assert cache.graphs[2].graph is not None
    # the first prompt's last 40 tokens came by decode steps there and by prefill here, which is dense
    assert (out - expected).norm() / expected.norm() < 0.2


def test_decode_step_does_not_synchronise(batch):
    ids, mask = batch
    model = make()
    for cache in (model.new_cache(), model.new_cache(max_length=3100)):
        decode_logits(model, ids, mask, 4, cache)
        token = ids[:, :1]
        position = mask.sum(1, keepdim=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                for i in range(3):
                    model(token, position_ids=position + i, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_is_freed_and_predicted():
    """Allocated bytes on the device after a chunked prefill of 64K tokens, against `nbytes()` and the prediction."""
    model = make()
    length, chunk = 65536, 4096
    ids = torch.randint(1, 512, (1, length), device="cuda")
    with torch.inference_mode():
        # builds kernels and library workspaces outside the measurement
        model(ids[:, :chunk], use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = model.new_cache()
        torch.cuda.reset_peak_memory_stats()
        for first in range(0, length, chunk):
            model(ids[:, first : first + chunk], past_key_values=cache, logits_to_keep=1)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    total = cache.nbytes()["total"]
    assert abs(held - total) < 0.02 * total + (1 << 20)
    assert total < 0.65 * cache.dense_nbytes()
    one_layer = max(sum(cache.layers[i].nbytes().values()) for i in cache.converted)
    # growing a layer's store holds the old and the new one for a moment
    assert peak < total + 2 * one_layer + chunk * 512 * 2 * 60
    whole = model.new_cache()
    with torch.inference_mode():
        model(ids, past_key_values=whole, logits_to_keep=1)
    expected = {"full": 0, "index": 0, "window": 0}
    for plan in (layer.plan for layer in whole.layers):
        sizes = predicted_nbytes(
            plan, batch=1, length=length, window=512, num_sinks=4, index_dim=16, head_dim=128, itemsize=2
        )
        expected = {kind: expected[kind] + sizes[kind] for kind in expected}
    assert {kind: whole.nbytes()[kind] for kind in expected} == expected


def test_a_number_of_decode_rows_is_its_mask(batch):
    """Regression: a number of rows became a mask on the CPU, which the forward could not use."""
    ids, model = batch[0][1:], make()
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, -5:] = True
    with torch.inference_mode():
        by_number, by_mask, without = (
            model(ids, use_cache=False, logits_to_keep=5, decode_rows=chosen).logits for chosen in (5, rows, None)
        )
    assert torch.equal(by_number, by_mask)
    assert not torch.equal(by_number, without)
