"""What travels as remote code does nothing that it should not, and what strangers send is read or refused."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import bare_environment, converted

from rtpurbo_hf.auto import RTPurboConfig, RTPurboForCausalLM
from rtpurbo_hf.interop import import_duo, import_headwise, import_plain, parse_json
from rtpurbo_hf.modeling import versions_rtpurbo
from rtpurbo_hf.modeling.export_rtpurbo import code_files
from rtpurbo_hf.modeling.push_rtpurbo import is_hub_id
from rtpurbo_hf.training.calibration import Calibration, Needle

BASE = tiny_base().config.to_dict()
HEADS = [[0], [], [1, 3], [2]]

# ---- the code that travels

NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "httpx2", "aiohttp", "ftplib", "smtplib"}
BANNED_MODULES = NETWORK | {
    "asyncio", "ctypes", "dill", "joblib", "marshal", "multiprocessing", "pickle", "pty", "runpy",
    "shelve", "shutil", "signal", "subprocess", "webbrowser",
}  # fmt: skip
BANNED_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
BANNED_ATTRIBUTES = {
    "import_module": {"importlib"},
    "load": {"torch", "numpy", "np", "pickle", "joblib"},
    "system": {"os"},
    "popen": {"os"},
    "environ": {"os"},
    "getenv": {"os"},
    "remove": {"os"},
}
# flash-attn and its successors, by names that stand in the file
MAY_IMPORT_BY_NAME = {"dense.py"}
# the one file that may reach the Hub, when push_to_hub is called
MAY_PUSH = "push_rtpurbo.py"
# written only below the folder that save_pretrained was given; tempfile for push_to_hub
WRITES = {"write_text", "write_bytes", "mkdir", "replace", "unlink", "rename", "touch", "rmdir", "symlink_to"}
MAY_WRITE = {"checkpoint_rtpurbo.py", "export_rtpurbo.py"}


def violations(name: str, text: str) -> list[str]:
    """Lines of a file that do what remote code must not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules if not getattr(node, "level", 0) else []:
                root = module.split(".")[0]
                if root in BANNED_MODULES or (root == "os" and "environ" in [a.name for a in node.names]):
                    found.append(f"{line} imports {module}")
                if root == "huggingface_hub" and name != MAY_PUSH and [a.name for a in node.names] != ["CommitInfo"]:
                    found.append(f"{line} imports {module}")
        elif isinstance(node, ast.Name) and node.id in BANNED_NAMES and isinstance(node.ctx, ast.Load):
            found.append(f"{line} names {node.id}")
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            by_name = node.attr == "import_module" and name in MAY_IMPORT_BY_NAME
            if owner in BANNED_ATTRIBUTES.get(node.attr, ()) and not by_name:
                found.append(f"{line} uses {owner}.{node.attr}")
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            writes = called in WRITES and not (called == "replace" and len(node.args) == 2)
            if (writes or called == "open") and name not in MAY_WRITE:
                found.append(f"{line} calls {called}")
    return found


def test_remote_code_has_no_network_no_secrets_no_pickle_no_writes():
    found = [entry for name, text in code_files().items() for entry in violations(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import socket",
        "from urllib.request import urlopen",
        "import pickle",
        "import importlib\nx = importlib.import_module('y')",
        "import torch\nx = torch.load('f')",
        "import os\nx = os.environ['HF_TOKEN']",
        "from os import environ",
        "import huggingface_hub",
        "exec('1')",
        "open('f', 'w')",
        "from pathlib import Path\nPath('f').write_text('x')",
    ],
)
def test_the_check_finds_what_it_is_for(text):
    assert violations("any.py", text)


AUDIT = """
import json, os, sys
import torch, transformers
path, again, home = sys.argv[1:4]
allowed = tuple(os.path.realpath(p) for p in (again, home))
seen = []

def elsewhere(name):
    return isinstance(name, (str, bytes)) and not os.path.realpath(os.fsdecode(name)).startswith((*allowed, os.devnull))

def watch(event, args):
    if event == "open":
        mode, flags = args[1], args[2] or 0
        writes = (isinstance(mode, str) and any(c in mode for c in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
        if writes and elsewhere(args[0]):
            seen.append(["write", str(args[0])])
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "shutil.rmtree"):
        if elsewhere(args[0]):
            seen.append([event, str(args[0])])
    elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "os.system", "os.exec",
                   "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "urllib.Request"):
        seen.append([event, str(args)[:200]])

class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("transformers_modules"):
                if key in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
                    seen.append(["environ", key])
                break
            frame = frame.f_back
        return super().__getitem__(key)

os.environ.__class__ = Watched
sys.addaudithook(watch)
model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
model.generate(torch.arange(3, 23)[None], max_new_tokens=8, do_sample=False)
model.save_pretrained(again)
print("\\n" + json.dumps([type(model).__module__, seen]))
"""
MISCHIEF = """
import os as _os
import socket as _socket
_token = _os.environ.get("HF_TOKEN")
_socket.socket().connect_ex(("127.0.0.1", 9))
open({stray!r}, "w").close()
"""


def audited(tmp_path: Path, path: Path) -> list:
    """What the remote code in `path` did when it was loaded, used and saved: (event, detail)."""
    home = tmp_path / "hf"
    home.mkdir()
    command = [sys.executable, "-S", "-P", "-B", "-c", AUDIT, str(path), str(tmp_path / "again"), str(home)]
    variables = {**bare_environment(tmp_path), "HF_TOKEN": "secret", "TMPDIR": str(home)}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(home / "inductor")  # torch makes it as soon as anything is compiled
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    module, seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert module.startswith("transformers_modules.")
    return seen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    tiny_base().save_pretrained(folder / "base")
    model = converted(folder / "base")
    model.save_pretrained(folder / "adapter", adapter_only=True)
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")
    return folder


def test_audit_load_generate_and_save(checkpoints, tmp_path):
    """No socket, no process, no write outside the folder that save_pretrained was given and the module cache."""
    assert audited(tmp_path, checkpoints / "adapter") == []


def test_the_audit_sees_what_it_is_for(checkpoints, tmp_path):
    folder = copy(checkpoints, tmp_path, "adapter")
    with (folder / "padding_rtpurbo.py").open("a") as file:
        file.write(MISCHIEF.format(stray=str(tmp_path / "stray")))
    assert {entry[0] for entry in audited(tmp_path, folder)} == {"write", "socket.connect", "environ"}


# ---- weight files


def weight_file(folder: Path) -> Path:
    return sorted(folder.glob("model*.safetensors"))[0]


def copy(checkpoints: Path, tmp_path: Path, shape: str) -> Path:
    target = tmp_path / shape
    target.mkdir()
    for path in (checkpoints / shape).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("shape", ["full", "sharded"])
@pytest.mark.parametrize("damage", ["truncated", "length flipped", "header flipped", "empty"])
def test_damaged_full_weights_name_the_file(checkpoints, tmp_path, shape, damage):
    folder = copy(checkpoints, tmp_path, shape)
    file = weight_file(folder)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[:-64]
    elif damage == "empty":
        data = bytearray()
    else:
        position = 0 if damage == "length flipped" else data.index(b"data_offsets") + 1
        data[position] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(ValueError, match=file.name):
        RTPurboForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shape", ["full", "sharded"])
@pytest.mark.parametrize("kind", ["q_proj.weight", ".indexer.q_proj"])
def test_wrong_shape_names_file_and_key(checkpoints, tmp_path, shape, kind):
    folder = copy(checkpoints, tmp_path, shape)
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(file)
        key = next((k for k in tensors if k.endswith(kind)), None)
        if key is not None:
            break
    tensors[key] = tensors[key][..., :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{file.name}: {key} has shape"):
        RTPurboForCausalLM.from_pretrained(folder)


def test_missing_base_weight_names_the_key(checkpoints, tmp_path):
    """transformers fills what is missing with random numbers and warns."""
    folder = copy(checkpoints, tmp_path, "full")
    file = weight_file(folder)
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("up_proj.weight"))
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing \['{key}'"):
        RTPurboForCausalLM.from_pretrained(folder)


def test_indexer_that_is_not_finite_is_refused_in_full_weights(checkpoints, tmp_path):
    folder = copy(checkpoints, tmp_path, "full")
    file = weight_file(folder)
    tensors = load_file(file)
    key = next(k for k in tensors if ".indexer." in k)
    tensors[key].view(-1)[0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} holds values that are not finite"):
        RTPurboForCausalLM.from_pretrained(folder)


def test_one_flipped_bit_in_the_indexer_names_the_key(checkpoints, tmp_path):
    """safetensors has no check sums; the indexer's file carries its own."""
    folder = copy(checkpoints, tmp_path, "adapter")
    file = folder / "rtpurbo_indexer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x01
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"rtpurbo_indexer\.safetensors: .*indexer\..* does not have the digest"):
        RTPurboForCausalLM.from_pretrained(folder)


def test_index_cannot_name_files_elsewhere(checkpoints, tmp_path):
    folder = copy(checkpoints, tmp_path, "sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../full/model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"only \.safetensors files beside the index"):
        RTPurboForCausalLM.from_pretrained(folder)


def test_pickled_weights_are_never_read(checkpoints, tmp_path):
    folder = copy(checkpoints, tmp_path, "full")
    tensors = load_file(weight_file(folder))
    weight_file(folder).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        RTPurboForCausalLM.from_pretrained(folder)


# ---- names, versions


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../b",
        "/etc",
        "~/x",
        "a/b/c",
        "a\\b/c",
        ".hidden/x",
        "a/..",
        "",
        "gpt2",
        None,
        3,
        "a/" + "b" * 300,
        "a b/c",
    ],
)
def test_names_that_are_no_hub_ids(name):
    assert not is_hub_id(name)


def test_hub_ids():
    assert all(map(is_hub_id, ["Qwen/Qwen3-0.6B", "a/b", "meta-llama/Llama_3.1"]))


def test_base_config_cannot_bring_code():
    """An auto_map inside base_config would name someone else's code."""
    values = {**BASE, "auto_map": {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}}
    model = RTPurboForCausalLM(RTPurboConfig(base_config=values, retrieval_heads=HEADS))
    assert type(model.model).__module__.startswith("transformers.models.llama")


def test_older_config_is_migrated_step_by_step(monkeypatch, tmp_path):
    def from_zero(values):
        window = values.pop("window")
        return {**values, "sliding_window": window}

    monkeypatch.setitem(versions_rtpurbo.MIGRATIONS, 0, from_zero)
    old = {"model_type": "rtpurbo", "format_version": 0, "base_config": BASE, "window": 77, "retrieval_heads": HEADS}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = RTPurboConfig.from_pretrained(tmp_path)
    assert (config.sliding_window, config.format_version) == (77, 1)
    assert not hasattr(config, "window")


def test_version_without_a_migration_is_refused():
    with pytest.raises(ValueError, match="format_version -3, the oldest that this code reads is 1"):
        RTPurboConfig.from_dict({"format_version": -3, "base_config": BASE})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer in"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer in"),
        ({"vocab_size": 10**15}, "vocab_size must be an integer in"),
        ({"hidden_size": "32"}, "hidden_size must be an integer in"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings must be an integer in"),
        ({"some_number": 10**30}, "some_number is"),
    ],
)
def test_absurd_base_sizes_are_refused_before_anything_is_built(values, message):
    with pytest.raises(ValueError, match=message):
        RTPurboConfig.from_dict({"base_config": {**BASE, **values}})


# ---- fuzzing: every input is accepted or refused with a ValueError

CASES = 500
FUZZ = settings(
    max_examples=CASES, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 10**18, 10**400]),
    st.floats(),
    st.booleans(),
    st.none(),
)
TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["", "../..", "/etc/passwd", "0", "llama", "head", "\0", "nan"]))
LEAVES = st.one_of(NUMBERS, TEXT)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)
ROW = st.one_of(
    st.lists(st.integers(-1, 5), max_size=5), st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4), JSON
)


def fuzz(inputs: st.SearchStrategy, parse: Callable[[Any], Any]) -> None:
    """Feed `CASES` inputs to a parser: each is accepted or refused with a ValueError, within a GiB and two seconds."""
    outcomes = set()

    @FUZZ
    @given(inputs)
    def case(value):
        try:
            parse(value)
        except ValueError:
            outcomes.add("refused")
        else:
            outcomes.add("accepted")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    try:
        case()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert outcomes == {"accepted", "refused"}


def mutated(record: dict, keys: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    """The record with some of its values replaced, removed, or joined by others."""
    changes = st.dictionaries(keys, st.one_of(JSON, ROW, st.lists(ROW, min_size=4, max_size=4)), max_size=3)
    removed = st.lists(keys, max_size=1)
    return st.builds(lambda c, r: {k: v for k, v in {**record, **c}.items() if k not in r}, changes, removed)


GOOD = {"base_config": BASE, "retrieval_heads": HEADS, "sliding_window": 8, "format_version": 1}
CONFIG_KEYS = st.one_of(st.sampled_from(sorted(RTPurboConfig(**GOOD).to_dict())), TEXT)
BASE_KEYS = st.one_of(st.sampled_from(sorted(BASE)), TEXT)


def test_fuzz_config():
    fuzz(mutated(GOOD, CONFIG_KEYS), RTPurboConfig.from_dict)


def test_fuzz_base_config():
    fuzz(mutated(BASE, BASE_KEYS), lambda values: RTPurboConfig.from_dict({**GOOD, "base_config": values}))


SIZE = {"num_layers": 4, "num_heads": 4}
HEADWISE = {"sink_token_num": 4, "swa_token_num": 8, "seqlen_threshold": 0} | {str(i): [0, 1, 1, 0] for i in range(4)}
HEADWISE_KEYS = st.one_of(st.sampled_from(sorted(HEADWISE)), TEXT)


def test_fuzz_headwise():
    fuzz(st.one_of(mutated(HEADWISE, HEADWISE_KEYS), JSON), lambda record: import_headwise(record, **SIZE))


def test_fuzz_plain_heads():
    lists = st.lists(st.lists(st.integers(-1, 4), max_size=3), min_size=4, max_size=4)
    keys = st.one_of(st.sampled_from(["retrieval_heads", "sliding_window", "dense_below"]), TEXT)
    inputs = st.one_of(lists, st.lists(ROW, min_size=3, max_size=5), mutated({"retrieval_heads": HEADS}, keys), JSON)
    fuzz(inputs, lambda record: import_plain(record, **SIZE))


def test_fuzz_duo():
    numbers = st.lists(
        st.lists(st.floats(-1, 2).map(repr), min_size=2, max_size=2).map("\t".join), min_size=4, max_size=4
    )
    noise = st.text(alphabet="0123456789.eE+-\t\n naif_", max_size=60)
    fuzz(st.one_of(numbers.map("\n".join), noise, st.text(max_size=60)), lambda text: import_duo(text, **SIZE))


def test_fuzz_json_text():
    noise = st.text(alphabet='[]{}:,"019.eE+-ntruefalsNI ', max_size=40)
    fuzz(st.one_of(JSON.map(json.dumps), noise, st.text(max_size=60)), lambda text: parse_json(text, "text"))


CALIBRATION = Calibration(
    scores=((0.5, 0.25, 0.0, 1.0), (), (0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 0.25, 0.0)),
    retrieval_heads=((0,), (), (1, 3), (2,)),
    ratio=0.25,
    granularity="head",
    num_kv_heads=2,
    seed=0,
    needle=Needle((5, 6, 7), 64, "three tokens"),
    positions=((64, 67, 300, 303),),
    document_hashes=("0" * 64,),
    context=(303,),
)


@pytest.fixture(scope="module")
def calibration_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    CALIBRATION.save(path)
    assert Calibration.load(path) == CALIBRATION
    return path


def test_fuzz_calibration(calibration_file):
    good = json.loads(calibration_file.read_text())
    keys = st.one_of(st.sampled_from(sorted(good)), TEXT)
    path = calibration_file.with_name("fuzzed.json")

    def parse(record):
        path.write_text(json.dumps(record))
        Calibration.load(path)

    fuzz(st.one_of(mutated(good, keys), JSON), parse)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_deep_json_is_refused(tmp_path, depth):
    nested = json.dumps(0)
    nested = "[" * depth + nested + "]" * depth
    path = tmp_path / "calibration.json"
    path.write_text(nested)
    with pytest.raises(ValueError, match="calibration"):
        Calibration.load(path)
    with pytest.raises(ValueError, match=r"nested too deeply|not readable JSON"):
        RTPurboConfig.from_dict({**GOOD, "extra": parse_json(nested, "extra")})
