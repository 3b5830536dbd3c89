"""Stage 2: exact gradients of the sparse forward, loss, accumulation, resume, LoRA, interruptions, two processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import everything_retrieves, tiny_base
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, TrainerCallback

from rtpurbo_hf import distill
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training import distillation
from rtpurbo_hf.training.checkpoints import last_checkpoint
from rtpurbo_hf.training.distillation import (
    ADAPTER_FILE,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    collate_labelled,
    distillation_kl,
)
from rtpurbo_hf.training.indexer_init import initialise_indexers
from rtpurbo_hf.training.stage_trainer import leave_process_group

LENGTH, WINDOW, SINKS = 64, 9, 3
HEADS = [[0, 3], [], [1], [0, 1, 2, 3]]


def wrapped(family="llama", heads=None, **options):
    base = tiny_base(family)
    settings = {"index_dim": 6, "index_rotary_dim": 2, "index_rotary_wavelengths": [4.0, 256.0], **options}
    settings = {"sliding_window": WINDOW, "num_sink_tokens": SINKS, "index_min_tokens": 4, **settings}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=heads or HEADS, **settings)
    torch.manual_seed(0)
    initialise_indexers(model, method="random")
    return model


def blocks(count=8, k=5, seed=3, length=LENGTH):
    """Items with different numbers of label rows, and a teacher that is the model's dense self."""
    generator = torch.Generator().manual_seed(seed)
    teacher, items = wrapped(), []
    for i in range(count):
        ids = torch.randint(3, 97, (length,), generator=generator)
        rows = torch.arange(length - 24 + i, length - 1)
        with torch.no_grad(), teacher.attention_mode("dense"):
            top = teacher(ids[None], use_cache=False, logits_to_keep=rows).logits[0].topk(k, -1)
        pad = (0, 0, 0, i)
        items.append(
            {
                "input_ids": ids,
                "label_rows": torch.nn.functional.pad(rows, (0, i), value=-1),
                "teacher_ids": torch.nn.functional.pad(top.indices, pad),
                "teacher_logits": torch.nn.functional.pad(top.values, pad),
                "block": torch.tensor(i),
            }
        )
    return items


def arguments(folder, **options):
    settings = {
        "max_steps": 6, "logging_steps": 1, "save_steps": 3, "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-3, "gradient_accumulation_steps": 1, **options,
    }  # fmt: skip
    return SelfDistillationArguments(output_dir=str(folder), **settings)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(a, b, **tolerance):
    for key, value in a.items():
        assert torch.allclose(value, b[key], **tolerance) if tolerance else torch.equal(value, b[key]), key


def gradients(trainer, model, items):
    model.zero_grad()
    inputs = collate_labelled(items)
    count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(items, chosen, prefill=None):
    """The loss of the base's own eager attention under explicit masks: no operation of ours. And its gradients.

    `chosen`, `prefill`: by item and layer, what retrieval heads see in label rows and in all others (None: all).
    """
    base, total, count = tiny_base("llama"), 0.0, 0
    for i, item in enumerate(items):
        ids, rows = item["input_ids"], item["label_rows"][item["label_rows"] >= 0]
        slots = torch.arange(len(ids))
        distance = slots[:, None] - slots
        causal = distance >= 0
        local = causal & ((distance < WINDOW) | (slots < SINKS))
        handles = []
        for layer, module in enumerate(base.model.layers):
            seen = local.expand(4, -1, -1).clone()
            for place, head in enumerate(HEADS[layer]):
                seen[head] = causal if prefill is None else prefill[i][layer][place]
                seen[head, rows] = chosen[i][layer][place]
            bias = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None]

            def masked(_, args, kwargs, bias=bias):
                return args, {**kwargs, "attention_mask": bias}

            handles.append(module.self_attn.register_forward_pre_hook(masked, with_kwargs=True))
        logits = base(ids[None], use_cache=False).logits[0, rows]
        for handle in handles:
            handle.remove()
        teacher = item["teacher_logits"][: len(rows)].softmax(-1)
        student = logits.gather(1, item["teacher_ids"][: len(rows)]).log_softmax(-1)
        total = total + (teacher * (teacher.log() - student)).sum()
        count += len(rows)
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in base.named_parameters()}


def test_loss_and_gradients_equal_a_plain_masked_softmax(tmp_path):
    model, items = wrapped(index_top_p=0.7), blocks(2)
    chosen = []
    for item in items:
        found = {}
        rows = item["label_rows"][item["label_rows"] >= 0]
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        mask[0, rows] = True

        def note(layer, where, selected, valid, weights, found=found):
            found[layer] = selected[0]

        model(item["input_ids"][None], decode_rows=mask, on_selection=note, use_cache=False)
        chosen.append(found)
    share = torch.cat([mask.float().mean().reshape(1) for found in chosen for mask in found.values()])
    assert share.max() < 0.8
    trainer = SelfDistillationTrainer(model, arguments(tmp_path, gradient_checkpointing=False), items)
    loss, ours = gradients(trainer, model, items)
    expected, reference = plain_loss(items, chosen)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert not any(".indexer." in name for name in ours)
    for name, grad in reference.items():
        assert (ours[f"model.{name}"] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name


def test_tiled_prefill_trains_under_its_masks(tmp_path):
    """With `retrieval_prefill="sparse_tiled"`: the loss and its gradients are those of the lists, spelled out."""
    length = 420
    model = wrapped(index_top_p=0.4, retrieval_prefill="sparse_tiled")
    items = blocks(1, length=length)
    ids, rows = items[0]["input_ids"][None], items[0]["label_rows"]
    masks = []
    for decode_rows in (torch.zeros(1, length, dtype=torch.bool).index_fill(1, rows, True), None):
        found = {}

        def note(layer, where, selected, valid, weights, found=found):
            found[layer] = torch.cat([found[layer], selected[0]], 1) if layer in found else selected[0].clone()

        model(ids, decode_rows=decode_rows, on_selection=note, use_cache=False)
        masks.append([found])
    assert {mask.shape[1] for mask in masks[1][0].values()} == {length}
    assert all(mask[:, -1].float().mean() < 0.95 for mask in masks[1][0].values())
    trainer = SelfDistillationTrainer(model, arguments(tmp_path), items)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, ours = gradients(trainer, model.train(), items)
    expected, reference = plain_loss(items, *masks)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert not any(".indexer." in name for name in ours)
    for name, grad in reference.items():
        assert (ours[f"model.{name}"] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_checkpointing_does_not_change_gradients(tmp_path, family):
    items, found = blocks(2), []
    for checkpointing in (False, True):
        model = wrapped(family, everything_retrieves(tiny_base(family)))
        trainer = SelfDistillationTrainer(model, arguments(tmp_path), items)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(trainer, model.train(), items))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1], atol=1e-7)


def test_autocast_rounds_projections_only(tmp_path):
    """Qwen3 normalises queries and keys after the projections, in fp32: all meet in 16 bits again."""
    items = blocks(2)
    found = []
    for bf16 in (False, True):
        model = wrapped("qwen3", everything_retrieves(tiny_base("qwen3")))
        trainer = SelfDistillationTrainer(model, arguments(tmp_path, bf16=bf16), items)
        with trainer.compute_loss_context_manager():
            found.append(gradients(trainer, model.train(), items))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.05)
    assert all(grad.dtype == torch.float32 for grad in found[1][1].values())


def test_autocast_reaches_what_is_rotated():
    """Regression: fp32 cos and sin made fp32 queries and keys beside 16-bit values, which local heads refused."""
    model, seen = wrapped(), []
    ids = blocks(1)[0]["input_ids"][None]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            ids, use_cache=False, observer=lambda inputs: seen.append((inputs.query.dtype, inputs.key.dtype))
        )
    output.logits.float().sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_kl_is_that_of_the_kept_entries():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(distillation_kl(student, teacher), (p * (p / q).log()).sum(-1), atol=1e-6)
    assert distillation_kl(teacher, teacher).abs().max() < 1e-6


def test_training_lowers_the_loss_and_leaves_the_indexers(tmp_path):
    model, items = wrapped(), blocks(4)
    before = weights(model)
    trainer = SelfDistillationTrainer(model, arguments(tmp_path, max_steps=30, save_strategy="no"), items, items[:2])
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * start
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == (".indexer." in name), name
    assert model.config.use_cache


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Batches with different numbers of label rows, and blocks of different lengths."""
    data, runs = blocks(8), []
    data[3]["input_ids"] = data[3]["input_ids"][:-1]
    for size, steps in ((2, 2), (4, 1), (1, 4)):
        model = wrapped()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 4}
        trainer = SelfDistillationTrainer(model, arguments(tmp_path / str(size), save_strategy="no", **options), data)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    for curve, final in runs[1:]:
        assert curve == pytest.approx(runs[0][0], rel=1e-4)
        assert_equal(final, runs[0][1], atol=2e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_is_bit_equal_and_loads(tmp_path, rank):
    options = {"lora_rank": rank, "gradient_accumulation_steps": 2, "save_steps": 2, "max_steps": 4}
    whole = wrapped()
    SelfDistillationTrainer(whole, arguments(tmp_path / "a", **options), blocks()).train()
    resumed = wrapped()
    trainer = SelfDistillationTrainer(resumed, arguments(tmp_path / "b", **options), blocks())
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_equal(weights(whole), weights(resumed))
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert not list(checkpoint.glob("*.bin"))
    ids = blocks(1)[0]["input_ids"][None]
    expected = whole.eval()(ids, use_cache=False).logits
    if rank:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(wrapped(), checkpoint)
        merged = trainer.trained_model()
        assert type(merged) is RTPurboForCausalLM
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert torch.allclose(merged(ids, use_cache=False).logits, expected, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged", adapter_only=False)
        again = RTPurboForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(again(ids, use_cache=False).logits, expected, atol=1e-5)
    else:
        loaded = RTPurboForCausalLM.from_pretrained(checkpoint)
    assert torch.allclose(loaded(ids, use_cache=False).logits, expected, atol=1e-6)
    other = SelfDistillationTrainer(wrapped(), arguments(tmp_path / "c", lora_rank=4 - rank), blocks())
    with pytest.raises(ValueError, match="Set lora_rank"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("rank", [0, 4])
def test_other_processes_than_the_first_save_nothing(tmp_path, monkeypatch, rank):
    """Regression: with FSDP each process wrote the same files, the others empty ones; who came last won."""
    trainer = SelfDistillationTrainer(wrapped(), arguments(tmp_path / "run", lora_rank=rank), blocks(1))
    monkeypatch.setattr(SelfDistillationArguments, "should_save", property(lambda self: False))
    trainer._save(str(tmp_path / "checkpoint-2"), state_dict={})
    assert not (tmp_path / "checkpoint-2").exists()
    if rank:
        (tmp_path / "checkpoint-2").mkdir()
        save_file({}, tmp_path / "checkpoint-2" / ADAPTER_FILE)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is empty"):
            trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))


def test_lora_trains_attention_projections_only(tmp_path):
    model = wrapped()
    before = weights(model)
    trainer = SelfDistillationTrainer(model, arguments(tmp_path, lora_rank=2, save_strategy="no"), blocks())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 4 * 2
    assert all("self_attn" in name and "lora_" in name for name in trained)
    trainer.train()
    after = weights(trainer.trained_model())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{x}_proj.weight" for x in "qkvo"))}


class _At(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    whole = wrapped()
    SelfDistillationTrainer(whole, arguments(tmp_path / "a"), blocks()).train()
    trainer = SelfDistillationTrainer(wrapped(), arguments(tmp_path / "b"), blocks())
    trainer.add_callback(_At(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_checkpoint(tmp_path / "b").name == "checkpoint-2"
    resumed = wrapped()
    SelfDistillationTrainer(resumed, arguments(tmp_path / "b"), blocks()).train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_of_a_run_that_was_over_takes_no_step(tmp_path, rank):
    """In the middle of an epoch, where transformers' Trainer takes one more (it did: 8 items, 6 steps)."""
    options = {"lora_rank": rank}
    whole = SelfDistillationTrainer(wrapped(), arguments(tmp_path, **options), blocks())
    whole.train()
    again = SelfDistillationTrainer(wrapped(), arguments(tmp_path, **options), blocks())
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert losses(again) == losses(whole)
    assert_equal(weights(whole.trained_model()), weights(again.trained_model()))
    assert last_checkpoint(tmp_path).name == "checkpoint-6"


@pytest.mark.parametrize("what", ["weights", "lora", "optimizer"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, what):
    options = {"save_steps": 2, "save_total_limit": 1, "lora_rank": 4 if what == "lora" else 0}
    whole = wrapped()
    SelfDistillationTrainer(whole, arguments(tmp_path / "a", **options), blocks()).train()
    place, name = {
        "weights": (sys.modules["transformers.modeling_utils"], "safe_save_file"),
        "lora": (distillation, "save_file"),
        "optimizer": (torch, "save"),
    }[what]
    good = getattr(place, name)

    def full(tensors, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"torn")
            raise OSError(28, "No space left on device")
        return good(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(OSError, match="No space left"):
            SelfDistillationTrainer(wrapped(), arguments(tmp_path / "b", **options), blocks()).train()
    assert last_checkpoint(tmp_path / "b").name == "checkpoint-2"
    resumed = wrapped()
    SelfDistillationTrainer(resumed, arguments(tmp_path / "b", **options), blocks()).train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(resumed))
    assert [folder.name for folder in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-6"]


def _killed_in_a_save(folder):
    import transformers.modeling_utils as place

    good = place.safe_save_file

    def killed(tensors, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return good(tensors, path, *args, **kwargs)

    place.safe_save_file = killed
    SelfDistillationTrainer(wrapped(), arguments(folder, save_steps=2, max_steps=4), blocks()).train()


def test_kill_in_the_middle_of_a_save(tmp_path):
    done = subprocess.run([sys.executable, __file__, "kill", str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    args = {"save_steps": 2, "max_steps": 4}
    resumed, whole = wrapped(), wrapped()
    SelfDistillationTrainer(resumed, arguments(tmp_path, **args), blocks()).train(resume_from_checkpoint=True)
    SelfDistillationTrainer(whole, arguments(tmp_path / "whole", **args), blocks()).train()
    assert_equal(weights(whole), weights(resumed))


def test_a_loss_that_is_not_finite_stops_with_step_and_block(tmp_path):
    items = blocks(1)
    items[0]["teacher_logits"][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"at step 0, in blocks \[0\]"):
        SelfDistillationTrainer(wrapped(), arguments(tmp_path), items).train()


def test_bad_input(tmp_path, caplog):
    with pytest.raises(ValueError, match="no retrieval heads"):
        SelfDistillationTrainer(RTPurboForCausalLM.from_base(tiny_base("llama")), arguments(tmp_path), blocks(1))
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        SelfDistillationTrainer(tiny_base("llama"), arguments(tmp_path), blocks(1))
    with pytest.raises(ValueError, match="needs 'label_rows'"):
        collate_labelled([{"input_ids": torch.arange(4)}])
    for name, value in (("lora_rank", -1), ("lora_alpha", 0), ("push_to_hub", True)):
        with pytest.raises(ValueError, match=name if name != "push_to_hub" else "push with"):
            arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        SelfDistillationTrainer(wrapped(), arguments(tmp_path), blocks(1)).train(resume_from_checkpoint=True)
    SelfDistillationTrainer(wrapped().bfloat16(), arguments(tmp_path, learning_rate=3e-6), blocks(1))
    assert "lost in rounding" in caplog.text


def test_checkpointing_is_decided_by_what_fits(monkeypatch):
    """SmolLM2-135M's shape at 8K: 10.6 GiB of activations and label rows at most, 8 GiB measured on an H100."""
    base = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    config = SimpleNamespace(
        get_text_config=lambda decoder: base, retrieval_heads=[[0]] * 40, base_config=tiny_base("llama").config
    )
    model = SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.float32)
    size = distill.activation_bytes(model, 8192, 300)
    assert 8 < size / 2**30 < 12
    assert distill.activation_bytes(model, 65536, 300) == 8 * size
    for free, asked, expected in ((40, None, False), (20, None, True), (20, False, False), (40, True, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 80 * 2**30))
        settings = distill.Stage2(gradient_checkpointing=asked)
        assert distill._checkpoints(model, settings, 8192, 300) == expected
    assert distill._checkpoints(wrapped(), distill.Stage2(), 64, 8)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant, cosine, got 'linear'"):
        distill.Stage2(schedule="linear")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    assert distill.own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [distill.own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_defaults_are_the_papers(tmp_path):
    args = SelfDistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    found = (args.learning_rate, args.weight_decay, args.max_grad_norm, args.max_steps, args.lr_scheduler_type.value)
    assert found == (3e-6, 0.01, 1.0, 600, "constant_with_warmup")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert args.gradient_checkpointing
    assert (args.get_warmup_steps(600), args.get_warmup_steps(60), args.get_warmup_steps(2)) == (200, 20, 1)


def _worker(folder):
    model = wrapped()
    args = arguments(folder, max_steps=3, ddp_backend="gloo")
    trainer = SelfDistillationTrainer(model, args, blocks())
    trainer.train()
    found = {"weights": weights(model), "losses": losses(trainer)}
    torch.save(found, Path(folder) / f"{args.process_index}.pt")
    leave_process_group()


def test_two_processes_equal_one(tmp_path):
    """DDP over gloo, ranks with different numbers of label rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs, running = [tmp_path / f"log-{rank}.txt" for rank in range(2)], []
    for rank, log in enumerate(logs):
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        with log.open("w") as stream:
            command = [sys.executable, __file__, "two", str(tmp_path)]
            running.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    single = wrapped()
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    trainer = SelfDistillationTrainer(single, arguments(tmp_path / "one", **options), blocks())
    trainer.train()
    assert_equal(ranks[0]["weights"], ranks[1]["weights"])
    assert_equal(ranks[0]["weights"], weights(single), atol=1e-5)
    assert ranks[0]["losses"] == pytest.approx(losses(trainer), rel=1e-5)


def test_lora_file_is_named_as_peft_does(tmp_path):
    trainer = SelfDistillationTrainer(wrapped(), arguments(tmp_path, lora_rank=2), blocks(1))
    trainer.save_lora(tmp_path)
    assert all(key.startswith("base_model.model.model.") for key in load_file(tmp_path / ADAPTER_FILE))


if __name__ == "__main__":
    {"kill": _killed_in_a_save, "two": _worker}[sys.argv[1]](sys.argv[2])
