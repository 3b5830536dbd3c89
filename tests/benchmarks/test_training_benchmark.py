"""The training benchmark without a GPU: its plan, its check, and its step on a tiny model."""

import math

import pytest
import torch

from rtpurbo_hf.benchmarks import training
from rtpurbo_hf.benchmarks.harness import Row, checked
from rtpurbo_hf.benchmarks.training import (
    LENGTHS,
    QWEN3_8B,
    TOLERANCE,
    Shape,
    Stage1Step,
    loss_error,
    run_training_benchmarks,
    summary,
)
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.indexer_init import initialise_indexers

TINY = Shape(layers=3, hidden=32, intermediate=48, query_heads=4, kv_heads=2, head_dim=16, vocabulary=97)


@pytest.fixture
def model():
    base = TINY.base("cpu", torch.float32)
    wrapped = RTPurboForCausalLM.from_base(base, retrieval_heads=TINY.retrieval_heads(0.5), index_dim=6)
    initialise_indexers(wrapped, method="random")
    return wrapped


def test_heads_are_the_stated_share_and_uneven():
    heads = QWEN3_8B.retrieval_heads(0.15)
    counts = [len(layer) for layer in heads]
    assert len(heads) == 36
    assert sum(counts) == round(0.15 * 36 * 32)
    assert max(counts) > 2 * sum(counts) / len(counts)
    assert all(layer == sorted(set(layer)) and all(0 <= head < 32 for head in layer) for layer in heads)
    assert heads == QWEN3_8B.retrieval_heads(0.15)


def test_the_shape_is_qwen3_8b():
    with torch.device("meta"):
        model = QWEN3_8B.base("meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_190_735_360
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


def test_paper_lengths():
    assert LENGTHS["paper"] == (8192, 16_384, 32_768, 65_536)


@pytest.mark.parametrize(("preset", "only"), [("full", None), ("quick", "kernels")])
def test_unknown_names_are_refused(preset, only, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        run_training_benchmarks(preset, tmp_path, only)


def test_a_step_trains_the_indexers_on_every_row(model, tmp_path):
    step, ids = Stage1Step(model, str(tmp_path)), torch.arange(40) % 97
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    first = step(ids)
    assert not first.requires_grad
    assert step(ids) < first
    assert all(map(torch.equal, frozen, (p for p in model.parameters() if not p.requires_grad)))
    assert not any(map(torch.equal, before, (p for p in model.parameters() if p.requires_grad)))
    assert step.trainer._sampler().text_rows(0, 40).numel() == 40


def test_the_check_passes_a_right_kernel_and_fails_a_wrong_one(model, monkeypatch):
    ids = torch.arange(150) % 97
    assert loss_error(model, ids) < 1e-5
    right = training.indexer_kl
    monkeypatch.setattr(training, "indexer_kl", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    assert loss_error(model, ids) > TOLERANCE
    monkeypatch.setattr(training, "indexer_kl", lambda *args, **kwargs: math.nan * right(*args, **kwargs))
    assert loss_error(model, ids) == math.inf


def test_summary_shows_the_ratio_of_a_checked_row():
    extra = {"geometry": str(QWEN3_8B), "step_over_forward": 1.25}
    text = summary([Row("stage1_step_vs_dense_forward", 8192, 0.15, 5.0, 4.0, extra=extra | checked(1e-4, TOLERANCE))])
    assert "step_over_forward" in text
    assert "1.25" in text
