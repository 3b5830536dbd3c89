"""Documents, splits, token blocks, chat masks and needles."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
import torch
from small_tokenizer import small_tokenizer

from rtpurbo_hf.presets import preset
from rtpurbo_hf.recipe_data import adaptation_data
from rtpurbo_hf.training import corpora, texts
from rtpurbo_hf.training.data import (
    EVALUATION_KEYS,
    TRAINING_KEYS,
    Document,
    LengthError,
    NeedleMixer,
    TokenBlocks,
    chat_tokens,
    documents_hash,
    load_texts,
    pack_documents,
    split_documents,
)

CHAT = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three plus three?"},
    {"role": "assistant", "content": "That is six."},
]


def documents(count: int, words: int = 400) -> list[Document]:
    rows = [" ".join(f"return value_{d}_{w}." for w in range(words)) for d in range(count)]
    return [texts._document(f"doc-{d}", row, "test", "text") for d, row in enumerate(rows)]


def write_parquet(path, columns) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("alpha text")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("beta text, a longer one")
    rows = [{"text": "gamma"}, {"text": "delta"}, {"messages": CHAT}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    write_parquet(tmp_path / "d.parquet", {"text": ["epsilon", "gamma"], "other": [1, 2]})
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    return tmp_path


def test_folder_is_read_in_all_formats_and_repeats_are_left_out(folder):
    found = load_texts(folder)
    assert sorted(d.text for d in found) == ["", "alpha text", "beta text, a longer one", "delta", "epsilon", "gamma"]
    assert len({d.id for d in found}) == len({d.sha256 for d in found}) == 6
    chat = next(d for d in found if d.messages)
    assert [dict(m) for m in chat.messages] == CHAT
    assert chat.id == f"{folder / 'c.jsonl'}#2"


def test_order_follows_the_seed_and_limits_apply(folder):
    orders = {tuple(d.id for d in load_texts(folder, seed=seed)) for seed in range(6)}
    assert len(orders) > 1
    assert [d.id for d in load_texts(folder, seed=3)] == [d.id for d in load_texts(folder, seed=3)]
    assert len(load_texts(folder, limit=2)) == 2
    assert {d.text for d in load_texts(folder, min_chars=6, max_chars=12)} == {"alpha text", "epsilon"}


def test_glob_single_file_and_lists(folder):
    assert len(load_texts(str(folder / "**" / "*.md"))) == 1
    assert load_texts(folder / "a.txt")[0].text == "alpha text"
    assert {d.text for d in load_texts([folder / "a.txt", folder / "sub"])} == {"alpha text", "beta text, a longer one"}


def test_other_text_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "hello"}\n')
    assert load_texts(tmp_path / "x.jsonl", text_field="content")[0].text == "hello"
    assert load_texts(f"{tmp_path}/x.jsonl@content")[0].text == "hello"
    assert load_texts(f"{tmp_path}/*.jsonl@content")[0].text == "hello"
    with pytest.raises(ValueError, match=r"no text field 'text'.*\['content'\]"):
        load_texts(tmp_path / "x.jsonl")
    write_parquet(tmp_path / "y.parquet", {"content": ["x"]})
    with pytest.raises(ValueError, match=r"no column 'text'"):
        load_texts(tmp_path / "y.parquet")


def test_hub_data_set_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))

        def rows():
            for index in range(10**9):
                yield {"text": f"document {index}", "body": f"body {index}", "extra": index}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_texts("owner/name:part", split="validation", limit=5, seed=1)
    assert asked == [("owner/name", "part", "validation", True)]
    assert len({d.text for d in found}) == 5
    assert found[0].id == "owner/name:part#0"
    assert load_texts("owner/name:part@body", limit=1)[0].text.startswith("body ")
    assert asked[1] == ("owner/name", "part", "train", True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{bad\n", "line 1: not JSON"),
        ("x.jsonl", b"[1]\n", "expected an object, got list"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}\n', "needs 'role' and 'content'"),
        ("x.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("x.csv", b"a,b\n", r"files of kind '\.csv'"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', r"x\.jsonl is not UTF-8"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', r"x\.jsonl#0: this text cannot be written as UTF-8"),
        ("x.jsonl", b'{"text": 3}\n', "the field 'text' must be text, got int"),
        ("x.jsonl", b'{"messages": "hello"}\n', r"x\.jsonl#0: 'messages' must be a list of turns"),
        ("x.parquet", b"junk", r"x\.parquet cannot be read as Parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / name)


def test_marks_and_missing_texts_are_read_as_nothing(tmp_path):
    """Regression: a byte-order mark made JSON unreadable and was trained on in text; a null text ended the run."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": null}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert sorted(d.text for d in load_texts(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        ("nothing.txt", {}, "no such file"),
        ("./nothing", {}, "no such file"),
        ("fineweb", {}, "neither 'system', nor a local file"),
        ([], {}, "no data source"),
        ("", {}, "no data source"),
        ("nothing/*.md", {}, "no file has such a name"),
        ("system", {"min_chars": 10**9}, r"no document has at least 1000000000 characters \(\d+ of other lengths\)"),
    ],
)
def test_missing_sources_are_refused(source, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_texts(source, **kwargs)


def test_folder_without_text_and_split_of_local_files_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file ends in"):
        load_texts(tmp_path / "empty")
    with pytest.raises(ValueError, match="split='train' is for Hub data sets"):
        load_texts(folder / "a.txt", split="train")


def test_system_corpus_has_long_python_text_everywhere():
    found = load_texts("system", min_chars=20_000)
    python = [d for d in found if d.id.startswith("python/")]
    assert len(python) > 50
    assert sum(map(len, python)) > 2_000_000
    assert not any("/test/" in d.id or "site-packages" in d.id for d in python)


def test_bible_is_cut_into_books(tmp_path, monkeypatch):
    program = tmp_path / "bible"
    program.write_text(
        "#!/bin/sh\nprintf '\\nGenesis 1\\n\\n  1 In the beginning\\n\\nGenesis 2\\n\\n  1 Thus\\n\\n'\n"
        "printf '1 John 1\\n\\n  1 That\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    books = dict(corpora.bible_books())
    assert list(books) == ["bible/Genesis", "bible/1 John"]
    assert books["bible/Genesis"] == "Genesis 1\n\n1 In the beginning\n\nGenesis 2\n\n1 Thus"


def test_debian_texts_are_used_where_they_are(tmp_path, monkeypatch):
    page = "<html><head><style>p{}</style></head><body><h1>T</h1><p>One &amp;\n two</p><p>three</p></body></html>"
    (tmp_path / "secA1.html").write_text(page)
    with gzip.open(tmp_path / "jargon.gz", "wt") as stream:
        stream.write("\n\n".join(["word " * 1000] * 50))
    monkeypatch.setattr(corpora, "_ANARCHISM", tmp_path)
    monkeypatch.setattr(corpora, "_JARGON", tmp_path / "jargon.gz")
    assert list(corpora.anarchist_faq()) == [("anarchism/secA1", "T\n\nOne & two\n\nthree")]
    parts = [text for _, text in corpora.jargon_file()]
    assert len(parts) == 3
    assert "\n\n".join(parts) == "\n\n".join(["word " * 1000] * 50)


def test_split_is_by_document_and_stable():
    docs = documents(40, words=3)
    rest, held = split_documents(docs, held_out=0.25, seed=1)
    assert 3 <= len(held) <= 20
    assert {d.id for d in rest} | {d.id for d in held} == {d.id for d in docs}
    fewer_rest, fewer_held = split_documents(docs[:20], held_out=0.25, seed=1)
    assert {d.id for d in fewer_held} <= {d.id for d in held}
    assert {d.id for d in fewer_rest} <= {d.id for d in rest}
    exact = split_documents(docs, held_out=7)[1]
    assert len(exact) == 7
    assert [d.id for d in split_documents(list(reversed(docs)), held_out=7)[1]] == [d.id for d in reversed(exact)]


@pytest.mark.parametrize("seed", range(8))
def test_a_tenth_of_a_few_documents_is_at_least_one(seed):
    docs = documents(6, words=3)
    rest, held = split_documents(docs, held_out=0.1, seed=seed)
    assert rest
    assert held
    assert split_documents(docs[::-1], held_out=0.1, seed=seed)[1] == held[::-1]


@pytest.mark.parametrize("held_out", [0, 0.0, -1, 40, 1.0])
def test_split_that_leaves_a_side_empty_is_refused(held_out):
    docs = documents(40, words=3) if held_out != 1.0 else documents(1, words=3)
    with pytest.raises(ValueError, match="both sides need"):
        split_documents(docs, held_out=held_out)


def test_documents_hash_depends_on_content_and_order():
    docs = documents(3, words=2)
    assert documents_hash(docs) == documents_hash(documents(3, words=2))
    assert documents_hash(docs) != documents_hash(docs[::-1])


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_document_blocks_are_consecutive_parts_of_one_document(bos):
    tokenizer = small_tokenizer(bos=bos)
    docs = documents(3)
    blocks = pack_documents(docs, tokenizer, 256)
    room = 256 - bos
    expected = set()
    for document in docs:
        ids = tokenizer(document.text, add_special_tokens=False).input_ids
        expected |= {tuple(ids[i : i + room]) for i in range(0, len(ids) - room + 1, room)}
    found = [tuple(row.tolist()[bos:]) for row in blocks.input_ids]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert all(len(names) == 1 for names in blocks.document_ids)
    assert all(row[0] == 1 for row in blocks.input_ids.tolist()) is bos
    item = blocks[0]
    assert item["input_ids"].shape == (256,)
    assert item["input_ids"].dtype == torch.int64
    assert item["needle_rows"].shape == (0,)


def test_concat_blocks_lose_nothing_but_the_rest():
    tokenizer = small_tokenizer()
    docs = documents(9, words=7)
    stream = [t for d in docs for t in [*tokenizer(d.text).input_ids, tokenizer.eos_token_id]]
    blocks = pack_documents(docs, tokenizer, 64, policy="concat")
    wanted = {tuple(stream[i : i + 64]) for i in range(0, len(stream) - 63, 64)}
    assert {tuple(row) for row in blocks.input_ids.tolist()} == wanted
    assert max(map(len, blocks.document_ids)) > 1
    with pytest.raises(LengthError, match=r"came out of 9 documents.*Lengths: \d+-\d+ tokens: 9"):
        pack_documents(docs, tokenizer, 64 * 100, policy="concat")


def test_packing_is_deterministic_and_stops_at_the_limit():
    tokenizer = small_tokenizer()
    read = []

    def stream():
        for document in documents(50):
            read.append(document.id)
            yield document

    first = pack_documents(stream(), tokenizer, 128, limit=6, blocks_per_document=2, seed=4)
    assert len(first) == 6
    assert read == ["doc-0", "doc-1", "doc-2"]
    again = pack_documents(documents(50), tokenizer, 128, limit=6, blocks_per_document=2, seed=4)
    assert first.sha256() == again.sha256()
    assert first.document_ids == again.document_ids
    other = pack_documents(documents(50), tokenizer, 128, limit=6, blocks_per_document=2, seed=5)
    assert first.sha256() != other.sha256()
    orders = [pack_documents(documents(5), tokenizer, 128, seed=seed).input_ids.tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_token_filters_and_length_errors():
    tokenizer = small_tokenizer()
    docs = [*documents(2, words=200), *documents(5, words=20)[2:]]
    sizes = sorted(len(tokenizer(d.text).input_ids) for d in docs)
    assert {n[0] for n in pack_documents(docs, tokenizer, 100, max_tokens=sizes[2]).document_ids} == {
        "doc-2",
        "doc-3",
        "doc-4",
    }
    assert {n[0] for n in pack_documents(docs, tokenizer, 100, min_tokens=sizes[3]).document_ids} == {"doc-0", "doc-1"}
    with pytest.raises(
        LengthError, match=r"no block of 9000 tokens \(policy 'document'.*5 documents.*tokens: 3, .*tokens: 2"
    ):
        pack_documents(docs, tokenizer, 9000)
    with pytest.raises(ValueError, match="no documents"):
        pack_documents([], tokenizer, 100)
    with pytest.raises(ValueError, match="policy must be"):
        pack_documents(docs, tokenizer, 100, policy="best")
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        pack_documents(docs, tokenizer, 1)


def test_chat_mask_covers_what_the_assistant_wrote():
    tokenizer = small_tokenizer()
    ids, labelled = chat_tokens(tokenizer, CHAT)
    assert ids == tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False).input_ids
    said = tokenizer.decode([token for token, on in zip(ids, labelled, strict=True) if on])
    assert said == "It is four.<|end|>\nThat is six.<|end|>\n"


def test_chat_template_that_rewrites_turns_still_labels_the_last(monkeypatch):
    tokenizer = small_tokenizer()
    rewriting = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and loop.last %}(thinking){% endif %}"
        "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    ids, labelled = chat_tokens(tokenizer, CHAT)
    said = tokenizer.decode([token for token, on in zip(ids, labelled, strict=True) if on])
    assert said == "(thinking)That is six.<|end|>\n"


def test_chat_without_template_or_assistant_is_refused(monkeypatch):
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"no assistant turn .*\['user'\]"):
        chat_tokens(tokenizer, CHAT[:1])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        chat_tokens(tokenizer, CHAT)


def test_conversations_are_adapted_to(tmp_path, caplog):
    """Regression: an adaptation put needles into whatever it was given, and ended on conversations."""
    turns = [*CHAT, {"role": "user", "content": "and then " * 20}, CHAT[-1]]
    rows = [json.dumps({"messages": [{"role": "user", "content": f"{i}"}, *turns]}) for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows), encoding="utf-8")
    settings = preset("demo", context=64, train_blocks=4)
    blocks = adaptation_data(tmp_path / "chat.jsonl", small_tokenizer(), settings, 0)
    assert "no key-value needles" in caplog.text
    assert blocks.train.label_mask is not None
    assert blocks.train.needle_rows.numel() == 0


@pytest.mark.parametrize("policy", ["document", "concat"])
def test_conversations_are_packed_with_their_masks(policy):
    tokenizer = small_tokenizer(bos=True)
    docs = [
        texts._document(f"chat-{i}", {"messages": [*CHAT, {"role": "user", "content": f"{i} " * 40}]}, "test", "text")
        for i in range(4)
    ]
    blocks = pack_documents(docs, tokenizer, 40, policy=policy)
    assert blocks.label_mask is not None
    assert blocks.label_mask.any(1).all(), "a block without a label came through"
    assert not blocks.label_mask[:, 0].any()
    assert blocks[0]["label_mask"].dtype == torch.bool
    said = "".join(tokenizer.decode(ids[on]) for ids, on in zip(blocks.input_ids, blocks.label_mask, strict=True))
    # a block edge may cut a turn, never label the user's words
    assert "four" in said
    assert "plus" not in said


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_needles_keep_length_text_and_order(bos):
    tokenizer = small_tokenizer(bos=bos)
    block = pack_documents(documents(1), tokenizer, 1024).input_ids[0].tolist()
    made = NeedleMixer(tokenizer, facts=5, questions=3).insert(block, seed=7, until=0.5)
    assert len(made.input_ids) == 1024
    assert made.input_ids[:64] == block[:64]
    text = list(made.input_ids)
    first_question = made.answer_spans[0][0]
    for fact, (start, stop), (first, last) in zip(made.facts, made.statement_spans, made.answer_spans, strict=True):
        assert tokenizer.decode(text[start:stop]) == f"\n{fact.sentence}\n"
        assert tokenizer.decode(text[first:last]) == f" {fact.value}"
        assert start >= 64
        assert stop < first_question
    sentences = [tokenizer.decode(text).count(fact.sentence) for fact in made.facts]
    assert sentences == [2, 2, 2], "each asked fact is stated once and answered once"
    assert made.answer_rows == [row - 1 for first, last in made.answer_spans for row in range(first, last)]


def test_needles_start_at_line_or_sentence_ends():
    tokenizer = small_tokenizer()
    block = pack_documents(documents(1), tokenizer, 1024).input_ids[0].tolist()
    for seed in range(5):
        made = NeedleMixer(tokenizer, facts=4).insert(block, seed=seed)
        for start, _ in made.statement_spans:
            assert tokenizer.decode(made.input_ids[:start]).endswith((".", "\n"))


def test_mixer_fills_a_share_and_names_the_rows():
    tokenizer = small_tokenizer()
    blocks = pack_documents(documents(30), tokenizer, 512, limit=12)
    mixer = NeedleMixer(tokenizer, facts=4, questions=2)
    mixed = mixer.mix(blocks, share=1 / 3, seed=2)
    changed = [(a != b).any().item() for a, b in zip(blocks.input_ids, mixed.input_ids, strict=True)]
    assert sum(changed) == 4
    assert changed == (mixed.needle_rows >= 0).any(1).tolist()
    for index in range(len(mixed)):
        item = mixed[index]
        rows = item["needle_rows"][item["needle_rows"] >= 0]
        if len(rows):
            answers = tokenizer.decode(item["input_ids"][rows + 1])
            assert [len(answer) for answer in answers.split()] == [5, 5]
            assert answers.replace(" ", "").isdigit()
    batch = torch.utils.data.default_collate([mixed[i] for i in range(len(mixed))])
    assert batch["input_ids"].shape == (12, 512)
    assert torch.equal(mixer.mix(blocks, share=1 / 3, seed=2).input_ids, mixed.input_ids)
    assert not torch.equal(mixer.mix(blocks, share=1 / 3, seed=3).input_ids, mixed.input_ids)
    assert mixer.mix(blocks, share=0.0).needle_rows.shape == (12, 0)


def test_training_and_evaluation_ask_about_different_things():
    assert not set(TRAINING_KEYS) & set(EVALUATION_KEYS)
    assert len(set(TRAINING_KEYS)) == len(TRAINING_KEYS) > 40
    assert len(set(EVALUATION_KEYS)) == len(EVALUATION_KEYS) > 40


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_prefix": 0}, r"at least 64 \(attention sinks\), got 0"),
        ({"facts": 0}, "facts must be between 1 and"),
        ({"facts": 3, "questions": 4}, "between 1 and the 3 facts, got 4"),
    ],
)
def test_bad_needle_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeedleMixer(small_tokenizer(), **kwargs)


def test_block_too_short_for_needles_is_refused():
    tokenizer = small_tokenizer()
    mixer = NeedleMixer(tokenizer)
    with pytest.raises(ValueError, match=r"a block of 200 tokens is too short for 8 facts"):
        mixer.insert(list(range(300, 500)), seed=0)
    with pytest.raises(ValueError, match="a gap of 900"):
        mixer.insert([300] * 1024, seed=0, gap=900)
    chats = TokenBlocks(torch.zeros(1, 8, dtype=torch.int32), torch.empty(1, 0), torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="plain text"):
        mixer.mix(chats)


def test_importing_the_data_module_loads_no_data_library():
    code = (
        "import sys, rtpurbo_hf.training.data, rtpurbo_hf.evaluation.tasks;"
        "print(sorted({'datasets', 'pyarrow', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
