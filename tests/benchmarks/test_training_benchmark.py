"""The training benchmark without a GPU: its plan, its check, and its step on a tiny model."""

import math
import weakref

import pytest
import torch
from typer.testing import CliRunner

from rtpurbo_hf import cli
from rtpurbo_hf.benchmarks import training
from rtpurbo_hf.benchmarks.harness import Timing
from rtpurbo_hf.benchmarks.training import (
    LENGTHS,
    QWEN3_8B,
    TOLERANCE,
    Shape,
    Stage1Step,
    loss_error,
    run_training_benchmarks,
    stage1_rows,
    stage2_rows,
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


@pytest.fixture
def rows(monkeypatch):
    """`stage1_rows` on a tiny model and a clock that shows 5 ms for ours, 4 ms for the peer."""
    base, clock = TINY.base("cpu", torch.float32), iter([4.0, 4.0, 5.0, 5.0])

    def measure(call, **options):
        call()
        return Timing(*[next(clock)] * 3)

    monkeypatch.setattr(Shape, "base", lambda shape: base)
    monkeypatch.setattr(training, "LENGTHS", {"quick": (40, 64)})
    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    return {1: lambda: stage1_rows("quick", shape=TINY), 2: lambda: stage2_rows("quick", shape=TINY, layers=3)}


def test_rows_of_stage_1(rows):
    found = rows[1]()
    names = ["stage1_step_vs_dense_forward", "stage1_peak_gib"]
    assert [(row.case, row.length) for row in found] == [(name, length) for length in (40, 64) for name in names]
    assert [row.extra["step_over_forward"] for row in found[::2]] == [1.25, 1.25]
    assert [row.extra["gib"] for row in found[1::2]] == [3.0, 3.0]
    assert all(row.extra["check"] == "ok" for row in found)
    assert "1.25" in summary(found)


def test_rows_of_stage_2(rows):
    found = rows[2]()
    assert [(row.case, row.length) for row in found] == [
        ("stage2_step_vs_dense_step", 40),
        ("stage2_step_vs_dense_step", 64),
    ]
    assert [row.extra["label_rows"] for row in found] == [20, 32]
    assert all(row.extra["check"] == "ok" for row in found)
    assert all(row.extra["gib"] == row.extra["peer_gib"] == 3.0 for row in found)


def test_stage_2_with_wrong_gradients_shows_no_figure(rows, monkeypatch):
    right = training.window_gradient_tiled
    monkeypatch.setattr(
        training, "window_gradient_tiled", lambda *args, **kwargs: [1.1 * x for x in right(*args, **kwargs)[:3]]
    )
    found = rows[2]()
    assert all(row.extra["check"] == "red" for row in found)
    assert not any(row.extra.get("step_over_dense_step") or row.extra.get("gib") for row in found)


def test_a_case_leaves_nothing_in_memory_for_the_next(monkeypatch, tmp_path):
    """Trainers and models refer to each other, and what is left would count in the next case's peak."""
    left = []

    def first(preset):
        trainer = torch.nn.Module()
        trainer.back = [trainer]
        left.append(weakref.ref(trainer))
        return []

    def second(preset):
        assert left[0]() is None
        return []

    monkeypatch.setattr(training, "CASES", {"first": first, "second": second})
    monkeypatch.setattr(training, "write", lambda *args, **kwargs: None)
    monkeypatch.setattr(training, "environment", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run_training_benchmarks("quick", tmp_path)
    assert left


def test_a_red_check_shows_no_figure(rows, monkeypatch):
    right = training.indexer_kl
    monkeypatch.setattr(training, "indexer_kl", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    found = rows[1]()
    assert all(row.extra["check"] == "red" for row in found)
    assert not any(row.extra.get("step_over_forward") or row.extra.get("gib") for row in found)
    monkeypatch.setattr(cli, "device_named", lambda name: name)
    monkeypatch.setattr(training, "run_training_benchmarks", lambda *args, **kwargs: found)
    result = CliRunner().invoke(cli.app, ["bench", "training"])
    assert result.exit_code != 0
    assert "red" in result.stdout
    assert "1.25" not in result.stdout
