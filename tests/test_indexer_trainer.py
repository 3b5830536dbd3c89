"""Stage 1: loss and gradients, row sampling, cached steps, resume, checkpoints, accumulation, two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import everything_retrieves, tiny_base
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rtpurbo_hf.kernels.indexer_kl import indexer_kl, indexer_kl_reference
from rtpurbo_hf.modeling.checkpoint_rtpurbo import INDEXER_FILE
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.activation_cache import ActivationCache
from rtpurbo_hf.training.checkpoints import last_checkpoint
from rtpurbo_hf.training.indexer_init import initialise_indexers
from rtpurbo_hf.training.indexer_trainer import (
    IndexerTrainer,
    IndexerTrainingArguments,
    collate_documents,
    plot_losses,
    train_indexer,
)
from rtpurbo_hf.training.plateau import HEAD_LOSS, reached_plateau
from rtpurbo_hf.training.row_sampling import CACHE_STEP, Rows, RowSampler, token_span
from rtpurbo_hf.training.stage_trainer import leave_process_group

LENGTH = 96


def blocks(count=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, 97, (LENGTH,), generator=generator),
            "needle_rows": torch.tensor([90, 91, -1]) if i % 2 else torch.tensor([-1, -1, -1]),
        }
        for i in range(count)
    ]


def wrapped(family="llama", heads=None, **options):
    base = tiny_base(family)
    settings = {"index_dim": 6, "index_rotary_dim": 2, "index_rotary_wavelengths": [4.0, 256.0], **options}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=heads or everything_retrieves(base), **settings)
    initialise_indexers(model, method="random")
    return model


def arguments(folder, **options):
    settings = {
        "max_steps": 8, "logging_steps": 1, "save_steps": 4, "cache_activations": False, "use_cpu": True,
        "disable_tqdm": True, "rows_per_document": 12, "needle_rows_per_document": 2, **options,
    }  # fmt: skip
    return IndexerTrainingArguments(output_dir=str(folder), **settings)


def weights(model):
    return {key: value.detach().clone() for key, value in model.indexer_state_dict().items()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", [None, (0, 5)])
def test_one_pass_gradients_equal_autograd(start, weighted):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 9, 8, generator=generator), torch.randn(2, 3, 40, 8, generator=generator)
    index = [torch.randn(2, 4, 9, 4, generator=generator), torch.randn(2, 2, 40, 4, generator=generator)]
    slots = torch.randint(5, 40, (2, 9), generator=generator)
    slots[0, 3] = slots[1, 0] = -1
    heads = torch.tensor([0, 1, 3, 5])
    options = {
        "heads": heads, "kv_heads": heads // 2, "index_heads": torch.tensor([0, 0, 1, 1]), "q_slots": slots,
        "scale": 0.7, "softcap": 3.0, "start": None if start is None else torch.tensor(start),
        "row_weight": torch.rand(2, 9, generator=generator) if weighted else None,
    }  # fmt: skip
    upstream = torch.randn(4, generator=generator)
    results = []
    for function in (indexer_kl_reference, indexer_kl):
        leaves = [tensor.clone().requires_grad_(True) for tensor in index]
        loss = function(query, key, *leaves, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss @ upstream, leaves)])
    for reference, ours in zip(*results, strict=True):
        assert (reference - ours).norm() / reference.norm() < 1e-5


def test_loss_is_the_kl_of_the_attention_matrices(tmp_path):
    """Against the base's own eager attention, rebuilt without any of our operations."""
    model, block = wrapped(heads=[[0, 3], [], [1], []]), blocks(2)[1]
    trainer = IndexerTrainer(model, arguments(tmp_path, rows_per_document=-1), [block])
    loss = trainer.compute_loss(model, trainer._prepare_inputs(collate_documents([block])))
    base = tiny_base("llama")
    with torch.no_grad():
        attentions = base(block["input_ids"][None], output_attentions=True).attentions
    seen = {}
    model(block["input_ids"][None], observer=lambda i: seen.__setitem__(i.layer_idx, i), use_cache=False)
    expected = []
    for layer, heads in ((0, [0, 3]), (2, [1])):
        indexer, inputs = model.indexers()[layer], seen[layer]
        queries = indexer.queries(inputs.query_pre, inputs.positions)[0]
        keys = indexer.keys(inputs.key_pre, inputs.positions)[0]
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
        student = (queries @ keys.mT).masked_fill(hidden, -1e9).log_softmax(-1)
        for i, head in enumerate(heads):
            teacher = attentions[layer][0, head].clamp_min(1e-30)
            expected.append((teacher * (teacher.log() - student[i])).masked_fill(hidden, 0).sum(-1).mean())
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_training_lowers_the_loss_and_touches_nothing_else(tmp_path, caplog):
    model = wrapped()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if ".indexer." not in k}
    before = weights(model)
    caplog.set_level("INFO")
    args = arguments(tmp_path, max_steps=40, learning_rate=0.02, rows_per_document=-1)
    trainer = IndexerTrainer(model, args, blocks(), blocks(2, seed=8))
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    assert end["eval_kl"] < 0.8 * start["eval_kl"]
    assert end["eval_recall"] > start["eval_recall"]
    assert end["eval_needle_kl"] < start["eval_needle_kl"]
    assert all(torch.equal(frozen[key], value) for key, value in model.state_dict().items() if key in frozen)
    assert not any(torch.equal(before[key], value) for key, value in weights(model).items())
    count = sum(value.numel() for value in before.values())
    assert f"trainable params: {count:,}" in caplog.text
    assert all({"kl_median", "kl_max", "learning_rate"} <= set(e) for e in trainer.state.log_history if "loss" in e)
    record = json.loads((tmp_path / "eval_heads.json").read_text())
    assert [(line["layer"], line["head"]) for line in record["heads"]] == [(i, h) for i in range(4) for h in range(4)]
    mean = sum(line["kl"] for line in record["heads"]) / 16
    assert mean == pytest.approx(end["eval_kl"])
    assert set(load_file(tmp_path / INDEXER_FILE)) == set(before)
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_statistics_of_a_perfect_index(tmp_path):
    """On NoPE layers an index of full rank is the attention itself: nothing is lost, no token too many is kept."""
    base = tiny_base("smollm3", no_rope_layers=[1, 1, 0, 1])
    heads = [[], [], [0, 2, 3], []]
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=heads, index_dim=8, index_top_p=0.8)
    module = model.converted()[2]
    with torch.no_grad():
        module.indexer.k_proj.copy_(torch.eye(8).expand(3, 8, 8))
        module.indexer.q_proj.copy_(module.scaling * torch.eye(8).expand(3, 8, 8))
    trainer = IndexerTrainer(model, arguments(tmp_path, eval_rows_per_document=-1), blocks(), blocks(2))
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] < 1e-5
    # selection works on 16-bit vectors
    assert metrics["eval_recall"] > 0.99
    assert metrics["eval_tokens"] == pytest.approx(metrics["eval_oracle_tokens"], rel=0.01)
    assert 0.799 < metrics["eval_kept_mass"] < 0.83
    model.config.index_min_tokens = 60
    floor = trainer.evaluate()
    expected = sum(max(min(n, 60), 0) for n in range(1, LENGTH + 1)) / LENGTH
    assert floor["eval_tokens"] >= expected
    assert floor["eval_oracle_tokens"] == metrics["eval_oracle_tokens"]


@pytest.mark.parametrize("sharing", ["head", "kv_head"])
def test_cached_steps_equal_uncached_ones(tmp_path, sharing):
    """With every row in the pool, the same rows are drawn, and losses and weights agree."""
    runs = []
    heads = [[0, 3], [], [1], [0, 1, 2, 3]]
    for cached in (False, True):
        model = wrapped(heads=heads, index_key_sharing=sharing)
        # needle rows come from another pool, whose order the cache may change
        options = {"rows_per_document": -1, "cache_activations": cached, "eval_rows_per_document": 40}
        trainer = IndexerTrainer(model, arguments(tmp_path / str(cached), **options), blocks(), blocks(3, seed=5))
        trainer.train()
        runs.append((losses(trainer), weights(model), trainer.evaluate()))
    (uncached_losses, uncached, uncached_metrics), (cached_losses, cached, cached_metrics) = runs
    assert cached_losses == pytest.approx(uncached_losses, rel=1e-6)
    assert all(torch.allclose(uncached[key], cached[key], atol=1e-6) for key in cached)
    for key, value in uncached_metrics.items():
        if "runtime" not in key and "per_second" not in key:
            assert cached_metrics[key] == pytest.approx(value, rel=1e-5), key


def test_cache_in_files_is_taken_up_and_refuses_other_data(tmp_path):
    model, sampler = wrapped(heads=[[0, 3], [], [1], []]), RowSampler(10, 10, 0.25, 0)
    options = {"sampler": sampler, "step": CACHE_STEP, "folder": tmp_path / "cache"}
    data = blocks(3)
    data[2]["attention_mask"] = torch.cat([torch.zeros(7, dtype=torch.long), torch.ones(LENGTH - 7, dtype=torch.long)])
    in_memory = ActivationCache(model, data, sampler=sampler, step=CACHE_STEP)
    files = ActivationCache(model, data, **options)
    for i in range(3):
        a, b = in_memory.document(i), files.document(i)
        assert a.key == b.key
        assert torch.equal(a.text, b.text)
        for layer in (0, 2):
            for name in ("query", "query_pre", "key", "key_pre", "slots", "row_positions", "positions"):
                assert torch.equal(getattr(a.layers[layer], name), getattr(b.layers[layer], name))
    assert b.layers[0].start.tolist() == [7]
    assert b.layers[0].key.shape == (1, 2, LENGTH, 8)
    (tmp_path / "cache" / "000001.safetensors").unlink()
    kept = (tmp_path / "cache" / "000000.safetensors").stat().st_mtime_ns
    again = ActivationCache(model, data, **options)
    assert torch.equal(again.document(1).layers[2].query, files.document(0 + 1).layers[2].query)
    assert (tmp_path / "cache" / "000000.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="another documents"):
        ActivationCache(model, blocks(3, seed=4), **options)
    with pytest.raises(ValueError, match="another rows"):
        ActivationCache(model, data, **{**options, "sampler": RowSampler(11, 10, 0.25, 0)})
    (tmp_path / "cache" / "000001.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"000001\.safetensors cannot be read"):
        again.document(1)
    with pytest.raises(ValueError, match="through a folder"):
        ActivationCache(model, data, sampler=sampler, step=CACHE_STEP, part=(0, 2))


def test_caching_is_decided_by_epochs_and_size(tmp_path):
    def decision(**options):
        return IndexerTrainer(
            wrapped(), arguments(tmp_path, **{"cache_activations": None, **options}), blocks()
        )._use_cache()

    assert decision(max_steps=12)
    assert not decision(max_steps=6)
    assert not decision(max_steps=12, activation_cache_limit_gib=1e-6)
    assert not decision(max_steps=12, cache_activations=False)


@pytest.mark.parametrize("cached", [False, True])
def test_resume_is_bit_equal(tmp_path, cached):
    """In the middle of an epoch, with accumulation: the second half gives the weights of an unbroken run."""
    options = {"max_steps": 8, "save_steps": 5, "cache_activations": cached, "gradient_accumulation_steps": 2}
    whole = wrapped()
    IndexerTrainer(whole, arguments(tmp_path / "a", **options), blocks(7)).train()
    resumed = wrapped()
    trainer = IndexerTrainer(resumed, arguments(tmp_path / "b", **options), blocks(7))
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert trainer.state.global_step == 8
    expected = weights(whole)
    assert all(torch.equal(expected[key], value) for key, value in weights(resumed).items())
    middle = load_file(tmp_path / "a" / "checkpoint-5" / INDEXER_FILE)
    assert set(middle) == set(expected)
    assert not any(torch.equal(expected[key], middle[key]) for key in expected)


class _Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    whole = wrapped()
    IndexerTrainer(whole, arguments(tmp_path / "a", save_steps=100), blocks()).train()
    trainer = IndexerTrainer(wrapped(), arguments(tmp_path / "b", save_steps=100), blocks())
    trainer.add_callback(_Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(tmp_path / "b").name == "checkpoint-3"
    resumed = wrapped()
    trainer = IndexerTrainer(resumed, arguments(tmp_path / "b", save_steps=100), blocks())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    expected = weights(whole)
    assert all(torch.equal(expected[key], value) for key, value in weights(resumed).items())


def test_plateau_is_relative_and_weighs_heads_alike():
    def history(*values):
        return [{HEAD_LOSS: value} for value in values] + [{"eval_kl": 1.0}]

    assert not reached_plateau(history(0.0, -0.1), patience=2, threshold=0.01)
    assert not reached_plateau(history(0.0, -0.1, -0.2, -0.3), patience=2, threshold=0.01)
    assert reached_plateau(history(0.0, -0.3, -0.301, -0.305), patience=2, threshold=0.01)
    # one log without a fall is no plateau yet
    assert not reached_plateau(history(0.0, -0.3, -0.29, -0.35), patience=2, threshold=0.01)


def test_a_plateau_stops_with_a_checkpoint(tmp_path):
    """A learning rate of almost nothing changes almost nothing; with a real one the run goes on."""
    steps = []
    for name, rate in (("flat", 1e-9), ("falling", 0.02)):
        options = {"rows_per_document": -1, "plateau_patience": 2, "plateau_threshold": 0.002, "save_steps": 100}
        # every log shows the same documents
        options |= {"gradient_accumulation_steps": 6, "max_steps": 9, "learning_rate": rate, "warmup_steps": 0}
        trainer = IndexerTrainer(wrapped(), arguments(tmp_path / name, **options), blocks())
        trainer.train()
        steps.append(trainer.state.global_step)
        assert last_checkpoint(tmp_path / name).name == f"checkpoint-{steps[-1]}"
    assert steps == [3, 9]
    lines = [json.loads(line) for line in (tmp_path / "flat" / "train_heads.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len(lines[0]["kl"]) == 16


def test_checkpoints_are_strict(tmp_path):
    model = wrapped()
    IndexerTrainer(model, arguments(tmp_path / "a", max_steps=2, save_steps=2), blocks()).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert {f.name for f in checkpoint.iterdir()} == {
        INDEXER_FILE, "training_args.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    file = checkpoint / INDEXER_FILE
    good = load_file(file)
    name = sorted(good)[0]

    def resume(**options):
        args = arguments(tmp_path / "b", max_steps=4)
        IndexerTrainer(wrapped(**options), args, blocks()).train(resume_from_checkpoint=str(checkpoint))

    for bad in (
        {k: v for k, v in good.items() if k != name},
        {**good, "model.layers.9.indexer.q_proj": good[name].clone()},
        {**good, name: good[name][:1]},
        {**good, name: good[name] * float("nan")},
    ):
        save_file(bad, file)
        changed = next((k for k in {*bad, *good} if k not in bad or k not in good), name)
        with pytest.raises(ValueError, match=changed.replace(".", r"\.")):
            resume()
    file.unlink()
    with pytest.raises(ValueError, match="not a stage-1 checkpoint"):
        resume()


def test_checkpoint_of_other_heads_is_refused(tmp_path):
    """Heads 0 and 1 have the same keys and shapes: only the record tells them apart."""
    args = arguments(tmp_path / "a", max_steps=2, save_steps=2)
    IndexerTrainer(wrapped(heads=[[0], [], [], []]), args, blocks()).train()
    trainer = IndexerTrainer(wrapped(heads=[[1], [], [], []]), arguments(tmp_path / "b"), blocks())
    with pytest.raises(ValueError, match=r"heads \[0\] of layer 0, the model has \[1\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Documents of different lengths and numbers of needle rows included."""
    data = blocks(6)
    data[3]["input_ids"] = data[3]["input_ids"][:92]
    runs = []
    for size, steps in ((2, 1), (1, 2)):
        model = wrapped()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = IndexerTrainer(model, arguments(tmp_path / str(size), **options), data)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert all(torch.allclose(value, runs[1][1][key], atol=1e-5) for key, value in runs[0][1].items())


def test_workers_do_not_change_what_is_drawn(tmp_path):
    found = []
    for workers in (0, 1):
        trainer = IndexerTrainer(wrapped(), arguments(tmp_path, max_steps=3, dataloader_num_workers=workers), blocks())
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes found, uncached and cached: `results[cached][rank]`."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"log-{rank}.txt" for rank in range(2)]
    running = []
    for rank, log in enumerate(logs):
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        # files, not pipes: a full pipe of one process would stop both
        with log.open("w") as stream:
            command = [sys.executable, __file__, str(folder)]
            running.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    files = [[folder / f"{cached}-{rank}.pt" for rank in range(2)] for cached in range(2)]
    return [[torch.load(file, weights_only=True) for file in row] for row in files]


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_equal_one(tmp_path, two_processes, cached):
    """DDP over gloo: the same loss curve and weights as one process with the same documents a step."""
    single = wrapped()
    # one process accumulates what two processes see side by side
    options = {"max_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 2, "cache_activations": cached}
    trainer = IndexerTrainer(single, arguments(tmp_path, **options), blocks(8), blocks(3, seed=5))
    trainer.train()
    metrics = trainer.evaluate()
    ranks = two_processes[cached]
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key])
        assert torch.allclose(value, weights(single)[key], atol=1e-5)
    assert ranks[0]["losses"] == pytest.approx(losses(trainer), rel=1e-5)
    assert ranks[0]["metrics"]["eval_kl"] == pytest.approx(metrics["eval_kl"], rel=1e-5)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


def test_rows_depend_on_seed_step_and_document_only():
    sampler = RowSampler(8, 2, 0.25, 7)
    text, needle = sampler.text_rows(0, 100), torch.tensor([90, 91, 95])
    assert text[0] == 25
    chosen, is_needle = sampler.draw(text, needle, step=3, key=11)
    assert torch.equal(chosen, sampler.draw(text, needle, step=3, key=11)[0])
    assert is_needle.tolist() == [False] * 8 + [True] * 2
    others = [sampler.draw(text, needle, step=step, key=key)[0] for step, key in ((4, 11), (3, 12))]
    assert not any(torch.equal(chosen, other) for other in others)
    assert not torch.equal(chosen, RowSampler(8, 2, 0.25, 8).draw(text, needle, step=3, key=11)[0])
    assert len(set(chosen.tolist())) == 10
    everything, _ = RowSampler(-1, 2, 0.25, 7).draw(RowSampler(-1, 2, 0.25, 7).text_rows(0, 100), needle, step=0, key=1)
    assert everything.tolist() == list(range(100))


def test_row_weights_are_a_mean_of_means():
    rows = Rows.stack([(torch.tensor([3, 4]), torch.tensor([False, True])), (torch.tensor([5]), torch.tensor([False]))])
    assert rows.slots.tolist() == [[3, 4], [5, -1]]
    assert rows.weight.tolist() == [[0.25, 0.25], [0.5, 0.0]]
    assert token_span(torch.tensor([0, 0, 1, 1, 0]), 5) == (2, 4)


def test_padding_does_not_matter(tmp_path):
    """A document gives the same loss alone, padded on the left, and beside a longer one."""
    document = blocks(1)[0]["input_ids"][:60]
    trainer = IndexerTrainer(wrapped(), arguments(tmp_path, rows_per_document=-1), blocks())

    def loss(*items):
        return trainer.compute_loss(trainer.model, collate_documents(items)).item()

    alone = loss({"input_ids": document})
    left = {"input_ids": torch.nn.functional.pad(document, (9, 0)), "attention_mask": torch.ones(69)}
    left["attention_mask"][:9] = 0
    assert loss(left) == pytest.approx(alone, rel=1e-5)
    other = {"input_ids": blocks(2)[1]["input_ids"]}
    assert loss({"input_ids": document}, other) == pytest.approx((alone + loss(other)) / 2, rel=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_a_loss_that_is_not_finite_stops_with_step_and_layer(tmp_path, cached):
    model = wrapped()
    with torch.no_grad():
        model.indexers()[2].q_proj[0] = float("inf")
    trainer = IndexerTrainer(model, arguments(tmp_path, cache_activations=cached), blocks())
    with pytest.raises(RuntimeError, match=r"at step 0, in layers \[2\]"):
        trainer.train()


def test_dropout_of_the_base_is_off():
    """The teacher is the model in eval mode, although the Trainer calls train()."""
    base = tiny_base("phi", resid_pdrop=0.5, embd_pdrop=0.5)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base), index_dim=4)
    trainer = IndexerTrainer(
        model, IndexerTrainingArguments(output_dir="unused", use_cpu=True, save_strategy="no"), None
    )
    model.train()
    batch = collate_documents(blocks(1))
    assert trainer.compute_loss(model, batch).item() == trainer.compute_loss(model, batch).item()


def test_helper_and_use_cache_of_the_config(tmp_path):
    model = wrapped()
    assert model.config.use_cache
    metrics = train_indexer(model, blocks(), blocks(2, seed=5), arguments(tmp_path, max_steps=2))
    assert {"train_loss", "eval_kl", "eval_tokens", "eval_oracle_tokens", "eval_kept_mass"} <= set(metrics)
    assert model.config.use_cache


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no retrieval heads"):
        IndexerTrainer(RTPurboForCausalLM.from_base(tiny_base("llama")), arguments(tmp_path), blocks())
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        IndexerTrainer(tiny_base("llama"), arguments(tmp_path), blocks())
    with pytest.raises(ValueError, match="needs 'input_ids', this one has \\['text'\\]"):
        collate_documents([{"text": "a"}])
    with pytest.raises(ValueError, match="shape"):
        collate_documents([{"input_ids": torch.ones(2, 3)}])
    for name, value in (
        ("rows_per_document", 0), ("first_row", 1.0), ("activation_dtype", "int8"), ("cached_rows_per_document", 4),
        ("needle_rows_per_document", -2), ("plateau_patience", 0), ("plateau_threshold", 1.0), ("push_to_hub", True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name if name != "push_to_hub" else "push with"):
            arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="no training loss"):
        plot_losses([{"step": 1, "eval_kl": 1.0}], tmp_path / "x.png")


def test_warm_up_is_in_proportion(tmp_path):
    args = arguments(tmp_path)
    assert (args.get_warmup_steps(600), args.get_warmup_steps(60), args.get_warmup_steps(2)) == (100, 10, 1)
    assert arguments(tmp_path, warmup_steps=5).get_warmup_steps(600) == 5


def _worker(folder):
    for cached in range(2):
        model = wrapped()
        options = {"max_steps": 4, "save_steps": 4, "cache_activations": bool(cached), "ddp_backend": "gloo"}
        args = arguments(Path(folder) / str(cached), **options)
        trainer = IndexerTrainer(model, args, blocks(8), blocks(3, seed=5))
        trainer.train()
        metrics = {k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k}
        found = {"weights": weights(model), "losses": losses(trainer), "metrics": metrics}
        torch.save(found, Path(folder) / f"{cached}-{args.process_index}.pt")
    leave_process_group()


if __name__ == "__main__":
    _worker(sys.argv[1])
