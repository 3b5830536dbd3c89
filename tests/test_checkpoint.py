"""Full and adapter checkpoints: round trips, a clean room without our package, and every refusal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_base
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rtpurbo_hf.modeling.checkpoint_rtpurbo import INDEXER_FILE
from rtpurbo_hf.modeling.configuration_rtpurbo import RTPurboConfig
from rtpurbo_hf.modeling.export_rtpurbo import code_files
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

HEADS = [[0], [], [1, 3], [2]]
IDS = torch.arange(3, 43)[None]
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

CLEAN_ROOM = """
import json, sys
import torch, transformers
path, again, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert not any("main" in p and "rtpurbo" in p for p in sys.path)
try:
    import rtpurbo_hf
    raise SystemExit("our package must not be importable here")
except ImportError:
    pass
options = json.loads(sys.argv[4])
model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
tokens = model.generate(torch.tensor(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False)
model.save_pretrained(again)
second = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
repeated = second.generate(torch.tensor(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False)
print(json.dumps([tokens.tolist(), repeated.tolist(), type(model).__module__]))
"""


def bare_environment(tmp_path: Path) -> dict[str, str]:
    """An environment where transformers is importable and our package is not."""
    import os
    import site

    packages = tmp_path / "site"
    packages.mkdir()
    linked = set()
    # in the order of the path: of two versions of a package, and of their records, the first one counts
    for folder in dict.fromkeys([*(p for p in sys.path if p.endswith("site-packages")), *site.getsitepackages()]):
        for entry in Path(folder).iterdir():
            name = entry.name.partition("-")[0] + ".dist-info" if entry.suffix == ".dist-info" else entry.name
            if "rtpurbo" not in name and entry.suffix != ".pth" and name not in linked:
                linked.add(name)
                (packages / entry.name).symlink_to(entry)
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME", "PYTHONHOME")}
    return {**keep, "PYTHONPATH": str(packages), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def run_clean(tmp_path, path, again, options=None):
    command = [sys.executable, "-S", "-P", "-c", CLEAN_ROOM, str(path), str(again), json.dumps(IDS.tolist())]
    done = subprocess.run(
        [*command, json.dumps(options or {})],
        cwd=tmp_path,
        env=bare_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def converted(base_path, **options):
    config = RTPurboConfig(
        base_config=AutoConfig.from_pretrained(base_path),
        base_model_name_or_path=str(base_path),
        retrieval_heads=HEADS,
        sliding_window=8,
        num_sink_tokens=2,
        index_dim=8,
        index_rotary_dim=4,
        index_top_p=0.8,
        **options,
    )
    torch.manual_seed(0)
    model = RTPurboForCausalLM.from_pretrained(base_path, config=config)
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj, std=0.5)
        torch.nn.init.normal_(indexer.k_proj, std=0.5)
    return model.eval()


def greedy(model):
    return model.generate(IDS, max_new_tokens=16, min_new_tokens=16, do_sample=False)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def base_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    options = MOE if request.param == "qwen3_moe" else {}
    tiny_base(request.param, tie_word_embeddings=request.param == "llama", **options).save_pretrained(path)
    return path


def test_base_checkpoint_loads_straight_in(base_path):
    base = AutoModelForCausalLM.from_pretrained(base_path, attn_implementation="eager")
    model = converted(base_path)
    with torch.no_grad(), model.attention_mode("dense"):
        assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-5)
    if base.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fresh = RTPurboForCausalLM.from_pretrained(base_path, config=model.config)
    for indexer in fresh.indexers().values():
        assert 0.01 < indexer.q_proj.std() < 0.04, "missing indexers are initialised, not left as they lay in memory"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_clean_room(base_path, tmp_path, adapter):
    model = converted(base_path)
    path = tmp_path / "saved"
    model.save_pretrained(path, adapter_only=adapter)
    assert (path / INDEXER_FILE).exists() == adapter
    assert not list(path.glob("*.bin"))
    expected = greedy(model).tolist()
    first, second, module = run_clean(tmp_path, path, tmp_path / "again")
    assert first == expected
    assert second == expected
    assert module.startswith("transformers_modules.")


def test_adapter_is_small_and_keeps_fp32_indexers(base_path, tmp_path):
    model = converted(base_path)
    model.save_pretrained(tmp_path, adapter_only=True)
    tensors = load_file(tmp_path / INDEXER_FILE)
    assert set(tensors) == set(model.indexer_state_dict())
    loaded = RTPurboForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for key, value in loaded.indexer_state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors[key])


def test_code_is_flat_and_complete():
    files = code_files()
    assert {"configuration_rtpurbo.py", "modeling_rtpurbo.py", "cache_rtpurbo.py", "decode.py"} <= set(files)
    assert not any("from .." in text for text in files.values())


@pytest.fixture
def saved(tmp_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(base)
    model = converted(base)
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "full")
    return tmp_path


def load(path):
    return RTPurboForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("shape", ["adapter", "full"])
@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_key_mismatch_names_the_key(saved, shape, damage):
    file = saved / shape / (INDEXER_FILE if shape == "adapter" else "model.safetensors")
    tensors = load_file(file)
    key = next(k for k in tensors if ".indexer." in k)
    value = tensors.pop(key)
    named = key
    if damage == "unexpected":
        tensors[key] = value
        named = key.replace("layers.0", "layers.1")
        tensors[named] = value.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{damage} \['{named}'"):
        load(saved / shape)


def test_wrong_shape_names_file_and_key(saved):
    file = saved / "adapter" / INDEXER_FILE
    tensors = load_file(file)
    key = next(iter(tensors))
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{INDEXER_FILE}: {key} has shape"):
        load(saved / "adapter")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "nan"])
def test_damaged_file_is_named(saved, damage):
    file = saved / "adapter" / INDEXER_FILE
    data = bytearray(file.read_bytes())
    if damage == "nan":
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        data = {"truncated": data[:-40], "empty": b"", "flipped": bytes([data[0] ^ 255]) + bytes(data[1:])}[damage]
        file.write_bytes(data)
    with pytest.raises(ValueError, match=INDEXER_FILE):
        load(saved / "adapter")


def test_missing_weights_file_is_an_error(saved):
    (saved / "adapter" / INDEXER_FILE).unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(saved / "adapter")


def test_newer_format_is_refused_kindly(saved):
    path = saved / "adapter" / "config.json"
    config = json.loads(path.read_text())
    config["format_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 99"):
        load(saved / "adapter")


def test_adapter_needs_a_base_and_a_folder_of_its_own(saved):
    model = load(saved / "full")
    with pytest.raises(ValueError, match="holds full weights"):
        model.save_pretrained(saved / "full", adapter_only=True)
    model.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="must name its base"):
        model.save_pretrained(saved / "other", adapter_only=True)


def test_tensor_parallel_is_refused(saved):
    with pytest.raises(NotImplementedError, match="tensor-parallel"):
        RTPurboForCausalLM.from_pretrained(saved / "full", tp_plan="auto")
