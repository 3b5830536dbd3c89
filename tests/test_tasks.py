"""Retrieval tasks: exact lengths, answers present where they should be, scoring, determinism, errors."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from small_tokenizer import small_tokenizer

from rtpurbo_hf.evaluation.tasks import TASKS, QARecord, exact_matches, generate, load_qa, passkey, score
from rtpurbo_hf.training.corpora import python_sources

LENGTH = 2500
QA = [
    QARecord(
        f"Which metal is kept in store {i}?", (f"metal-{i}x",), f"Store {i} keeps only metal-{i}x. " + "Dust. " * 60
    )
    for i in range(40)
]
OPTIONS = {"common_words": {"often": 12, "seldom": 2}, "qa": {"qa_data": QA}, "frequent_words": {"kinds": 40}}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = (text for _, text in python_sources() if len(text) > 30_000)
    return [next(found) for _ in range(12)]


def make(task: str, texts: list[str], *, bos: bool = False, **kwargs):
    tokenizer = small_tokenizer(bos=bos)
    arguments = {"length": LENGTH, "seed": 1, **OPTIONS.get(task, {}), **kwargs}
    example = generate(task, tokenizer=tokenizer, haystack_texts=texts, **arguments)
    return example, tokenizer.decode(example.prompt_ids)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length_exactly(task, bos, texts):
    for seed in range(3):
        example, _ = make(task, texts, bos=bos, seed=seed)
        assert len(example.prompt_ids) + example.max_new_tokens == LENGTH
        assert (example.prompt_ids[0] == 1) is bos
        assert example.answers
        assert len(set(example.answers)) == len(example.answers)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_example(task, texts):
    assert make(task, texts)[0] == make(task, texts)[0]
    assert make(task, texts, seed=2)[0].prompt_ids != make(task, texts)[0].prompt_ids


@pytest.mark.parametrize("task", TASKS)
def test_answer_fits_into_the_generated_tokens(task, texts):
    example, _ = make(task, texts)
    needed = small_tokenizer()(" " + ", ".join(example.answers), add_special_tokens=False).input_ids
    assert len(needed) <= example.max_new_tokens or example.match == "any"


@pytest.mark.parametrize(
    ("task", "options", "numbers", "answers"),
    [
        ("niah_single", {}, 1, 1),
        ("niah_multikey", {"distractors": 5}, 6, 1),
        ("niah_multivalue", {"values": 3}, 3, 3),
        ("niah_multiquery", {"queries": 2}, 2, 2),
    ],
)
def test_needles_are_in_the_text_and_the_asked_ones_are_the_answers(task, options, numbers, answers, texts):
    example, prompt = make(task, texts, **options)
    pairs = re.findall(r"\nThe ([a-z ]+) has the secret number (\d{7})\.\n", prompt)
    stated = {value: key for key, value in pairs}
    assert len(stated) == numbers
    assert len(example.answers) == answers
    question = prompt[prompt.index("Question:") :]
    assert all(stated[answer] in question for answer in example.answers)
    assert not any(value in question for value in stated)
    others = {key for value, key in stated.items() if value not in example.answers}
    assert not any(key in question for key in others)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_needle(depth, texts):
    example, prompt = make("niah_single", texts, depth=depth)
    where = prompt.index(example.answers[0]) / prompt.index("Question:")
    assert abs(where - depth) < 0.12
    before = small_tokenizer()(prompt[: prompt.index(example.answers[0])]).input_ids
    assert len(before) >= 64


def test_variables_form_one_chain_in_order(texts):
    example, prompt = make("variable_tracking", texts, hops=3, chains=2)
    body = prompt[prompt.index("Now the text.") :]
    steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", body)
    value = re.search(r"hold the value (\d{5})\?\nAnswer:[^\n]*$", body)[1]
    holders: list[str] = []
    for name, source in steps:
        if source == value or source in holders:
            holders.append(name)
    assert tuple(holders) == example.answers
    assert len(steps) == 8


def test_common_words_are_the_most_common(texts):
    example, prompt = make("common_words", texts)
    body = prompt[prompt.index("Now the list.") : prompt.rindex("Question:")]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", body))
    assert {word for word, _ in counts.most_common(10)} == set(example.answers)
    assert {counts[word] for word in example.answers} == {12}
    assert {count for word, count in counts.items() if word not in example.answers} == {2}


def test_frequent_words_fall_as_zipf(texts):
    example, prompt = make("frequent_words", texts)
    body = prompt[prompt.index("word occurs.") + 12 : prompt.index("Question:")]
    counts = Counter(body.split()).most_common()
    assert tuple(word for word, _ in counts[:3]) == example.answers
    assert counts[2][1] > counts[3][1]
    assert counts[0][1] / counts[1][1] == pytest.approx(4.0, rel=0.25)


def test_qa_holds_the_document_once_among_distractors(texts):
    for depth in (0.0, 0.5, 1.0):
        example, prompt = make("qa", texts, depth=depth)
        assert prompt.count(example.answers[0]) == 1
        assert prompt.count("Document:") > 5
        assert abs(prompt.index(example.answers[0]) / len(prompt) - depth) < 0.2


def test_qa_fills_up_with_haystack_when_documents_are_few(texts):
    example, prompt = make("qa", texts, qa_data=QA[:2])
    assert len(example.prompt_ids) + example.max_new_tokens == LENGTH
    assert prompt.count("Document:") == 3


def test_scores_are_fractions_of_found_answers(texts):
    example, _ = make("niah_multivalue", texts)
    assert score(example, " and ".join(example.answers)) == 1.0
    assert score(example, example.answers[2]) == 0.25
    assert score(example, "nothing") == 0.0
    words, _ = make("variable_tracking", texts)
    assert score(words, " ".join(words.answers).lower()) == 1.0
    question, _ = make("qa", texts, qa_data=[QARecord("Where?", ("here", "there"), "It is here.")])
    assert score(question, "It is THERE") == 1.0


def test_passkey_asks_eight_facts_beyond_the_gap(texts):
    tokenizer = small_tokenizer(bos=True)
    block = passkey(tokenizer, length=2000, gap=512, seed=3, haystack_texts=texts)
    assert len(block.input_ids) == 2000
    assert block.input_ids[0] == 1
    assert len(block.facts) == len({fact.stem for fact in block.facts}) == 8
    first_question = min(start for start, _ in block.answer_spans)
    for fact, (start, stop), (first, last) in zip(block.facts, block.statement_spans, block.answer_spans, strict=True):
        assert tokenizer.decode(block.input_ids[start:stop]) == f"\n{fact.sentence}\n"
        assert tokenizer.decode(block.input_ids[first:last]) == f" {fact.value}"
        assert tokenizer.decode(block.input_ids[:first]).endswith(fact.stem)
        assert start >= 64
        assert stop + 512 <= first_question
    assert passkey(tokenizer, length=2000, gap=512, seed=3, haystack_texts=texts) == block


def test_exact_match_needs_every_token_of_an_answer(texts):
    block = passkey(small_tokenizer(), length=2000, gap=0, seed=0, haystack_texts=texts, questions=3)
    right = [block.input_ids[row + 1] for row in block.answer_rows]
    assert exact_matches(block, right) == [True] * 3
    wrong = list(right)
    wrong[-1] += 1
    assert exact_matches(block, wrong) == [True, True, False]
    with pytest.raises(ValueError, match=f"{len(right) - 1} predictions for {len(right)}"):
        exact_matches(block, right[1:])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("niah", {}, "there is no task 'niah'; there are niah_single"),
        ("niah_single", {"depth": 1.5}, "depth must be between 0 and 1"),
        ("niah_single", {"values": 2}, "niah_single has no option values; it takes none"),
        ("niah_multivalue", {"values": 0}, "values must be at least 1"),
        ("niah_single", {"length": 60}, "too short"),
        ("niah_multikey", {"length": 140, "distractors": 20}, "too short"),
        ("niah_single", {"length": 10_000_000}, "the haystack has"),
        ("common_words", {"often": 400}, "too short for this task"),
        ("variable_tracking", {"hops": 0}, "hops and chains"),
        ("frequent_words", {"alpha": 1.0}, "alpha > 1"),
        ("qa", {"qa_data": []}, r"load_qa\(path\)"),
    ],
)
def test_bad_requests_are_refused(task, change, message, texts):
    with pytest.raises(ValueError, match=message):
        make(task, texts, **change)


def test_missing_words_missing_text_and_missing_questions_are_refused(texts):
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match="haystack_texts is empty"):
        generate("niah_single", tokenizer=tokenizer, length=500, haystack_texts=[])
    with pytest.raises(ValueError, match=r"different words|words for \d+ tokens"):
        generate("common_words", tokenizer=tokenizer, length=100_000, haystack_texts=texts[:1])
    with pytest.raises(ValueError, match="qa needs qa_data"):
        generate("qa", tokenizer=tokenizer, length=500, haystack_texts=texts)


def test_qa_files_are_read_in_both_formats(tmp_path):
    squad = {
        "data": [{"paragraphs": [{"context": "C", "qas": [
            {"question": "Q", "answers": [{"text": "A"}, {"text": "A"}]},
            {"question": "none", "answers": []},
        ]}]}]
    }  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "rows.jsonl").write_text('{"question": "Q", "answers": "A", "context": "C"}\n\n')
    assert load_qa(tmp_path / "squad.json") == load_qa(tmp_path / "rows.jsonl") == [QARecord("Q", ("A",), "C")]
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(ValueError, match="question, answers and context"):
        load_qa(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        load_qa(tmp_path / "nothing.json")
