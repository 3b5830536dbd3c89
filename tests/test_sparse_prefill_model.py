"""The model with `retrieval_prefill="sparse_tiled"`: against dense prefill, in chunks, and in generation."""

import pytest
import torch
from families import padded_batch
from test_generate import make

LENGTH = 400


@pytest.fixture(scope="module")
def model():
    return make(prefill="sparse_tiled", index_top_p=0.4)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_everything_selected_is_dense_prefill(ids):
    tiled, dense = make(prefill="sparse_tiled", index_top_p=1.0), make(prefill="dense", index_top_p=1.0)
    assert torch.equal(logits(tiled, ids), logits(dense, ids))


def test_tiles_leave_something_out(model, ids):
    """Rows whose keys all lie in sinks, recent blocks and their own tile are dense; later rows are not."""
    found, dense = logits(model, ids), logits(make(prefill="dense", index_top_p=0.4), ids)
    torch.testing.assert_close(found[:, :256], dense[:, :256], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 300:], dense[:, 300:], atol=1e-4)


def test_chunks_of_whole_tiles_equal_one_forward(model, ids):
    whole = logits(model, ids, use_cache=False)
    cache, parts, begin = None, [], 0
    for end in (128, 384, LENGTH):
        with torch.no_grad():
            result = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache, begin = result.past_key_values, end
        parts.append(result.logits)
    # the last chunk is longer than a decode step
    assert model.config.decode_max_queries <= LENGTH - 384
    torch.testing.assert_close(torch.cat(parts, 1)[:, :384], whole[:, :384], rtol=1e-4, atol=1e-4)


def test_generation_with_left_padding(model):
    """Shorter than the forced blocks reach, prefill is dense in either cut: padding must not change a token."""
    ids, mask = padded_batch((41, 170, 300))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    assert together.shape == (3, 312)
    alone = model.generate(ids[:1, -41:], **options)
    assert torch.equal(together[0, -12:], alone[0, -12:])
    alone = model.generate(ids[2:], **options)
    assert torch.equal(together[2:], alone)


def test_decode_rows_attend_as_decode_steps_do(model, ids):
    prompt = 384
    rows = logits(model, ids[:, : prompt + 1], use_cache=False, decode_rows=1)
    with torch.no_grad():
        cache = model(ids[:, :prompt], use_cache=True).past_key_values
        step = model(ids[:, prompt : prompt + 1], past_key_values=cache).logits
    torch.testing.assert_close(rows[:, -1:], step, rtol=1e-4, atol=1e-4)


def test_observer_measures_the_kept_mass(model, ids):
    kept = []
    logits(
        model,
        ids,
        on_selection=lambda layer, rows, chosen, valid, weights: kept.append((weights * chosen).sum(-1).mean()),
    )
    assert len(kept) == sum(bool(heads) for heads in model.config.retrieval_heads)
    assert all(0.3 < float(share) < 1.0 for share in kept)


def test_observer_sees_decode_rows_alone_where_there_are_any(model, ids):
    seen = []
    observe = lambda layer, rows, chosen, valid, weights: seen.append(chosen.shape[2])  # noqa: E731
    logits(model, ids, use_cache=False, decode_rows=5, on_selection=observe)
    assert seen == [5] * sum(bool(heads) for heads in model.config.retrieval_heads)


@pytest.mark.parametrize("rows", [5, 16, 100])
def test_emulated_decode_rows_follow_a_prefill_of_what_stands_before(ids, rows):
    """`decode_rows=R` equals a prefill and R decode steps, wherever the prompt ends inside a tile."""
    model = make(prefill="sparse_tiled", index_top_p=0.4, decode_max_queries=16)
    found = logits(model, ids, use_cache=False, decode_rows=rows)
    before = LENGTH - rows
    with torch.no_grad():
        cache = model(ids[:, :before], use_cache=True).past_key_values
    steps = []
    for begin in range(before, LENGTH, 16):
        with torch.no_grad():
            steps.append(model(ids[:, begin : begin + 16], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(found[:, before:], torch.cat(steps, 1), rtol=1e-4, atol=1e-4)


def test_gradients_flow(ids):
    model = make(prefill="sparse_tiled", index_top_p=0.4)
    model(ids, labels=ids).loss.backward()
    weights = [p for name, p in model.named_parameters() if name.endswith("k_proj.weight")]
    assert weights
    assert all(float(weight.grad.abs().sum()) > 0 for weight in weights)
