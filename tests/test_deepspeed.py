"""DeepSpeed ZeRO 1 and 2 as the Trainer gives them: two gloo processes on the CPU against one without DeepSpeed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import test_distillation as two
import test_sharded_training as sharded
import torch

from rtpurbo_hf.training.checkpoints import last_checkpoint
from rtpurbo_hf.training.distillation import SelfDistillationTrainer
from rtpurbo_hf.training.stage_trainer import leave_process_group

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage):
    """`TrainingArguments(deepspeed=...)`; batch sizes and clipping are the arguments'."""
    same = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **dict.fromkeys(same, "auto")}}


def _zero3(folder):
    # before the arguments: with them, transformers begins to shard what is built
    model, items = two.wrapped(), two.blocks(1)
    arguments = two.arguments(folder, ddp_backend="gloo", **zero(3))
    with pytest.raises(ValueError, match="ZeRO-3 is not supported") as caught:
        SelfDistillationTrainer(model, arguments, items)
    return str(caught.value).partition(":")[0]


def _worker(folder):
    import deepspeed

    # gloo alone does: without this, a C++ extension is compiled first, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    folder, found = Path(folder), {}
    run = {
        "stage1": lambda: sharded.stage1(folder / "stage1", processes=2, **zero(2)),
        "zero1": lambda: sharded.stage2(folder / "zero1", processes=2, **zero(1)),
        "zero2": lambda: sharded.stage2(folder / "zero2", processes=2, **zero(2)),
        "lora": lambda: sharded.stage2(folder / "lora", processes=2, lora_rank=4, **zero(2)),
        "resumed": lambda: sharded.stage2(
            folder / "resumed", processes=2, resume=str(folder / "zero2" / "checkpoint-2"), **zero(2)
        ),
        "zero3": lambda: _zero3(folder / "zero3"),
    }
    for name, case in run.items():
        found[name] = case()
        print("done", name, flush=True)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    codes, log = sharded.start("work", folder, script=__file__, DS_ACCELERATOR="cpu")
    assert codes == [0, 0], log
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_stage1_equals_one_process(tmp_path, ranks):
    single = sharded.stage1(tmp_path, processes=1)
    for rank in ranks[1]:
        assert rank["stage1"]["losses"] == pytest.approx(single["losses"], rel=1e-5)
        two.assert_equal(rank["stage1"]["weights"], single["weights"], atol=1e-5)


@pytest.mark.parametrize("name", ["zero1", "zero2", "lora"])
def test_stage2_equals_one_process(tmp_path, ranks, name):
    single = sharded.stage2(tmp_path, processes=1, lora_rank=4 if name == "lora" else 0)
    found = ranks[1][0][name]
    assert found["losses"] == pytest.approx(single["losses"], rel=1e-5)
    two.assert_equal(found["weights"], single["weights"], atol=1e-5)


def test_resume_is_bit_equal(ranks):
    folder, found = ranks
    two.assert_equal(found[0]["resumed"]["weights"], found[0]["zero2"]["weights"])
    assert last_checkpoint(folder / "zero2").name == "checkpoint-4"


def test_zero3_is_refused(ranks):
    assert [rank["zero3"] for rank in ranks[1]] == ["ZeRO-3 is not supported"] * 2


if __name__ == "__main__":
    {"work": _worker}[sys.argv[1]](sys.argv[2])
