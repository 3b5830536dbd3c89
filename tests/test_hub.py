"""Pushes to a Hub on localhost with the stock client, and loads from it in a process without our package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from hub_server import HubServer
from test_checkpoint import bare_environment
from typer.testing import CliRunner

from rtpurbo_hf import cli_hub

STEPS = Path(__file__).with_name("hub_steps.py")
INDEXER = "rtpurbo_indexer.safetensors"
CODE = {"configuration_rtpurbo.py", "modeling_rtpurbo.py", "push_rtpurbo.py"}
LOADER = """
import json, os, sys
import torch, transformers
from huggingface_hub import hf_hub_download
try:
    import rtpurbo_hf
    raise SystemExit("our package must not be importable here")
except ImportError:
    pass
outcome = {}
for label, (repo, options) in json.loads(sys.argv[1]).items():
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **options)
        ids = torch.arange(3, 43)[None]
        tokens = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, 40:].tolist()
        outcome[label] = [tokens, type(model).__module__, model.config._name_or_path]
        outcome["penalty " + label] = model.generation_config.repetition_penalty
    except Exception as error:
        outcome[label] = f"{type(error).__name__}: {error}"
tokenizer = transformers.AutoTokenizer.from_pretrained("alice/adapter")
outcome["tokenizer"] = tokenizer.decode(tokenizer("import argparse")["input_ids"])
print("\\n" + json.dumps(outcome))
"""
LOADS = {
    "main": ("alice/adapter", {}),
    "branch": ("alice/adapter", {"revision": "exp"}),
    "commit": ("alice/adapter", {"revision": "ADAPTER_COMMIT"}),
    "pull request": ("alice/adapter", {"revision": "refs/pr/1"}),
    "full": ("alice/full", {}),
    "switched": ("alice/switched", {}),
    "private": ("alice/secret", {"token": "alice-token"}),
    "private to others": ("alice/secret", {"token": "bob-token"}),
    "private to all": ("alice/secret", {"token": False}),
    "by model": ("alice/by-model", {"token": "alice-token"}),
    "by save": ("alice/by-save", {}),
    "rebased": ("alice/rebased", {}),
    "unpinned": ("alice/unpinned", {}),
    "nameless": ("alice/nameless", {}),
    "evil": ("alice/evil", {}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(work):
    with HubServer(work / "server") as server:
        server.closed.add("alice/closed")
        yield server


def client(hub: HubServer, **more: str) -> dict[str, str]:
    """Settings of the stock client: this server, and the upload way that it serves."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


@pytest.fixture(scope="module")
def outcome(hub, work):
    folders = os.pathsep.join([str(STEPS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = client(hub, HF_TOKEN="alice-token", HF_HOME=str(work / "home"), PYTHONPATH=folders)
    done = subprocess.run(
        [sys.executable, str(STEPS), str(work)],
        env={**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "outcome.json").read_text())


@pytest.fixture(scope="module")
def loaded(hub, outcome, work):
    folder = work / "clean"
    folder.mkdir()
    variables = {**bare_environment(folder), **client(hub)}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        variables.pop(name, None)
    wanted = json.dumps(LOADS).replace("ADAPTER_COMMIT", outcome["adapter_commit"])
    before = len(hub.log)
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", LOADER, wanted],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["requests"] = [path for _, path, _ in hub.log[before:]]
    return found


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("main", "tokens"),
        ("branch", "tokens_exp"),
        ("commit", "tokens"),
        ("pull request", "tokens_exp"),
        ("full", "tokens"),
        ("switched", "tokens"),
        ("private", "tokens"),
        ("by model", "tokens"),
        ("by save", "tokens"),
        ("rebased", "tokens"),
        ("nameless", "tokens"),
    ],
)
def test_clean_process_loads_and_generates_the_same(outcome, loaded, label, expected):
    assert outcome["tokens"] != outcome["tokens_exp"], "else the branches could not be told apart"
    assert isinstance(loaded[label], list), loaded[label]
    tokens, module, name = loaded[label]
    assert tokens == outcome[expected]
    assert module.startswith("transformers_modules.")
    assert name == LOADS[label][0]


def test_base_comes_from_the_same_hub_at_the_pinned_revision(outcome, loaded):
    """The base has moved on since; without a pin, other weights are loaded."""
    first, second = outcome["base_commit_0"], outcome["base_commit_1"]
    resolved = [path for path in loaded["requests"] if path.startswith("/alice/base/resolve/")]
    assert any(f"/{first}/model.safetensors" in path for path in resolved)
    assert any(f"/{second}/model.safetensors" in path for path in resolved), "the push pinned what main was then"
    assert not any("/resolve/main/" in path for path in resolved), resolved
    assert loaded["unpinned"][0] != outcome["tokens"]


def test_generation_config_is_the_checkpoints_own(loaded):
    """Adapters took the base's."""
    assert loaded["penalty main"] == loaded["penalty full"] == 1.25


@pytest.mark.parametrize("label", ["private to others", "private to all"])
def test_private_repositories_stay_private(loaded, label):
    assert "alice/secret" in loaded[label]
    assert isinstance(loaded[label], str)


def test_tokenizer_travels(loaded):
    assert loaded["tokenizer"] == "import argparse"


def test_path_as_base_is_not_followed_from_the_hub(loaded):
    assert loaded["evil"].startswith("ValueError: the Hub repository alice/evil names '../")


def test_one_commit_holds_everything(hub, outcome):
    assert hub.store.history("alice/adapter") == ["an adapter", "initial commit"]
    files = hub.store.files("alice/adapter")
    wanted = {"config.json", "generation_config.json", INDEXER, "tokenizer.json", "calibration.json"}
    wanted |= {"report.json", "README.md", "figures/heads.png", *CODE}
    assert wanted <= set(files)
    assert {name for name, entry in files.items() if "lfs" in entry} == {
        INDEXER,
        "figures/heads.png",
        "figures/memory.png",
    }
    for left in ("training_args.bin", ".env", "optimizer.pt", "model.safetensors"):
        assert not any(left in name for name in files)


def test_dry_run_lists_what_then_goes(hub, outcome):
    assert "alice/planned" not in hub.store.repositories
    planned = dict(outcome["planned"])
    pushed = {name: entry["size"] for name, entry in hub.store.files("alice/adapter").items()}
    assert set(planned) == set(pushed) == set(outcome["written"])
    assert {n: s for n, s in planned.items() if n != "README.md"} == {
        n: s for n, s in pushed.items() if n != "README.md"
    }


def test_no_file_names_a_path_of_the_machine(hub, outcome, work):
    for repo in ("alice/adapter", "alice/full", "alice/nameless", "alice/rebased", "alice/local-full"):
        for name, entry in hub.store.files(repo).items():
            if "lfs" not in entry:
                assert str(work).encode() not in hub.store.content(entry), f"{repo}/{name}"


def test_full_push_is_sharded_and_predicted(hub, outcome):
    files = hub.store.files("alice/full")
    shards = {name: entry["size"] for name, entry in files.items() if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert "model.safetensors.index.json" in files
    assert INDEXER not in files
    predicted = dict(outcome["dry_full"])["model.safetensors"]
    assert predicted < sum(shards.values()) < 1.5 * predicted, "headers only"


def test_change_of_shape_leaves_no_old_weights(hub, outcome):
    files = hub.store.files("alice/switched")
    assert INDEXER not in files
    assert "model.safetensors" in files
    assert len(hub.store.history("alice/switched")) == 3


def test_pull_request_leaves_main_alone(hub, outcome):
    repo = hub.store.repositories["alice/adapter"]
    assert repo.refs["refs/heads/main"] == outcome["adapter_commit"]
    assert outcome["pr_url"].endswith("/alice/adapter/discussions/1")
    assert {"refs/pr/1", "refs/pr/2", "refs/heads/exp"} <= set(repo.refs)
    assert "403" in outcome["bob_refused"]


def test_private_flag_reaches_the_hub(hub, outcome):
    private = {name for name, repo in hub.store.repositories.items() if repo.private}
    assert private == {"alice/secret", "alice/by-model"}


def test_failed_upload_commits_nothing(hub, outcome):
    assert "storage is full" in outcome["storage_refused"]
    assert hub.store.history("alice/closed") == ["initial commit"]


def test_model_methods_commit_once_with_code(hub, outcome):
    assert hub.store.history("alice/by-model") == ["Upload RTPurbo model", "by the model", "initial commit"]
    assert hub.store.history("alice/by-save") == ["by saving", "initial commit"]
    assert {*CODE, INDEXER, "config.json", "README.md"} <= set(hub.store.files("alice/by-model"))
    saved = hub.store.files("alice/by-save")
    assert {*CODE, "model.safetensors", "config.json", "README.md"} <= set(saved)


def metadata(hub: HubServer, repo: str) -> dict:
    text = hub.store.content(hub.store.files(repo)["README.md"]).decode()
    return yaml.safe_load(text.split("---\n", 2)[1])


def test_cards_on_the_hub(hub, outcome):
    card = metadata(hub, "alice/adapter")
    assert card["base_model"] == "alice/base"
    assert card["base_model_relation"] == "adapter"
    assert (card["license"], card["license_name"], card["license_link"]) == ("other", "tiny", "LICENSE")
    assert card["datasets"] == ["alice/texts"]
    metrics = [metric for result in card["model-index"][0]["results"] for metric in result["metrics"]]
    assert 9.75 in [metric["value"] for metric in metrics]
    mine = metadata(hub, "alice/by-model")
    assert {"rtpurbo", "mine", "yours"} <= set(mine["tags"])
    assert mine["base_model"] == "alice/base"


def test_full_weights_of_a_local_base_carry_its_terms(hub, outcome):
    assert hub.store.content(hub.store.files("alice/nameless")["NOTICE.md"]) == b"terms"
    card = metadata(hub, "alice/nameless")
    assert card["license"] == "mit"
    assert card["base_model"] == "alice/up"
    assert "NOTICE.md" not in hub.store.files("alice/rebased")


def test_push_command_lists_a_dry_run(work, outcome):
    app = typer.Typer()
    cli_hub.register(app)
    done = CliRunner().invoke(app, ["push", str(work / "nowhere"), "me/x", "--dry-run", "--license", "mit"])
    assert done.exit_code == 0, done.output
    listed = {
        line.split()[1]: int(line.split()[0].replace(",", "")) for line in done.output.splitlines() if ".p" in line
    }
    assert {"modeling_rtpurbo.py", "figures/heads.png"} <= set(listed)
    assert listed["figures/heads.png"] == (work / "nowhere" / "report" / "heads.png").stat().st_size
    assert "a push would be refused: the adapter names its base as" in done.output


def test_adapter_on_a_local_base_is_refused(hub, outcome):
    assert "alice/nowhere" not in hub.store.repositories
    for message in (*outcome["local_base"], outcome["local_base_refused"], outcome["local_base_model_refused"]):
        assert "nobody else can load" in message
