"""The teacher cache: which rows, what is stored, going on after a kill, and what is refused."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from families import everything_retrieves, tiny_base
from safetensors.torch import load_file
from small_tokenizer import small_tokenizer

from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training import teacher_cache
from rtpurbo_hf.training.packing import TokenBlocks
from rtpurbo_hf.training.teacher_cache import TeacherCache, cache_teacher, label_rows

LENGTH, COUNT = 40, 5


def wrapped(seed=0):
    base = tiny_base("llama", seed=seed)
    return RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base), sliding_window=8)


def text_blocks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (COUNT, LENGTH), generator=generator, dtype=torch.int32)
    needles = torch.full((COUNT, 3), -1)
    needles[1] = torch.tensor([12, 13, 37])
    return TokenBlocks(ids, needles)


def chat_blocks():
    blocks = text_blocks()
    mask = torch.zeros(COUNT, LENGTH, dtype=torch.bool)
    mask[0, :3] = mask[0, 20:25] = mask[2, -2:] = True
    return TokenBlocks(blocks.input_ids, torch.empty(COUNT, 0, dtype=torch.int64), mask)


def build(folder, model=None, blocks=None, last=6, **options):
    model, blocks = model or wrapped(), blocks or text_blocks()
    rows, tokenizer = label_rows(blocks, last=last), small_tokenizer()
    options = {"shard_blocks": 2, "progress": False, **options}
    cache_teacher(model, blocks, folder, tokenizer=tokenizer, rows=rows, k=4, **options)
    return TeacherCache(folder, model=model, tokenizer=tokenizer, blocks=blocks, rows=rows, k=4)


def test_label_rows():
    rows = label_rows(text_blocks(), last=6)
    assert rows[0].tolist() == [33, 34, 35, 36, 37, 38, -1, -1]
    assert rows[1].tolist() == [12, 13, 33, 34, 35, 36, 37, 38]
    assert label_rows(text_blocks(), last=1000)[0].tolist() == list(range(LENGTH - 1))
    rows = label_rows(chat_blocks(), last=6)
    # the first token of a block is predicted by no row
    assert rows[0].tolist() == [0, 1, 19, 20, 21, 22, 23]
    assert rows[2].tolist() == [37, 38, -1, -1, -1, -1, -1]
    # regression: a block of plain text among conversations was trained on without a label
    assert rows[1].tolist() == [33, 34, 35, 36, 37, 38, -1]
    with pytest.raises(ValueError, match="at least 1 label row"):
        label_rows(text_blocks(), last=0)


@pytest.mark.parametrize("make", [text_blocks, chat_blocks])
def test_items_hold_the_dense_models_top_logits(tmp_path, make):
    blocks = make()
    cache = build(tmp_path, blocks=blocks)
    base = tiny_base("llama")
    assert len(cache) == COUNT
    for i in range(COUNT):
        item, rows = cache[i], cache.rows[i][cache.rows[i] >= 0]
        with torch.no_grad():
            top = base(blocks.input_ids[i].long()[None]).logits[0, rows].topk(4, -1)
        assert torch.equal(item["teacher_ids"][: len(rows)], top.indices)
        assert torch.allclose(item["teacher_logits"][: len(rows)], top.values, atol=1e-5)
        assert not item["teacher_logits"][len(rows) :].any()
        assert torch.equal(item["input_ids"], blocks.input_ids[i].long())
    index = json.loads((tmp_path / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [int((r >= 0).sum()) for r in cache.rows.split(2)]
    assert index["dtype"] == "float32"
    stored = sum(load_file(file)["ids"].shape[0] for file in tmp_path.glob("*.safetensors"))
    assert stored == int((cache.rows >= 0).sum())


def test_only_label_rows_get_logits(tmp_path, monkeypatch):
    model = wrapped()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    build(tmp_path, model)
    assert [shape[1] for shape in shapes] == [6, 8, 6, 6, 6]


def test_an_interrupted_run_goes_on_and_keeps_what_there_is(tmp_path, monkeypatch):
    whole = build(tmp_path / "whole")
    good, calls = teacher_cache.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"torn")
            raise OSError(28, "No space left on device")
        good(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path / "cut")
    model, blocks = wrapped(), text_blocks()
    rows = label_rows(blocks, last=6)
    with pytest.raises(ValueError, match=r"lacks teacher-00001\.safetensors"):
        TeacherCache(tmp_path / "cut", model=model, tokenizer=small_tokenizer(), blocks=blocks, rows=rows, k=4)
    kept = (tmp_path / "cut" / "teacher-00000.safetensors").stat().st_mtime_ns
    cache = build(tmp_path / "cut")
    assert (tmp_path / "cut" / "teacher-00000.safetensors").stat().st_mtime_ns == kept
    for i in range(COUNT):
        assert all(torch.equal(value, cache[i][key]) for key, value in whole[i].items())


def _killed(folder):
    good, calls = teacher_cache.save_file, []

    def kill(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        good(tensors, path, **options)

    teacher_cache.save_file = kill
    build(folder)


def test_kill_in_the_middle_of_a_shard(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path / "cut")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    whole, cache = build(tmp_path / "whole"), build(tmp_path / "cut")
    assert all(torch.equal(value, cache[3][key]) for key, value in whole[3].items())


def test_processes_share_the_shards(tmp_path):
    rows = label_rows(text_blocks(), last=6)
    for rank in range(2):
        options = {"rows": rows, "k": 4, "shard_blocks": 2, "part": (rank, 2), "progress": False}
        cache_teacher(wrapped(), text_blocks(), tmp_path, tokenizer=small_tokenizer(), **options)
        assert len(list(tmp_path.glob("*.safetensors"))) == (2, 3)[rank]
    assert len(build(tmp_path)) == COUNT


def test_another_teacher_is_refused(tmp_path):
    build(tmp_path)
    for field, options in (
        ("weights_sha256", {"model": wrapped(seed=1)}),
        ("data_sha256", {"blocks": text_blocks(seed=1)}),
        ("data_sha256", {"last": 7}),
    ):
        with pytest.raises(ValueError, match=f"cache of another teacher: {field}"):
            build(tmp_path, **options)
    model, blocks = wrapped(), text_blocks()
    rows = label_rows(blocks, last=6)
    other = copy.deepcopy(small_tokenizer())
    other.chat_template = "another"
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        TeacherCache(tmp_path, model=model, tokenizer=other, blocks=blocks, rows=rows, k=4)
    with pytest.raises(ValueError, match="k is 4 there and 5 here"):
        TeacherCache(tmp_path, model=model, tokenizer=small_tokenizer(), blocks=blocks, rows=rows, k=5)
    model.config.base_model_revision = "abc"
    with pytest.raises(ValueError, match="revision is None there and 'abc' here"):
        build(tmp_path, model)
    # other precision: may be used, not mixed in
    rounded = wrapped().bfloat16()
    TeacherCache(tmp_path, model=rounded, tokenizer=small_tokenizer(), blocks=blocks, rows=rows, k=4)
    with pytest.raises(ValueError, match="dtype is 'float32' there and 'bfloat16' here"):
        build(tmp_path, rounded)
    with pytest.raises(ValueError, match="not a teacher cache"):
        TeacherCache(tmp_path / "x", model=model, tokenizer=small_tokenizer(), blocks=blocks, rows=rows)
    with pytest.raises(ValueError, match="at least 1"):
        cache_teacher(wrapped(), blocks, tmp_path, tokenizer=small_tokenizer(), k=0)


def test_folder_with_other_files_is_refused(tmp_path):
    """Regression: shards were written between the texts that they were made from."""
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty and holds no teacher cache"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_torn_shard_is_named(tmp_path):
    cache = build(tmp_path)
    (tmp_path / "teacher-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"teacher-00001\.safetensors cannot be read"):
        cache[2]


if __name__ == "__main__":
    _killed(sys.argv[1])
