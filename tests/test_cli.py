"""The command line end to end on a tiny model, and what it says to bad input."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_base
from safetensors.torch import load_file
from small_tokenizer import small_tokenizer

from rtpurbo_hf import RTPurboForCausalLM, adaptation
from rtpurbo_hf.cli import main
from rtpurbo_hf.training.checkpoints import last_checkpoint
from rtpurbo_hf.training.distillation import SelfDistillationTrainer
from rtpurbo_hf.training.indexer_trainer import IndexerTrainer
from rtpurbo_hf.training.stage_trainer import StageTrainer

MODULES = ("argparse", "inspect", "typing", "subprocess", "ast", "pathlib", "tarfile", "zipfile", "datetime", "enum")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = small_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=128)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "texts").mkdir()
    for name in MODULES:
        text = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
        (folder / "texts" / f"{name}.txt").write_text(text[:20_000], encoding="utf-8")
    return folder


def in_this_process(monkeypatch, capsys, folder, *arguments):
    """Standard output and error of a command that ends at once: importing everything anew takes ten seconds each."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["rtpurbo", *map(str, arguments)])
    # what the libraries read of the environment is read when they are imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def rtpurbo(folder, *arguments, code=0):
    command = [sys.executable, "-m", "rtpurbo_hf.cli", *map(str, arguments)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


ADAPT = (
    "adapt", "base", "--preset", "demo", "--data", "texts", "--context", "640", "--window", "64", "--steps", "6",
    "--train-blocks", "4", "--min-tokens", "8", "--ratio", "0.25", "--head-rule", "score",
    "--index-key-sharing", "kv_head", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapted(workplace):
    rtpurbo(workplace, *ADAPT, "--output", "out")
    return workplace / "out"


def test_adapt_writes_adapter_and_report(adapted):
    report = json.loads((adapted / "report" / "report.json").read_text())
    for variant in ("dense", "streaming", "rtpurbo"):
        assert {"perplexity", "retrieval_accuracy", "top1_agreement"} <= set(report[variant])
    assert report["dense"]["top1_agreement"] == 1.0
    assert 0 < report["selected_fraction"] < 1
    assert 0 < report["kept_mass"] <= 1
    assert 0 < report["kv_bytes"] < report["kv_bytes_dense"]
    assert report["seconds"]["total"] > 0
    assert report["retrieval_heads"] == 2
    for name in ("report.md", "heads.png", "losses.png"):
        assert (adapted / "report" / name).stat().st_size > 500
    assert (adapted / "adapter" / "rtpurbo_indexer.safetensors").exists()
    assert json.loads((adapted / "adapter" / "config.json").read_text())["index_key_sharing"] == "kv_head"


def test_adapt_refuses_another_run_and_resumes_its_own(adapted, workplace):
    done = rtpurbo(workplace, *ADAPT, "--seed", "1", "--output", "out", code=1)
    assert done.stderr.strip().splitlines()[-1].startswith("rtpurbo: ValueError: out holds a run with other settings")
    rtpurbo(workplace, *ADAPT, "--output", "out")


def test_info_predicts_and_prints(adapted, workplace):
    facts = json.loads(rtpurbo(workplace, "info", "out/adapter", "--context", "1000", "--json").stdout)
    assert facts["retrieval_heads"] == 2
    assert facts["kv_bytes"]["total"] < facts["kv_bytes_dense"]
    assert "freeable KV heads" in rtpurbo(workplace, "info", "out/adapter").stdout
    in_8_bits = rtpurbo(
        workplace, "info", "out/adapter", "--context", "1000", "--json", "--kv-cache-dtype", "int8"
    ).stdout
    assert json.loads(in_8_bits)["kv_bytes"]["full"] < 0.7 * facts["kv_bytes"]["full"]
    refused = rtpurbo(workplace, "info", "out/adapter", "--kv-cache-dtype", "int4", code=1)
    assert "kv_cache_dtype must be one of" in refused.stderr


def test_generate_is_deterministic(adapted, workplace):
    options = ("--prompt", "the of and to in a is that", "--max-new-tokens", "12", "--device", "cpu")
    first = rtpurbo(workplace, "generate", "out/adapter", *options, "--output", "text.txt").stdout
    assert first == rtpurbo(workplace, "generate", "out/adapter", *options).stdout
    assert (workplace / "text.txt").read_text().strip() == first.strip()


def test_calibrate_then_train_indexer(workplace):
    common = ("--data", "texts", "--context", "320", "--device", "cpu")
    rtpurbo(
        workplace,
        "calibrate",
        "base",
        *common,
        "--documents",
        "2",
        "--ratio",
        "0.25",
        "--rule",
        "score",
        "--output",
        "heads",
    )
    record = json.loads((workplace / "heads" / "calibration.json").read_text())
    assert sum(map(len, record["retrieval_heads"])) == 2
    assert (workplace / "heads" / "heads.png").exists()
    again = rtpurbo(workplace, "calibrate", "base", *common, "--output", "heads", code=1)
    assert "exists: choose another --output" in again.stderr
    options = ("--preset", "demo", "--window", "32", "--steps", "4", "--train-blocks", "3", "--output", "trained")
    common = ("--data", "texts", "--context", "640", "--device", "cpu")
    rtpurbo(workplace, "train-indexer", "base", "--heads", "heads/calibration.json", *common, *options)
    assert (workplace / "trained" / "adapter" / "rtpurbo_indexer.safetensors").exists()
    (workplace / "plain.json").write_text(json.dumps({"retrieval_heads": [[0], [1, 2]]}))
    rtpurbo(workplace, "train-indexer", "base", "--heads", "plain.json", *common, *options[:-1], "plain")
    assert (workplace / "plain" / "adapter" / "rtpurbo_indexer.safetensors").exists()


STAGE2 = ("--label-rows", "30", "--accumulation", "2", "--device", "cpu")


BOTH = (
    *ADAPT, "--stages", "1,2", "--stage2-steps", "3", "--stage2-learning-rate", "1e-3", "--stage2-context", "600",
    "--stage2-blocks", "6", "--stage2-schedule", "cosine", "--lora-rank", "4", *STAGE2, "--refresh-steps", "3",
    "--refresh-learning-rate", "2e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def both(workplace):
    rtpurbo(workplace, *BOTH, "--output", "both")
    return workplace / "both"


def test_adapt_with_both_stages(adapted, both, workplace):
    report = json.loads((both / "report" / "report.json").read_text())
    one = json.loads((adapted / "report" / "report.json").read_text())
    assert report["after_stage1"] == one["rtpurbo"]
    assert report["dense"] == one["dense"]
    assert report["before_stage1"]["kl"] != report["after_stage1"]["kl"] != report["rtpurbo"]["kl"]
    assert [entry["step"] for entry in report["stage2"]["losses"]] == [1, 2, 3]
    trained = json.loads(next((both / "stage2" / "trainer").glob("checkpoint-*/trainer_state.json")).read_text())
    assert [entry["learning_rate"] for entry in trained["log_history"][:3]] == [0, 1e-3, pytest.approx(5e-4)]
    assert "| after stage 2 |" in (workplace / "both" / "report" / "report.md").read_text()
    assert (both / "model" / "model.safetensors").exists()
    assert (both / "adapter" / "rtpurbo_indexer.safetensors").exists()
    assert (both / "lora" / "adapter_model.safetensors").exists()
    teacher = json.loads((both / "stage2" / "teacher" / "index.json").read_text())
    assert teacher["shards"][0]["rows"] >= 6 * 30


def test_indexers_are_refreshed_on_what_stage_2_made(both):
    """The backbone is stage 2's, the indexers are new ones; `refreshed/` and `lora/` together are the model."""
    from peft import PeftModel

    report = json.loads((both / "report" / "report.json").read_text())
    assert "| index refreshed |" in (both / "report" / "report.md").read_text()
    assert report["after_stage2"]["kl"] != report["rtpurbo"]["kl"]
    assert report["dense"]["perplexity"] != report["after_stage2"]["perplexity"]
    assert report["refresh"]["eval_kl"] > 0
    state = json.loads(next((both / "refresh" / "trainer").glob("checkpoint-*/trainer_state.json")).read_text())
    assert max(entry.get("learning_rate", 0) for entry in state["log_history"]) == 2e-3
    old, new = (load_file(both / name / "rtpurbo_indexer.safetensors") for name in ("adapter", "refreshed"))
    assert set(old) == set(new)
    assert not any(torch.equal(old[key], new[key]) for key in old)
    model = RTPurboForCausalLM.from_pretrained(both / "model", dtype=torch.float32)
    parts = RTPurboForCausalLM.from_pretrained(both / "refreshed", dtype=torch.float32)
    merged = PeftModel.from_pretrained(parts, both / "lora").merge_and_unload()
    for (name, expected), found in zip(model.state_dict().items(), merged.state_dict().values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name


class NotStarted:
    """In the place of `CleanProcess`, which other tests are about."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def check(self, saved, model, ids):
        assert saved.is_dir()


def command(monkeypatch, *arguments):
    """The exit code of `rtpurbo` in this process."""
    monkeypatch.setattr(sys, "argv", ["rtpurbo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def interrupting(trainer, step, good):
    """`training_step` with one ctrl-C in the middle of that trainer's step."""

    def training_step(self, *args, **kwargs):
        if type(self) is trainer and self.state.global_step == step and not self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return good(self, *args, **kwargs)

    return training_step


def test_ctrl_c_in_either_stage_and_the_same_command_ends_bit_equal(workplace, monkeypatch, caplog):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(adaptation, "CleanProcess", NotStarted)
    assert command(monkeypatch, *BOTH, "--output", "whole") == 0
    whole, broken = workplace / "whole", workplace / "broken"
    stages = (
        (IndexerTrainer, 2, "trainer"),
        (SelfDistillationTrainer, 1, "stage2/trainer"),
        (IndexerTrainer, 1, "refresh/trainer"),
    )
    for trainer, step, saved in stages:
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StageTrainer, "training_step", interrupting(trainer, step, StageTrainer.training_step))
            assert command(patch, *BOTH, "--output", "broken") != 0
        assert "this step is finished and saved" in caplog.text
        assert last_checkpoint(broken / saved).name == f"checkpoint-{step + 1}"
        assert not (broken / "report").exists()
    assert command(monkeypatch, *BOTH, "--output", "broken") == 0
    indexers = ("adapter/rtpurbo_indexer.safetensors", "refreshed/rtpurbo_indexer.safetensors")
    for name in (*indexers, "lora/adapter_model.safetensors", "model/model.safetensors"):
        expected, found = load_file(whole / name), load_file(broken / name)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (whole, broken)]
    for entry in ("before_stage1", "after_stage1", "after_stage2", "rtpurbo", "stage2"):
        assert reports[1][entry] == reports[0][entry]
    assert reports[1]["stage1"]["eval_kl"] == reports[0]["stage1"]["eval_kl"]


def test_cache_teacher_then_distill(adapted, workplace):
    data = ("--data", "texts", "--context", "640", "--blocks", "4", "--label-rows", "30", "--device", "cpu")
    assert "4 blocks" in rtpurbo(workplace, "cache-teacher", "out/adapter", *data, "--output", "teacher").stdout
    options = (*data, "--teacher", "teacher", "--accumulation", "2", "--lora-rank", "2", "--refresh-steps", "2")
    rtpurbo(workplace, "distill", "out/adapter", *options, "--steps", "2", "--output", "distilled")
    old, new = (
        load_file(workplace / name / "rtpurbo_indexer.safetensors") for name in ("out/adapter", "distilled/refreshed")
    )
    assert not any(torch.equal(old[key], new[key]) for key in old)
    assert (workplace / "distilled" / "model" / "model.safetensors").exists()
    assert (workplace / "distilled" / "lora" / "adapter_model.safetensors").exists()
    again = rtpurbo(workplace, "distill", "out/adapter", *options, "--output", "distilled", code=1)
    assert "exists: choose another --output" in again.stderr
    other = rtpurbo(workplace, "distill", "out/adapter", *options, "--seed", "1", "--output", "other", code=1)
    assert "cache of another teacher: data_sha256" in other.stderr
    prompt = ("--prompt", "the of and to in a is that", "--max-new-tokens", "4", "--device", "cpu")
    rtpurbo(workplace, "generate", "distilled/model", *prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapt", "no-such-model", "-o", "x"), "no-such-model"),
        (("adapt", "base", "-o", "x", "--preset", "fast"), "no preset 'fast'"),
        (("adapt", "base", "-o", "x", "--data", "texts", "--top-p", "2"), "index_top_p must be in (0, 1], got 2"),
        (("adapt", "base", "-o", "x", "--data", "no-such-file.txt"), "no-such-file.txt"),
        (("adapt", "base", "-o", "x", "--data", "texts", "--context", "100000"), "characters"),
        (("info", "nothing-here"), "neither a folder nor a Hub id"),
        (("generate", "base"), "exactly one of --prompt and --prompt-file"),
        (("train-indexer", "base", "--heads", "no.json", "-o", "x"), "no.json"),
        (("adapt", "base", "-o", "x", "--stages", "2"), "--stages must be 1 or 1,2, got '2'"),
        (("adapt", "base", "-o", "x", "--refresh-steps", "2"), "--refresh-steps come after stage 2"),
        (("adapt", "base", "-o", "x", "--stages", "1,2", "--refresh-steps", "-1"), "refresh_steps must be at least 0"),
        (("adapt", "base", "-o", "x", "--refresh-learning-rate", "0"), "refresh_learning_rate must be a positive"),
        (("distill", "nothing-here", "-o", "x"), "neither a folder nor a Hub id"),
        (("cache-teacher", "nothing-here", "-o", "x"), "neither a folder nor a Hub id"),
        (("adapt", "base", "-o", "x", "--steps", "-1"), "steps must be at least 1, got -1"),
        (("adapt", "base", "-o", "x", "--learning-rate", "nan"), "learning_rate must be a positive number, got nan"),
        (("adapt", "base", "-o", "x", "--stages", "1,2", "--accumulation", "0"), "accumulation must be at least 1"),
        (("adapt", "base", "-o", "x", "--stages", "1,2", "--label-rows", "0"), "label_rows must be at least 1, got 0"),
        (("adapt", "base", "-o", "x", "--device", "gpu"), "--device gpu: no such device"),
        (("info", "out"), "the folder has no config.json; give out/adapter"),
        (("distill", "base", "-o", "x"), "is a 'llama' model, not an RTPurbo one"),
        (("adapt", "out/adapter", "-o", "x", "--data", "texts"), "this is an RTPurbo model already"),
        (("generate", "out/adapter", "--prompt", ""), "the prompt is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_one_readable_line(adapted, workplace, monkeypatch, capsys, arguments, message):
    code, _, errors = in_this_process(monkeypatch, capsys, workplace, *arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("rtpurbo: ")
    assert message in last
    assert "Traceback" not in errors


def test_block_too_short_to_evaluate_is_found_before_training(workplace, monkeypatch, capsys):
    """Regression: the questions of the evaluation were made after training, which ended in this error."""
    short = ("--context", "640", "--window", "700", "--data", "texts", "--preset", "demo", "--device", "cpu")
    code, _, errors = in_this_process(monkeypatch, capsys, workplace, "adapt", "base", "-o", "short", *short)
    assert code == 1
    assert "a block of 640 tokens is too short" in errors
    assert not (workplace / "short").exists()


def test_debug_shows_the_trace(workplace):
    done = rtpurbo(workplace, "--debug", "info", "nothing-here", code=1)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "adapt",
        "calibrate",
        "train-indexer",
        "generate",
        "info",
        "bench kernels",
        "bench training",
        "bench model",
        "eval",
        "cache-teacher",
        "distill",
    ],
)
def test_help_has_an_example(workplace, monkeypatch, capsys, command):
    code, shown, _ = in_this_process(monkeypatch, capsys, workplace, *command.split(), "--help")
    assert code == 0
    assert f"Example: rtpurbo {command}" in " ".join(shown.split())
