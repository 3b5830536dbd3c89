"""Tasks of lm-eval by name: our rows against lm-eval's own figures, resuming, the base beside, and bad input."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from families import tiny_base
from small_tokenizer import small_tokenizer
from typer.testing import CliRunner

from rtpurbo_hf.auto import RTPurboForCausalLM
from rtpurbo_hf.cli import app
from rtpurbo_hf.evaluation import harness_tasks
from rtpurbo_hf.evaluation.harness_tasks import HarnessPlan
from rtpurbo_hf.training.corpora import python_sources

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
WORDS = ("import", "return", "class", "while", "lambda", "yield")


def write_task(folder, name: str, fields: str) -> None:
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'data.jsonl'}\n"
        f"test_split: test\n{fields}"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An adapter and its base, texts, and three tasks of ours: choices, a perplexity and a generation."""
    folder = tmp_path_factory.mktemp("harness")
    base = tiny_base(vocab_size=len(small_tokenizer()), num_hidden_layers=2)
    torch.manual_seed(0)
    for parameter in base.parameters():
        # large enough that choices differ, and windows matter
        parameter.data.normal_(std=0.3)
    base.save_pretrained(folder / "base")
    small_tokenizer().save_pretrained(folder / "base")
    settings = {"sliding_window": 4, "num_sink_tokens": 0, "base_model_name_or_path": str(folder / "base")}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0], []], **settings)
    model.save_pretrained(folder / "adapter", adapter_only=True)
    small_tokenizer().save_pretrained(folder / "adapter")
    (folder / "texts").mkdir()
    long = (text for _, text in python_sources() if len(text) > 5_000)
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(next(long)[:5_000], encoding="utf-8")
    questions = [
        {"text": f"In line {n} of the file the word {word} is", "choices": [" first", " last", " lost"], "label": n % 3}
        for n, word in enumerate(WORDS * 3)
    ]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    write_task(
        folder / "tasks",
        "ours_choice",
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n",
    )
    write_task(
        folder / "tasks",
        "ours_rolling",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    )
    write_task(
        folder / "tasks",
        "ours_written",
        'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{choices[label]}}"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n',
    )
    return folder


def run(place, output, *arguments):
    always = ["eval", str(place / "adapter"), "-o", str(output), "--data", str(place / "texts"), "--device", "cpu"]
    found = [*always, "--lengths", "128", "--compare", "base", "--variants", "dense,streaming,sparse", *arguments]
    return CliRunner().invoke(app, [*found, "--lm-eval-include", str(place / "tasks")])


@needs_lm_eval
def test_rows_hold_what_lm_eval_reports(place, tmp_path, monkeypatch):
    tasks = "ours_choice,ours_rolling,ours_written"
    done = run(place, tmp_path / "out", "--lm-eval", tasks, "--suite", "ppl", "--blocks", "2", "--rows", "16")
    assert done.exit_code == 0, done.exception
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    rows = {(row["task"], row["variant"]): row for row in record["rows"]}
    assert ("perplexity", "base") in rows
    variants = ["base", "dense", "streaming", "sparse"]
    figures = ["choice/acc", "rolling/word_perplexity", "rolling/bits_per_byte", "written/exact_match"]
    for figure in figures:
        for variant in variants:
            row = rows[f"ours_{figure}", variant]
            assert (row["suite"], row["n"]) == ("lm-eval", len(WORDS) * 3)
            assert row["low"] <= row["value"] <= row["high"]
    ours = {variant: rows["ours_rolling/word_perplexity", variant] for variant in variants}
    assert ours["base"]["delta"] is None
    assert ours["dense"]["value"] == pytest.approx(ours["base"]["value"])
    assert ours["dense"]["delta"] == pytest.approx(0, abs=1e-6)
    expected = ours["streaming"]["value"] / ours["base"]["value"] - 1
    assert ours["streaming"]["delta"] == pytest.approx(expected)
    assert abs(expected) > 1e-3
    assert record["meta"]["lm_eval"]["tasks"] == tasks.split(",")
    assert "## lm-eval\n" in (tmp_path / "out" / "fidelity.md").read_text()

    # the same figures from lm-eval alone
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = RTPurboForCausalLM.from_pretrained(place / "adapter").eval()
    with model.attention_mode("streaming"):
        harness = HFLM(pretrained=model, tokenizer=small_tokenizer(), batch_size=4, max_length=128, device="cpu")
        manager = TaskManager(include_path=str(place / "tasks"))
        own = simple_evaluate(harness, tasks=["ours_rolling"], task_manager=manager, bootstrap_iters=0)["results"]
    assert ours["streaming"]["value"] == pytest.approx(own["ours_rolling"]["word_perplexity,none"], rel=1e-4)

    # nothing is answered twice
    monkeypatch.setattr(harness_tasks.HarnessTasks, "_answer", lambda *_: pytest.fail("answered again"))
    again = run(place, tmp_path / "out", "--lm-eval", tasks, "--suite", "ppl", "--blocks", "2", "--rows", "16")
    assert again.exit_code == 0, again.exception
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text())["rows"] == record["rows"]


@needs_lm_eval
def test_limit_and_shots_are_records_of_their_own(place, tmp_path):
    for limit, shots in ((3, 0), (5, 1)):
        options = ("--lm-eval", "ours_choice", "--limit", str(limit), "--shots", str(shots))
        done = run(place, tmp_path / "out", *options)
        assert done.exit_code == 0, done.exception
        rows = json.loads((tmp_path / "out" / "fidelity.json").read_text())["rows"]
        assert {(row["suite"], row["n"]) for row in rows} == {("lm-eval", limit)}


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lm-eval", "no_such_task"), "lm-eval has no task no_such_task"),
        (("--lm-eval", " , "), "no task was given"),
        (("--lm-eval", "ours_choice", "--limit", "0"), "--limit must be at least 1"),
        (("--lm-eval", "ours_choice", "--shots", "-1"), "--shots must be 0 or more"),
        (("--lm-eval", "ours_choice", "--variants", "oracle"), "name them in --emulated"),
        (("--lm-eval", "ours_choice", "--ablate", "p"), "does not go with --ablate"),
        (("--suite", "lm-eval"), "name the tasks with --lm-eval"),
    ],
)
def test_bad_input(place, tmp_path, arguments, message):
    done = run(place, tmp_path / "out", *arguments)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install lm-eval"):
        HarnessPlan(("arc_easy",))


def test_aggregates_that_are_no_ratio_keep_their_standard_error():
    row = harness_tasks._plain_row(("lm-eval", "group/acc", 0, "sparse"), 0.5, 0.03, (0.6, 0.04), 7)
    assert (row.low, row.high) == (pytest.approx(0.5 - 1.96 * 0.03), pytest.approx(0.5 + 1.96 * 0.03))
    assert row.delta_high - row.delta == pytest.approx(1.96 * math.hypot(0.03, 0.04))
