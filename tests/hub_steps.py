"""What test_hub.py runs against its server in processes of their own: `python hub_steps.py FOLDER`, HF_ENDPOINT set.

Each step's outcome goes to FOLDER/outcome.json, so that the tests can look at it one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from families import tiny_base
from huggingface_hub import HfApi
from small_tokenizer import small_tokenizer
from transformers import AutoConfig

from rtpurbo_hf.auto import RTPurboConfig, RTPurboForCausalLM
from rtpurbo_hf.hub import push
from rtpurbo_hf.training.calibration import Calibration, Needle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IDS = torch.arange(3, 43)[None]
HEADS = [[0], [], [1, 3], [2]]
REPORT: dict[str, Any] = {
    "model": "alice/base",
    "data": "alice/texts",
    "settings": {"context": 4096, "sliding_window": 8, "index_dim": 8},
    "retrieval_heads": 4,
    "query_heads": 16,
    "dense": {"perplexity": 9.5, "kl": 0.0, "top1_agreement": 1.0, "retrieval_accuracy": 0.75},
    "streaming": {"perplexity": 12.5, "kl": 0.5, "top1_agreement": 0.5, "retrieval_accuracy": 0.0},
    "rtpurbo": {"perplexity": 9.75, "kl": 0.03125, "top1_agreement": 0.875, "retrieval_accuracy": 0.625},
    "environment": {"command": "rtpurbo adapt alice/base --output run", "commit": "0123abc", "device": "a test"},
}


def greedy(model) -> list[int]:
    return model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, 40:].tolist()


# not the base's: it shows whose generation config was taken
PENALTY = 1.25


def wrapped(base: str, *, seed: int, name: str | None = None, revision: str | None = None) -> RTPurboForCausalLM:
    config = RTPurboConfig(
        base_config=AutoConfig.from_pretrained(base),
        base_model_name_or_path=name,
        base_model_revision=revision,
        retrieval_heads=HEADS,
        sliding_window=8,
        num_sink_tokens=2,
        index_dim=8,
        index_top_p=0.5,
    )
    model = RTPurboForCausalLM.from_pretrained(base, config=config, **({"revision": revision} if revision else {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for indexer in model.indexers().values():
            indexer.q_proj.normal_(generator=generator)
            indexer.k_proj.normal_(generator=generator)
    model.generation_config.update(do_sample=False, repetition_penalty=PENALTY)
    return model.eval()


def calibration() -> Calibration:
    return Calibration(
        scores=tuple(tuple(0.5 if head in row else 0.25 for head in range(4)) for row in HEADS),
        retrieval_heads=tuple(map(tuple, HEADS)),
        ratio=0.25,
        granularity="head",
        num_kv_heads=2,
        seed=0,
        needle=Needle((5, 6, 7), 64, "three tokens"),
        positions=((64, 67, 300, 303),),
        document_hashes=(hashlib.sha256(b"document").hexdigest(),),
        context=(303,),
    )


def make_run(folder: Path, model: RTPurboForCausalLM) -> Path:
    """A folder as `rtpurbo adapt` leaves it, with things in it that must never be pushed."""
    adapter, report = folder / "adapter", folder / "report"
    model.save_pretrained(adapter, adapter_only=True)
    small_tokenizer().save_pretrained(adapter)
    calibration().save(adapter / "calibration.json")
    (adapter / "training_args.bin").write_bytes(b"\0pickle")
    (adapter / ".env").write_text("SECRET=1")
    (folder / "trainer").mkdir()
    (folder / "trainer" / "optimizer.pt").write_bytes(b"\0")
    report.mkdir()
    (report / "report.json").write_text(json.dumps(REPORT))
    figure = plt.figure(figsize=(1, 1))
    figure.savefig(report / "heads.png")
    return folder


def refusal(action: Callable[[], Any]) -> str:
    with contextlib.suppress(StopIteration):
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def publish_base(work: Path, api: HfApi, outcome: dict[str, Any]) -> None:
    """alice/base in two commits with different weights; the adapters pin the first."""
    api.create_repo("alice/base")
    for number, seed in enumerate((1, 2)):
        folder = work / f"base{seed}"
        tiny_base(seed=seed).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# b\n")
        done = api.upload_folder(repo_id="alice/base", folder_path=folder, commit_message=f"weights {seed}")
        outcome[f"base_commit_{number}"] = done.oid


def main(work: Path) -> None:
    api, outcome = HfApi(), {}
    publish_base(work, api, outcome)
    pinned = outcome["base_commit_0"]
    first = wrapped("alice/base", seed=3, name="alice/base", revision=pinned)
    second = wrapped("alice/base", seed=4, name="alice/base", revision=pinned)
    outcome["tokens"], outcome["tokens_exp"] = greedy(first), greedy(second)
    run, other = make_run(work / "run", first), make_run(work / "other", second)

    planned = push(run, "alice/planned", dry_run=True).package
    outcome["planned"] = [[file.path, file.size] for file in planned.files]
    planned.write(work / "written")
    outcome["written"] = sorted(str(p.relative_to(work / "written")) for p in (work / "written").rglob("*.*"))
    done = push(run, "alice/adapter", commit_message="an adapter")
    outcome["adapter_commit"] = done.commit.oid
    push(other, "alice/adapter", revision="exp")
    outcome["bob_refused"] = refusal(lambda: push(other, "alice/adapter", token="bob-token"))
    outcome["pr_url"] = push(other, "alice/adapter", create_pr=True, token="bob-token").commit.pr_url
    push(run, "alice/secret", private=True)
    outcome["dry_full"] = [
        [f.path, f.size] for f in push(run, "alice/full", weights="full", dry_run=True).package.files
    ]
    push(run, "alice/full", weights="full", max_shard_size="40KB")
    push(run, "alice/switched")
    push(run, "alice/switched", weights="full")
    outcome["storage_refused"] = refusal(lambda: push(run, "alice/closed"))

    first.push_to_hub("alice/by-model", adapter_only=True, tags=["mine"], private=True, commit_message="by the model")
    first.push_to_hub("alice/by-model", adapter_only=True, tags=["yours"])
    first.save_pretrained(work / "by-save", push_to_hub=True, repo_id="alice/by-save", commit_message="by saving")
    first.push_to_hub("alice/adapter", adapter_only=True, create_pr=True, token="bob-token")

    (work / "base1" / "NOTICE.md").write_text("terms")
    (work / "base1" / "rtpurbo_source.json").write_text('{"sha256": "0", "license": "mit", "upstream": "alice/up"}')
    local = wrapped(str(work / "base1"), seed=3, name=str(work / "base1"))
    nowhere = make_run(work / "nowhere", local)
    outcome["local_base"] = list(push(nowhere, "alice/nowhere", dry_run=True).package.problems)
    outcome["local_base_refused"] = refusal(lambda: push(nowhere, "alice/nowhere"))
    outcome["local_base_model_refused"] = refusal(lambda: local.push_to_hub("alice/nowhere", adapter_only=True))
    local.push_to_hub("alice/local-full")
    push(nowhere, "alice/rebased", base="alice/base", base_revision=pinned)
    push(nowhere, "alice/unpinned", base="alice/base")
    push(nowhere, "alice/nameless", weights="full")

    evil = wrapped("alice/base", seed=3, name="alice/base", revision=pinned)
    evil.config.base_model_name_or_path = "../" + str(work / "base1")
    evil.save_pretrained(work / "evil", adapter_only=True)
    api.create_repo("alice/evil")
    api.upload_folder(repo_id="alice/evil", folder_path=work / "evil")
    (work / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
