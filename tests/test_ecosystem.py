"""Other libraries on top of ours: LoRA, device maps and offloading, compilation, and what is installed of the rest."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_base
from safetensors.torch import load_file
from test_checkpoint import bare_environment, converted
from transformers import AutoModelForCausalLM

from rtpurbo_hf.auto import RTPurboForCausalLM

IDS = torch.arange(3, 43)[None]


def greedy(model, tokens: int = 8):
    return model.generate(IDS, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).tolist()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("ecosystem")
    tiny_base().save_pretrained(where / "base")
    model = converted(where / "base")
    model.save_pretrained(where / "adapter", adapter_only=True)
    model.save_pretrained(where / "full")
    return where


# ---- LoRA

CLEAN_LORA = """
import json, sys
import torch, transformers, peft
lora, adapter, again = sys.argv[1:4]
ids = torch.arange(3, 43)[None]
def greedy(m): return m.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()
auto = transformers.AutoModelForCausalLM.from_pretrained(lora, trust_remote_code=True)
base = transformers.AutoModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
wrapped = peft.PeftModel.from_pretrained(base, lora)
results = [greedy(auto), greedy(wrapped)]
wrapped.merge_and_unload().save_pretrained(again)
results.append(greedy(transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)))
print("\\n" + json.dumps([results, type(auto).__module__]))
"""


@pytest.fixture(scope="module")
def lora(folder):
    """A LoRA trained for a step on top of the adapter; the folder, its tokens, and the loss before and after."""
    import peft

    torch.manual_seed(0)
    model = RTPurboForCausalLM.from_pretrained(folder / "adapter")
    before = {key: value.clone() for key, value in model.indexer_state_dict().items()}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=32, task_type="CAUSAL_LM")
    )
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained), "indexers and base stay frozen"
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in tuned.get_base_model().indexer_state_dict().items():
        assert torch.equal(value, before[key])
    tuned.save_pretrained(folder / "lora")
    tuned.eval()
    return folder / "lora", greedy(tuned), losses


def test_lora_trains_on_an_adapter(lora, folder):
    path, _, losses = lora
    assert losses[-1] < losses[0]
    tensors = load_file(path / "adapter_model.safetensors")
    assert tensors
    assert all("lora_" in key for key in tensors)
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "adapter")


def test_lora_loads_merges_and_saves_without_our_package(lora, folder, tmp_path):
    path, expected, _ = lora
    command = [
        sys.executable,
        "-S",
        "-P",
        "-c",
        CLEAN_LORA,
        str(path),
        str(folder / "adapter"),
        str(tmp_path / "merged"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=bare_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (auto, wrapped, merged), module = json.loads(done.stdout.strip().splitlines()[-1])
    assert expected != greedy(RTPurboForCausalLM.from_pretrained(folder / "adapter").eval()), "the LoRA does something"
    assert auto == expected
    assert wrapped == expected
    assert merged == expected
    assert module.startswith("transformers_modules.")


# ---- placement


@pytest.mark.parametrize("shape", ["adapter", "full"])
def test_device_map_auto(folder, shape):
    plain = RTPurboForCausalLM.from_pretrained(folder / shape)
    placed = RTPurboForCausalLM.from_pretrained(folder / shape, device_map="auto")
    assert greedy(placed) == greedy(plain)


def offloaded(folder, shape, target, tmp_path):
    layers = {f"model.model.layers.{i}": "cpu" if i < 2 else target for i in range(4)}
    rest = {"model.model.embed_tokens": "cpu", "model.model.norm": "cpu", "model.model.rotary_emb": "cpu"}
    device_map = {**rest, "model.lm_head": "cpu", **layers}
    return RTPurboForCausalLM.from_pretrained(folder / shape, device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("shape", ["adapter", "full"])
def test_disk_offload(folder, shape, tmp_path):
    plain = RTPurboForCausalLM.from_pretrained(folder / shape)
    model = offloaded(folder, shape, "disk", tmp_path)
    layers = model.model.model.layers
    assert layers[3].mlp.up_proj.weight.is_meta, "else nothing was offloaded"
    assert not layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(model), logits(plain))
    assert greedy(model) == greedy(plain)


# ---- compilation


def test_compiled_forward_without_cache_is_one_graph(folder):
    model = RTPurboForCausalLM.from_pretrained(folder / "adapter").eval()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_compiled_model_generates():
    base = tiny_base(num_hidden_layers=1)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0]], sliding_window=8, index_dim=8)
    expected = greedy(model, 3)
    model.forward = torch.compile(model.forward, backend="eager")
    assert greedy(model, 3) == expected


# ---- quantised bases, evaluation, serving: where the packages are installed


def needs(name: str):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_base(tmp_path, bits):
    from transformers import BitsAndBytesConfig

    tiny_base(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    converted(tmp_path / "base").save_pretrained(tmp_path / "adapter", adapter_only=True)
    plain = RTPurboForCausalLM.from_pretrained(tmp_path / "adapter").indexer_state_dict()
    options = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        "device_map": "cpu",
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    model = RTPurboForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in {type(module).__name__ for module in model.modules()}
    for key, value in model.indexer_state_dict().items():
        assert torch.equal(value, plain[key]), "indexers stay as they are"
    with model.attention_mode("dense"):
        torch.testing.assert_close(logits(model), logits(base), atol=2e-2, rtol=2e-2)
    assert len(greedy(model)[0]) == 48


@needs("lm_eval")
def test_lm_eval_runs_a_task_of_ours(folder, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from small_tokenizer import small_tokenizer

    tokenizer = small_tokenizer()
    model = tiny_base(vocab_size=len(tokenizer))
    model = RTPurboForCausalLM.from_base(model, retrieval_heads=[[0], [], [1], [2]], sliding_window=8).eval()
    questions = [{"text": "import argparse", "choices": ["as a", "or b"], "label": 0}] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    found = simple_evaluate(harness, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0)
    assert 0 <= found["results"]["ours"]["acc,none"] <= 1


def test_auto_model_refuses_tensor_parallel(folder):
    with pytest.raises(NotImplementedError, match="tensor-parallel"):
        AutoModelForCausalLM.from_pretrained(folder / "full", tp_plan="auto")


def test_support_table_names_tests_that_exist():
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (tests.parent / "docs" / "support.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (tests / file).read_text(), re.M), f"{file}::{test}"
