"""Two processes over gloo: FSDP2 in both stages, and the rows of a document shared in stage 1, against one process."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_distillation as two
import test_indexer_trainer as one
import torch
from safetensors.torch import load_file

from rtpurbo_hf.modeling.checkpoint_rtpurbo import INDEXER_FILE
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.checkpoints import last_checkpoint
from rtpurbo_hf.training.distillation import ADAPTER_FILE, SelfDistillationTrainer
from rtpurbo_hf.training.indexer_trainer import IndexerTrainer
from rtpurbo_hf.training.stage_trainer import leave_process_group

FSDP = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
STEPS = {"max_steps": 4, "save_steps": 2, "save_total_limit": 3}


def _sharded():
    """accelerate turns FSDP on for accelerators only (`AcceleratorState` leaves MULTI_CPU alone): say it is one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def stage1(folder, *, processes, **options):
    """Losses, indexers and metrics of a run; several processes see what one accumulates, or share its rows."""
    shared = options.get("shard_rows", False)
    steps = 1 if shared or processes == 2 else 2
    settings = {**STEPS, "gradient_accumulation_steps": options.pop("accumulation", steps), **options}
    args = one.arguments(folder, **settings, **({"ddp_backend": "gloo"} if processes == 2 else {}))
    if "fsdp" in options:
        _sharded()
    model = one.wrapped()
    trainer = IndexerTrainer(model, args, one.blocks(8), one.blocks(3, seed=5))
    assert trainer.is_fsdp_enabled == ("fsdp" in options)
    trainer.train()
    metrics = {k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k}
    return {"losses": one.losses(trainer), "weights": one.weights(trainer.model), "metrics": metrics}


def stage2(folder, *, processes, resume=None, **options):
    steps = 1 if processes == 2 else 2
    settings = {**STEPS, "gradient_accumulation_steps": steps, **options}
    args = two.arguments(folder, **settings, **({"ddp_backend": "gloo"} if processes == 2 else {}))
    if "fsdp" in options:
        _sharded()
    trainer = SelfDistillationTrainer(two.wrapped(), args, two.blocks())
    assert trainer.is_fsdp_enabled == ("fsdp" in options)
    trainer.train(resume_from_checkpoint=resume)
    sharded = [type(p).__name__ for p in trainer.model.parameters()].count("DTensor")
    assert (sharded > 0) == ("fsdp" in options)
    whole = trainer.whole_weights()
    found = {"losses": two.losses(trainer), "sharded": sharded}
    if trainer.is_world_process_zero():
        found["weights"] = {k: v.clone() for k, v in trainer.trained_model(whole).state_dict().items()}
    return found


def _killed(folder):
    """The first process dies while it writes the weights of step 4."""
    import transformers.modeling_utils as place

    good = place.safe_save_file

    def save(tensors, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return good(tensors, path, *args, **kwargs)

    place.safe_save_file = save
    stage2(Path(folder) / "killed", processes=2, **FSDP)


def _goes_on(folder):
    found = stage2(Path(folder) / "killed", processes=2, resume=True, **FSDP)
    if "weights" in found:
        torch.save(found["weights"], Path(folder) / "goes-on.pt")
    leave_process_group()


def _worker(folder):
    folder, found = Path(folder), {}
    run = {
        "rows": lambda: stage1(folder / "rows", processes=2, shard_rows=True),
        "rows-cached": lambda: stage1(folder / "rows-cached", processes=2, shard_rows=True, cache_activations=True),
        "stage1": lambda: stage1(folder / "stage1", processes=2, **FSDP),
        "full": lambda: stage2(folder / "full", processes=2, **FSDP),
        "resumed": lambda: stage2(
            folder / "resumed", processes=2, resume=str(folder / "full" / "checkpoint-2"), **FSDP
        ),
        "lora": lambda: stage2(folder / "lora", processes=2, lora_rank=4, **FSDP),
        "lora-resumed": lambda: stage2(
            folder / "lora-resumed", processes=2, lora_rank=4, resume=str(folder / "lora" / "checkpoint-2"), **FSDP
        ),
    }
    for name, case in run.items():
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        found[name] = case()
        print("done", name, flush=True)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    leave_process_group()


def start(what, folder, *, script=__file__, **environment):
    """Two processes of a script that do `what` in `folder`; their exit codes, and the ends of their logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs, running = [folder / f"{what}-{rank}.txt" for rank in range(2)], []
    for rank, log in enumerate(logs):
        variables = {
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        # files, not pipes: a full pipe of one process would stop both
        with log.open("w") as stream:
            command = [sys.executable, script, what, str(folder)]
            running.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    return codes, "".join(log.read_text()[-5000:] for log in logs)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found, by case; and their folder."""
    folder = tmp_path_factory.mktemp("sharded")
    codes, log = start("work", folder)
    assert codes == [0, 0], log
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("cached", [False, True])
def test_processes_that_share_rows_equal_one(tmp_path, ranks, cached):
    single = stage1(tmp_path, processes=1, accumulation=1, cache_activations=cached)
    _, found = ranks
    name = "rows-cached" if cached else "rows"
    for rank in found:
        assert rank[name]["losses"] == pytest.approx(single["losses"], rel=1e-5)
        two.assert_equal(rank[name]["weights"], single["weights"], atol=1e-5)
        assert rank[name]["metrics"]["eval_kl"] == pytest.approx(single["metrics"]["eval_kl"], rel=1e-5)


def test_stage1_with_a_sharded_backbone_equals_one_process(tmp_path, ranks):
    single = stage1(tmp_path, processes=1)
    folder, found = ranks
    for rank in found:
        assert rank["stage1"]["losses"] == pytest.approx(single["losses"], rel=1e-5)
        two.assert_equal(rank["stage1"]["weights"], single["weights"], atol=1e-5)
    saved = load_file(folder / "stage1" / INDEXER_FILE)
    two.assert_equal(saved, found[0]["stage1"]["weights"])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_stage2_with_sharded_weights_equals_one_process(tmp_path, ranks, name):
    single = stage2(tmp_path, processes=1, lora_rank=4 if name == "lora" else 0)
    folder, found = ranks
    assert found[0][name]["losses"] == pytest.approx(single["losses"], rel=1e-5)
    two.assert_equal(found[0][name]["weights"], single["weights"], atol=1e-5)
    # one checkpoint, in our form, with the weights in it once
    checkpoint = folder / name / "checkpoint-4"
    assert not list(checkpoint.glob("pytorch_model*"))
    assert len(list(checkpoint.glob("*.safetensors"))) == 1
    if name == "full":
        loaded = RTPurboForCausalLM.from_pretrained(checkpoint)
        two.assert_equal(dict(loaded.named_parameters()), found[0][name]["weights"])
    else:
        assert (checkpoint / ADAPTER_FILE).is_file()


@pytest.mark.parametrize("name", ["full", "lora"])
def test_resume_with_sharded_weights_is_bit_equal(ranks, name):
    folder, found = ranks
    resumed = found[0]["resumed" if name == "full" else "lora-resumed"]
    two.assert_equal(resumed["weights"], found[0][name]["weights"])
    assert last_checkpoint(folder / name).name == "checkpoint-4"


def test_kill_in_the_middle_of_a_save_of_sharded_weights(tmp_path, ranks):
    codes, log = start("kill", tmp_path)
    # the other one finds its peer gone
    assert codes[0] == -signal.SIGKILL, log
    assert codes[1] != 0
    assert (tmp_path / "killed" / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-2"
    codes, log = start("go-on", tmp_path)
    assert codes == [0, 0], log
    two.assert_equal(torch.load(tmp_path / "goes-on.pt", weights_only=True), ranks[1][0]["full"]["weights"])


if __name__ == "__main__":
    {"work": _worker, "kill": _killed, "go-on": _goes_on}[sys.argv[1]](sys.argv[2])
