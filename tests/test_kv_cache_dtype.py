"""The cache with its full part in 8 bits: every form that generate() can ask, and the bytes that it takes.

A quantised cache cannot give an uncached forward's tokens one for one. What must hold exactly: forms of the same cache
(static or growing, reordered, cropped, repeated) agree, and decode emulation agrees with decode steps. Against the
unquantised model, logits stay within the rounding's error, which shrinks from fp8 to int8.
"""

import dataclasses

import pytest
import torch
from families import allocated_bytes, padded_batch
from test_generate import GREEDY, NEW, make

from rtpurbo_hf.info import checkpoint_info
from rtpurbo_hf.kernels.kv_quant import dequantize_kv
from rtpurbo_hf.modeling.cache_rtpurbo import predicted_nbytes
from rtpurbo_hf.modeling.configuration_rtpurbo import RTPurboConfig
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# relative error of logits that 8 bits may make in this model, where no selection turns on them
TOLERANCE = {"int8": 0.01, "fp8": 0.05}
# a floor above the context: the kernels of the selection run, and select everything
EVERYTHING = {"index_min_tokens": 1000}


@pytest.fixture(scope="module", params=DTYPES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return make(kv_cache_dtype=name)


@pytest.fixture(scope="module")
def exact():
    return make()


@pytest.fixture(scope="module")
def batch():
    return padded_batch((9, 30, 41))


def relative_error(logits, expected, mask):
    """Of real rows."""
    real = mask[:, -logits.shape[1] :].bool()
    return ((logits - expected)[real].norm() / expected[real].norm()).item()


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def step_logits(model, ids, mask, *, prompt, chunk=None, cache=None):
    """Logits of the tokens after `prompt`, one decode step each, after a prefill in pieces of `chunk`."""
    cache = model.new_cache() if cache is None else cache
    positions, found = positions_of(mask), []
    with torch.no_grad():
        for first in range(0, prompt, chunk or prompt):
            last = min(first + (chunk or prompt), prompt)
            cache.in_prefill = True
            model(
                ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                past_key_values=cache,
            )  # fmt: skip
            cache.in_prefill = False
        for i in range(prompt, ids.shape[1]):
            found.append(
                model(
                    ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                    past_key_values=cache,
                ).logits[:, 0]
            )  # fmt: skip
    return torch.stack(found, 1), cache


def test_store_holds_the_keys_in_8_bits_and_the_ring_does_not(model, exact, name, batch):
    ids, mask = batch
    caches = []
    for one in (model, exact):
        caches.append(one.new_cache())
        with torch.no_grad():
            one(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=caches[-1])
    ours, theirs = caches[0].layers[0], caches[1].layers[0]
    assert ours.keys.dtype == ours.values.dtype == DTYPES[name]
    assert ours.window_keys.dtype == theirs.window_keys.dtype == torch.float32
    for store, scale, expected in (
        (ours.keys, ours.key_scales, theirs.keys),
        (ours.values, ours.value_scales, theirs.values),
    ):
        back = dequantize_kv(store[:, :, :41], scale[:, :, :41], torch.float32)
        error = (back - expected[:, :, :41]).norm() / expected[:, :, :41].norm()
        assert 1e-4 < error < (0.008 if name == "int8" else 0.04)


def test_steps_are_close_to_the_unquantised_cache(name, batch):
    ids, mask = batch
    models = make(kv_cache_dtype=name, **EVERYTHING), make(**EVERYTHING)
    ours, theirs = (step_logits(one, ids, mask, prompt=33)[0] for one in models)
    assert 1e-5 < relative_error(ours, theirs, mask) < TOLERANCE[name]


@pytest.mark.parametrize("prefill", ["dense", "sparse", "sparse_tiled"])
@pytest.mark.parametrize("chunk", [7, 20])
def test_chunked_prefill(name, batch, prefill, chunk):
    """The past is dequantised one KV head at a time; the piece itself is read as it came."""
    ids, mask = batch
    models = make(prefill=prefill, kv_cache_dtype=name, **EVERYTHING), make(prefill=prefill, **EVERYTHING)
    ours, theirs = (step_logits(one, ids, mask, prompt=35, chunk=chunk)[0] for one in models)
    assert 1e-5 < relative_error(ours, theirs, mask) < TOLERANCE[name]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_first_piece_is_not_touched_by_the_rounding(name, batch, prefill):
    ids, mask = batch
    logits = []
    for dtype in ("auto", name):
        one = make(prefill=prefill, kv_cache_dtype=dtype)
        with torch.no_grad():
            logits.append(one(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True).logits)
    assert torch.equal(*logits)


def test_greedy_runs_far_past_the_window_and_forms_agree(model, batch):
    ids, mask = batch
    growing = model.generate(ids, attention_mask=mask, **GREEDY)
    static = model.generate(
        ids, attention_mask=mask, cache_implementation="static", return_dict_in_generate=True, **GREEDY
    )
    assert growing.shape[1] == 41 + NEW
    assert torch.equal(growing, static.sequences)
    layer = static.past_key_values.layers[0]
    assert layer.keys.shape[2] == layer.key_scales.shape[2] == static.past_key_values.max_length


def test_static_form_keeps_its_addresses(model, batch):
    ids, mask = batch
    cache = model.new_cache(max_length=60)
    step_logits(model, ids, mask, prompt=33, cache=cache)
    layer = cache.layers[0]
    stores = [getattr(layer, store) for store in layer._stores]
    before = [store.data_ptr() for store in stores]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert before == [getattr(layer, store).data_ptr() for store in layer._stores]
    assert torch.equal(layer.key_scales[0], layer.key_scales[1])


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_emulated_rows_are_the_decode_steps(name, batch, prefill):
    """Also with retrieval heads that see everything (p = 1), and local heads that share a KV head with them."""
    ids, mask = batch
    for top_p in (0.7, 1.0):
        model = make(prefill=prefill, kv_cache_dtype=name, index_top_p=top_p)
        steps, _ = step_logits(model, ids, mask, prompt=33)
        with torch.no_grad():
            rows = model(
                ids, attention_mask=mask, position_ids=positions_of(mask), decode_rows=8, use_cache=False
            ).logits[:, 33:]
        assert relative_error(steps, rows, mask) < 1e-5, top_p


def test_headwise_mode_reads_it_and_dense_mode_stays_the_base(model, exact, name, batch):
    ids, mask = batch
    for mode, tolerance in (("headwise", TOLERANCE[name]), ("dense", 0.0), ("streaming", 0.0)):
        with model.attention_mode(mode), exact.attention_mode(mode):
            ours, theirs = (step_logits(one, ids, mask, prompt=33)[0] for one in (model, exact))
        error = relative_error(ours, theirs, mask)
        assert error <= tolerance, mode
        assert (error > 0) == (tolerance > 0), mode


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_beams(model, batch, static):
    """A beam's cache is its row's cache: reordering by hand gives the beams of `generate`."""
    ids, mask = batch
    options = {"num_beams": 3, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    kind = "static" if static else None
    out = model.generate(
        ids, attention_mask=mask, cache_implementation=kind, return_dict_in_generate=True, output_scores=True, **options
    )
    more = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)
    logits, _ = step_logits(model, out.sequences[:, :-1], more[:, :-1], prompt=41)
    scores = logits.log_softmax(-1).gather(2, out.sequences[:, 42:, None])[..., 0]
    with torch.no_grad():
        first = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1].log_softmax(-1)
    total = first.gather(1, out.sequences[:, 41:42])[:, 0] + scores.sum(1)
    assert (total / 24 - out.sequences_scores).abs().max() < 1e-4


@pytest.mark.parametrize("amount", [-1, -5, torch.tensor(-3), 36], ids=["-1", "-5", "tensor", "keep-36"])
def test_crop(model, batch, amount):
    ids, mask = batch
    whole, _ = step_logits(model, ids, mask, prompt=33)
    _, cache = step_logits(model, ids, mask, prompt=33)
    cache.crop(amount)
    kept = cache.get_seq_length()
    assert kept == (36 if amount == 36 else 41 + int(amount))
    for i in range(kept, 41):
        with torch.no_grad():
            again = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions_of(mask)[:, i : i + 1],
                past_key_values=cache,
            ).logits[:, 0]  # fmt: skip
        assert (again - whole[:, i - 33]).abs().max() < 1e-5


def test_batch_select_and_repeat(model, batch):
    ids, mask = batch
    whole, _ = step_logits(model, ids, mask, prompt=36)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :36], attention_mask=mask[:, :36], position_ids=positions_of(mask)[:, :36], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 1, 1])
    with torch.no_grad():
        for i in range(36, 41):
            found = model(
                ids[rows, i : i + 1], attention_mask=mask[rows, : i + 1],
                position_ids=positions_of(mask)[rows, i : i + 1], past_key_values=cache,
            ).logits[:, 0]  # fmt: skip
            assert (found - whole[rows, i - 36]).abs().max() < 1e-5


def test_offloading_moves_scales_along(model, batch):
    ids, mask = batch
    _, cache = step_logits(model, ids, mask, prompt=33)
    layer = cache.layers[0]
    before = {store: getattr(layer, store).float().clone() for store in layer._stores}
    layer.offload()
    layer.prefetch()
    assert all(torch.equal(before[store], getattr(layer, store).float()) for store in layer._stores)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_dense_below_quantises_at_the_split(name, batch, static):
    """Short contexts are the base model's, in its own dtype; what is kept of them afterwards is quantised."""
    ids, mask = batch
    plain = make(dense_below=38, **EVERYTHING)
    model = make(dense_below=38, kv_cache_dtype=name, **EVERYTHING)
    cache = model.new_cache(max_length=50 if static else None)
    ours, _ = step_logits(model, ids, mask, prompt=33, cache=cache)
    theirs, _ = step_logits(plain, ids, mask, prompt=33)
    assert torch.equal(ours[:, :4], theirs[:, :4])  # lengths 34 to 37
    assert 1e-5 < relative_error(ours[:, 4:], theirs[:, 4:], mask) < TOLERANCE[name]
    layer = cache.layers[0]
    assert layer.keys.dtype == DTYPES[name]
    assert layer.key_scales.shape == layer.keys.shape[:3]
    assert (layer.key_scales[2, :, :41] > 0).all()


def test_bytes_are_what_nbytes_info_and_the_prediction_say(name):
    model = make(prefill="dense", kv_cache_dtype=name)
    ids = torch.randint(3, 97, (1, 3000))
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert allocated_bytes(cache) == cache.nbytes()["total"]
    facts = checkpoint_info(model.config, context=3000, dtype=torch.float32)
    assert facts.kv_cache_dtype == name
    assert facts.kv_bytes == cache.nbytes()
    plain = dataclasses.asdict(checkpoint_info(make(prefill="dense").config, context=3000, dtype=torch.float32))
    assert facts.kv_bytes_dense == plain["kv_bytes_dense"] == cache.dense_nbytes()
    # head_dim 8: rows of 8 + 2 bytes for 32
    assert facts.kv_bytes["full"] * 32 == plain["kv_bytes"]["full"] * 10
    grown = checkpoint_info(model.config, context=4024, dtype=torch.float32).kv_bytes["total"]
    assert grown - facts.kv_bytes["total"] == facts.kv_bytes_per_1k_tokens
    layer = cache.layers[0]
    predicted = predicted_nbytes(
        layer.plan, batch=1, length=3000, window=8, num_sinks=2, index_dim=8, head_dim=8, itemsize=4,
        kv_cache_dtype=name,
    )  # fmt: skip
    assert predicted == layer.nbytes()


def test_config_is_checked_saved_and_set_at_load(name, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = RTPurboForCausalLM.from_pretrained(tmp_path, kv_cache_dtype=name)
    assert loaded.config.kv_cache_dtype == name
    with torch.no_grad():
        assert loaded(torch.tensor([[5, 6, 7]])).past_key_values.layers[0].keys.dtype == DTYPES[name]
    loaded.save_pretrained(tmp_path / "again")
    assert RTPurboConfig.from_pretrained(tmp_path / "again").kv_cache_dtype == name
    values = RTPurboConfig.from_pretrained(tmp_path).to_dict()
    del values["kv_cache_dtype"]  # as saved before the field existed
    assert RTPurboConfig.from_dict(values).kv_cache_dtype == "auto"
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        RTPurboForCausalLM.from_pretrained(tmp_path, kv_cache_dtype="int4")
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        RTPurboConfig.from_dict({**values, "kv_cache_dtype": "int4"})


def test_assisted_generation_and_prompt_lookup_equal_plain(model):
    ids = padded_batch((41,))[0]
    plain = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY), plain)
    assert torch.equal(model.generate(ids, assistant_model=make(), **GREEDY), plain)
