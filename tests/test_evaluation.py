"""The fidelity instrument on a tiny random model: figures, intervals, baselines, resuming, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import everything_retrieves, tiny_base
from small_tokenizer import small_tokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast
from typer.testing import CliRunner

from rtpurbo_hf.ablation import ablate, setups
from rtpurbo_hf.auto import RTPurboForCausalLM
from rtpurbo_hf.cli import app
from rtpurbo_hf.corpus import write_corpus
from rtpurbo_hf.evaluation.bootstrap import Bootstrap
from rtpurbo_hf.evaluation.profile import SparsityProfile, oracle_tokens
from rtpurbo_hf.evaluation.results import RecordStore
from rtpurbo_hf.evaluation.run import evaluate, held_out_documents
from rtpurbo_hf.evaluation.scoring import Arm, Record, emulate, generate_answers
from rtpurbo_hf.evaluation.selectors import PAGE_SIZE, page_bounds
from rtpurbo_hf.evaluation.suites import Plan
from rtpurbo_hf.evaluation.tasks import generate
from rtpurbo_hf.evaluation.variants import parse_variant, parse_variants
from rtpurbo_hf.presets import preset
from rtpurbo_hf.training.calibration import Calibration
from rtpurbo_hf.training.corpora import python_sources
from rtpurbo_hf.training.data import load_texts

LENGTH, ROWS = 384, 24


def tiny_model(**options) -> RTPurboForCausalLM:
    tokenizer = small_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    torch.manual_seed(0)
    settings = {"sliding_window": 32, "index_dim": 8, "index_min_tokens": 4, "index_top_p": 0.8, **options}
    return RTPurboForCausalLM.from_base(base, retrieval_heads=[[0, 1], [3]], **settings)


@pytest.fixture(scope="module")
def model() -> RTPurboForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(5, 1500, (LENGTH,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder / "tiny")
    small_tokenizer().save_pretrained(folder / "tiny")
    (folder / "texts").mkdir()
    long = (text for _, text in python_sources() if len(text) > 20_000)
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(next(long)[:20_000], encoding="utf-8")
    return folder


def options(**changes):
    return {"variants": parse_variants("dense,sparse"), "progress": False, **changes}


def small_plan(**changes) -> Plan:
    return Plan(**{"suites": ("ppl",), "lengths": (LENGTH,), "blocks": 2, "samples": 2, "rows": ROWS, **changes})


# bootstrap


def test_bootstrap_finds_the_figure_and_a_sensible_interval():
    draws = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found = Bootstrap(400).ratio([(value, 1.0) for value in draws])
    error = draws.std() / 20
    assert found.value == pytest.approx(draws.mean())
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.1)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.1)


def test_bootstrap_is_paired_and_seeded():
    generator = np.random.default_rng(2)
    base = [(10 * float(x), 1.0) for x in generator.normal(0, 1, 50)]
    shifted = [(a + 0.5, b) for a, b in base]
    delta = Bootstrap(50).difference(shifted, base)
    assert (delta.value, delta.low, delta.high) == pytest.approx((0.5, 0.5, 0.5))
    assert Bootstrap(50, seed=4).ratio(base) == Bootstrap(50, seed=4).ratio(base)
    assert Bootstrap(50, seed=4).ratio(base) != Bootstrap(50, seed=5).ratio(base)


def test_bootstrap_of_perplexity_is_relative():
    base, other = [(2.0, 1.0), (6.0, 2.0)], [(2.1, 1.0), (6.2, 2.0)]
    assert Bootstrap(2).ratio(base, exponential=True).value == pytest.approx(np.exp(8 / 3))
    assert Bootstrap(2).difference(other, base, exponential=True).value == pytest.approx(np.exp(0.1) - 1)


def test_bootstrap_refuses_other_shapes():
    with pytest.raises(ValueError, match="expected 3 pairs"):
        Bootstrap(3).ratio([(1.0, 1.0)])
    with pytest.raises(ValueError, match="at least 1"):
        Bootstrap(0)


# variants and selectors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dens", "no variant 'dens'"),
        ("sparse:q=1", "no setting 'q'"),
        ("headwise:p=0.9", "headwise has no setting 'p'"),
        ("sparse:prefill=tiled", "prefill: expected one of dense, sparse, sparse_tiled"),
        ("sparse_prefill:q=1", "sparse has no setting 'q'"),
        ("sparse:p=high", "expected a number"),
        ("headwise:kv=int8", "headwise has no setting 'kv'"),
        ("topk:0.5", "expected topk:tokens"),
        ("topk", "expected a number"),
        ("oracle:3", "expected oracle:a p below 1"),
        ("int8:64", "int8 takes no budget"),
        ("headwise:prefill=sparse", "headwise has no setting 'prefill'"),
        ("quest:0", "expected quest:"),
        (" , ", "no variant was given"),
    ],
)
def test_unknown_variants_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variants(text)


def test_overrides_hold_only_meanwhile(model):
    variant = parse_variant("sparse:p=0.5+floor=7+block=16+window=8")
    before = model.config.to_dict()
    with variant.applied(model):
        found = model.config
        assert (found.index_top_p, found.index_min_tokens, found.index_block_size) == (0.5, 7, 16)
        assert found.sliding_window == 8
    assert model.config.to_dict() == before
    with parse_variant("sparse:kv=int8").applied(model):
        assert model.config.kv_cache_dtype == "int8"
    assert model.config.kv_cache_dtype == "auto"
    with pytest.raises(ValueError, match="one of auto, int8, fp8"), parse_variant("sparse:kv=int4").applied(model):
        pass
    with pytest.raises(ValueError, match="index_block_size"), parse_variant("sparse:block=5").applied(model):
        pass
    assert model.config.to_dict() == before


def test_sparse_prefill_is_a_setting(model):
    plain, tuned = (parse_variant(text) for text in ("sparse_prefill", "sparse_prefill:p=0.5"))
    assert parse_variant("sparse:prefill=sparse_tiled").overrides == plain.overrides
    assert plain.generates
    assert not plain.is_checkpoint
    with tuned.applied(model):
        assert (model.config.retrieval_prefill, model.config.index_top_p) == ("sparse_tiled", 0.5)
    assert model.config.retrieval_prefill == "dense"


def test_sparse_prefill_against_sparse(checkpoint, tmp_path):
    """The prefill's own figures, measured against dense prefill; with p = 1 nothing is selected."""
    plan = small_plan(suites=("kl", "sparsity"), lengths=(768,))
    names = "sparse,sparse_prefill:p=0.3,sparse_prefill:p=1"
    common = options(variants=parse_variants(names), data=str(checkpoint / "texts"), reference="sparse")
    found = evaluate(str(checkpoint / "tiny"), tmp_path, plan, **common)
    rows = {(row.task, row.variant): row.value for row in found.rows}
    low, high = "sparse_prefill:p=0.3", "sparse_prefill:p=1"
    assert found.meta["reference"] == "sparse"
    assert rows["kl", "sparse"] == 0
    assert rows["kl", low] > 0
    assert 0.3 < rows["text/prefill_read", low] < 1
    assert 0 < rows["text/prefill_kept_low", low] <= rows["text/prefill_kept_mass", low] < 1
    assert not {("text/prefill_read", name) for name in ("sparse", high)} & set(rows)
    with pytest.raises(ValueError, match="none of the variants: sparse"):
        evaluate(str(checkpoint / "tiny"), tmp_path / "b", plan, **common | {"reference": "dense"})


class Watch:
    """Keeps what `on_selection` was called with."""

    def __init__(self) -> None:
        self.tiles = []

    def __call__(self, layer, rows, chosen, valid, weights):
        self.tiles.append((layer, chosen.clone(), valid.expand_as(chosen).clone(), weights.clone()))


def watched(model, variant, ids, equal=None):
    seen = Watch()
    with torch.inference_mode(), variant.applied(model):
        selector = variant.build_selector(model, equal)
        model(ids[None], use_cache=False, decode_rows=ROWS, on_selection=seen, selector=selector)
    return seen.tiles


def test_oracle_keeps_the_mass_with_the_fewest_tokens(model, ids):
    index = watched(model, parse_variant("sparse"), ids)
    for layer, chosen, _, weights in watched(model, parse_variant("oracle:0.85"), ids):
        kept = (weights * chosen).sum(-1)
        assert kept.min() >= 0.85 - 1e-5
        assert torch.equal(oracle_tokens(weights, kept), chosen.sum(-1))
        other = next(tile for tile in index if tile[0] == layer)
        mass = (other[3] * other[1]).sum(-1)
        assert (oracle_tokens(other[3], mass) <= other[1].sum(-1)).all()


def test_top_k_selects_exactly_k(model, ids):
    for _, chosen, *_ in watched(model, parse_variant("topk:37"), ids):
        assert (chosen.sum(-1) == 37).all()
    for _, chosen, *_ in watched(model, parse_variant("topk:equal"), ids, equal=12.4):
        assert (chosen.sum(-1) == 12).all()


def test_eight_bit_keys_select_almost_the_same(model, ids):
    chosen = {}
    for name in ("sparse", "int8"):
        watch = Watch()
        variant = parse_variant(name)
        with torch.inference_mode(), variant.applied(model):
            selector = variant.build_selector(model)
            model(ids[None], use_cache=False, decode_rows=ROWS, on_selection=watch, selector=selector)
        chosen[name] = torch.cat([tile[1].flatten() for tile in watch.tiles])
    both, either = (chosen["sparse"] & chosen["int8"]).sum(), (chosen["sparse"] | chosen["int8"]).sum()
    assert 0.9 < both / either < 1, "rounded keys move a few choices, and only a few"


def test_page_bounds_are_bounds_and_quest_takes_whole_pages(model, ids):
    tiles = []

    def look(tile):
        tiles.append(tile)
        return tile.valid.expand_as(tile.scores)

    with torch.inference_mode(), model.attention_mode("sparse"):
        model(ids[None], use_cache=False, decode_rows=ROWS, selector=look)
    for tile in tiles:
        scores = tile.scores.masked_fill(~tile.valid, float("-inf"))
        best = scores.unflatten(-1, (-1, PAGE_SIZE)).amax(-1)
        bounds = page_bounds(tile)
        seen = best.isfinite()
        assert (bounds[seen] >= best[seen] - 1e-5).all()
        # nothing that a row does not see may raise its own page's bound
        own = tile.slots[0, 0] // PAGE_SIZE
        assert bounds[0, 0, 0, own] <= (tile.query[0, 0, 0].abs() * tile.key[0, 0].abs().amax(0)).sum() * tile.scale
    for _, chosen, valid, _ in watched(model, parse_variant("quest:64"), ids):
        pages, visible = chosen.unflatten(-1, (-1, PAGE_SIZE)), valid.unflatten(-1, (-1, PAGE_SIZE))
        assert torch.equal(pages, pages.any(-1, keepdim=True) & visible)
        assert (pages.any(-1).sum(-1) == 4).all()


def test_a_selector_of_everything_is_headwise(model, ids):
    with torch.inference_mode():
        with model.attention_mode("headwise"):
            expected = model(ids[None], use_cache=False, logits_to_keep=ROWS).logits
        everything = model(
            ids[None],
            use_cache=False,
            logits_to_keep=ROWS,
            decode_rows=ROWS,
            selector=lambda tile: tile.valid.expand_as(tile.scores),
        ).logits
        with pytest.raises(ValueError, match="without a cache"):
            model(ids[None], use_cache=True, selector=lambda tile: tile.valid)
    torch.testing.assert_close(everything, expected, atol=1e-4, rtol=1e-4)


# sparsity


def by_hand(model, tiles) -> tuple[float, float]:
    """Attended parts of query heads and of KV heads, from full masks."""
    window, sinks = model.config.sliding_window, model.config.num_sink_tokens
    query_parts, kv_parts = [], []
    for layer, chosen, valid, _ in tiles:
        plan = model.converted()[layer].rtpurbo.plans["sparse"]
        seen = valid[:, :1]
        slots = torch.arange(seen.shape[-1])
        position = seen.sum(-1, keepdim=True) - 1
        local = seen & ((slots > position - window) | (slots < sinks))
        heads = dict.fromkeys(plan.local, local)
        heads |= {h: chosen[:, i : i + 1] for i, h in enumerate(plan.retrieval)}
        query_parts += [(heads[h].sum(-1) / seen.sum(-1)).mean() for h in range(plan.num_heads)]
        for kv_head in range(plan.num_kv_heads):
            group = torch.cat([heads[h] for h in heads if plan.kv_head(h) == kv_head], 1)
            union = group.any(1).sum(-1)
            assert (union <= group.sum((1, 3))).all()
            kv_parts.append((union / seen[:, 0].sum(-1)).mean())
    return float(torch.stack(query_parts).mean()), float(torch.stack(kv_parts).mean())


def test_profile_counts_what_masks_say(model, ids):
    variant = parse_variant("sparse")
    query_part, kv_part = by_hand(model, watched(model, variant, ids))
    record = emulate(Arm("sparse", model, variant), ids, ROWS).record()
    figures = {name: a / b for name, (a, b) in record.sums.items()}
    assert figures["compute_sparsity"] == pytest.approx(1 - query_part, abs=1e-6)
    assert figures["memory_sparsity"] == pytest.approx(1 - kv_part, abs=1e-6)
    assert figures["memory_sparsity"] < figures["compute_sparsity"]
    assert 0 < figures["selected_fraction"] < 1
    assert figures["tokens_over_oracle"] >= 1
    assert record.selected_tokens == pytest.approx(figures["active_tokens"])
    assert {layer: len(heads) for layer, heads in record.heads.items()} == {"0": 2, "1": 1}


@pytest.mark.parametrize(("name", "part"), [("dense", 0.0), ("streaming", 1 - 36 / 376)])
def test_profile_without_selection(model, name, part):
    variant = parse_variant(name)
    with variant.applied(model):
        sums = SparsityProfile(model, torch.tensor([376])).sums()
    assert sums["compute_sparsity"][0] / sums["compute_sparsity"][1] == pytest.approx(part)
    assert sums["memory_sparsity"][0] / sums["memory_sparsity"][1] == pytest.approx(part)
    assert "kept_mass" not in sums


# the whole


def test_everything_selected_is_dense():
    base = tiny_base(vocab_size=len(small_tokenizer()), num_hidden_layers=2, hidden_size=64)
    whole = RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base), index_min_tokens=LENGTH)
    ids = torch.randint(5, 1500, (100,), generator=torch.Generator().manual_seed(3))
    dense = emulate(Arm("dense", whole, parse_variant("dense")), ids, 10).logits
    sparse = emulate(Arm("sparse", whole, parse_variant("sparse")), ids, 10)
    torch.testing.assert_close(sparse.logits, dense, atol=1e-4, rtol=1e-4)
    assert sparse.record().sums["selected_fraction"][0] == 40 * 2


def test_emulated_suites_are_deterministic_and_resumed(checkpoint, tmp_path, monkeypatch):
    plan = small_plan(suites=("ppl", "kl", "passkey", "sparsity"), lengths=(768,))
    common = options(emulated=parse_variants("topk:equal,oracle,quest:equal"), data=str(checkpoint / "texts"))
    first = evaluate(str(checkpoint / "tiny"), tmp_path / "a", plan, **common)
    assert [path.name for path in first.files] == ["fidelity.json", "fidelity.md", "fidelity.png"]
    found = json.loads(first.files[0].read_text())
    assert set(found) == {"meta", "rows", "heads"}
    rows = {(row["suite"], row["task"], row["variant"]): row for row in found["rows"]}
    assert rows["kl", "kl", "dense"]["value"] == 0
    assert rows["ppl", "top1_agreement", "dense"]["value"] == 1
    assert rows["ppl", "perplexity", "oracle"]["delta"] is not None
    for row in found["rows"]:
        assert row["low"] <= row["value"] + 1e-9
        assert row["value"] <= row["high"] + 1e-9
        assert row["n"] == 2
    assert rows["sparsity", "text/kept_mass", "oracle"]["value"] >= 0.8
    tokens = {name: rows["sparsity", "text/active_tokens", name]["value"] for name in ("sparse", "topk:equal")}
    assert tokens["topk:equal"] == pytest.approx(tokens["sparse"], abs=0.5)
    assert ("sparsity", "passkey/memory_sparsity", "sparse") in rows
    assert found["heads"]["sparse"]["768"].keys() == {"0", "1"}

    # cut the file in the middle of a line: the rest is scored again, and all comes out the same
    partial = tmp_path / "a" / "partial.jsonl"
    text = partial.read_text()
    partial.write_text(text[: int(len(text) * 0.6)])
    again = evaluate(str(checkpoint / "tiny"), tmp_path / "a", plan, **common)
    assert again.rows == first.rows

    # a finished run computes nothing
    monkeypatch.setattr("rtpurbo_hf.evaluation.suites.emulate", None)
    assert evaluate(str(checkpoint / "tiny"), tmp_path / "a", plan, **common).rows == first.rows
    other = small_plan(suites=("ppl",), rows=ROWS - 1)
    with pytest.raises(ValueError, match=r"other settings \(rows\)"):
        evaluate(str(checkpoint / "tiny"), tmp_path / "a", other, **common)


def test_ruler_scores_what_is_generated(checkpoint, tmp_path, monkeypatch):
    tasks = ("niah_single", "variable_tracking")
    plan = small_plan(suites=("ruler", "sparsity"), lengths=(640,), tasks=tasks, samples=3)
    common = options(emulated=parse_variants("oracle"), data=str(checkpoint / "texts"))
    found = evaluate(str(checkpoint / "tiny"), tmp_path, plan, **common)
    rows = {(row.suite, row.task, row.variant): row for row in found.rows}
    assert {variant for suite, _, variant in rows if suite == "ruler"} == {"dense", "sparse"}
    assert rows["ruler", "average", "sparse"].n == 3
    assert 0 < rows["sparsity", "niah_single/memory_sparsity", "sparse"].value < 1
    monkeypatch.setattr("rtpurbo_hf.evaluation.suites.generate_answers", None)
    assert evaluate(str(checkpoint / "tiny"), tmp_path, plan, **common).rows == found.rows


def test_a_right_answer_ends_generation_and_scores(checkpoint, monkeypatch):
    texts = [path.read_text() for path in sorted((checkpoint / "texts").glob("*.txt"))]
    tokenizer = small_tokenizer()
    examples = [
        generate("niah_single", tokenizer=tokenizer, length=512, seed=seed, haystack_texts=texts) for seed in (1, 2)
    ]
    answers = [tokenizer(f" {example.answers[0]}.", add_special_tokens=False).input_ids for example in examples]
    speaker = tiny_model()
    steps = []

    def speak(input_ids, **kwargs):
        step = len(steps)
        steps.append(step)
        logits = torch.zeros(len(answers), 1, len(tokenizer))
        for row, answer in enumerate(answers):
            logits[row, 0, answer[min(step, len(answer) - 1)]] = 1.0
        return CausalLMOutputWithPast(logits=logits)

    monkeypatch.setattr(speaker, "forward", speak)
    found = generate_answers(Arm("dense", speaker, parse_variant("dense")), examples, tokenizer)
    assert [value for value, _ in found] == [1.0, 1.0]
    assert len(steps) < examples[0].max_new_tokens
    answers[1] = answers[0]
    steps.clear()
    assert [value for value, _ in generate_answers(Arm("d", speaker, parse_variant("dense")), examples, tokenizer)] == [
        1.0,
        0.0,
    ]


def test_two_checkpoints_side_by_side(checkpoint, tmp_path):
    tiny = str(checkpoint / "tiny")
    found = evaluate(tiny, tmp_path, small_plan(), **options(compare=tiny, data=str(checkpoint / "texts")))
    values = {row.variant: row.value for row in found.rows if row.task == "kl"}
    assert values["sparse"] == values["sparse@tiny"] > 0
    assert values["dense@tiny"] == 0


def test_against_the_dense_base(checkpoint, tmp_path):
    base = tiny_base(vocab_size=len(small_tokenizer()), num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    base.save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    settings = {"sliding_window": 32, "base_model_name_or_path": str(tmp_path / "base")}
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0], [1]], **settings)
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    small_tokenizer().save_pretrained(tmp_path / "adapter")
    arguments = ["--compare", "base", "--suite", "ppl", "--lengths", "256", "--rows", "16", "--blocks", "2"]
    always = ["eval", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--data", str(checkpoint / "texts")]
    done = CliRunner().invoke(app, [*always, "--device", "cpu", *arguments], catch_exceptions=False)
    assert "perplexity" in done.stdout
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    kl = {row["variant"]: row["value"] for row in found["rows"] if row["task"] == "kl"}
    assert list(kl) == ["base", "dense", "streaming", "headwise", "sparse"]
    assert kl["base"] == kl["dense"] == 0 < kl["streaming"]
    assert found["meta"]["reference"] == "base"


def test_texts_that_nothing_saw_are_scored_whole(checkpoint):
    texts = str(checkpoint / "texts")
    assert len(held_out_documents(texts, LENGTH)) < len(held_out_documents(texts, LENGTH, unseen=True)) == 40


def test_an_adapter_on_a_base_that_moved(tmp_path):
    base = tiny_base(vocab_size=len(small_tokenizer()), num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    base.save_pretrained(tmp_path / "base")
    model = RTPurboForCausalLM.from_base(
        base, retrieval_heads=[[0], [1]], sliding_window=32, base_model_name_or_path="there/before"
    )
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    small_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for number, (_, text) in enumerate(item for item in python_sources() if len(item[1]) > 20_000):
        (tmp_path / "texts" / f"{number}.txt").write_text(text[:5000] if number < 30 else "", encoding="utf-8")
    given = options(base=str(tmp_path / "base"), compare="base", data=str(tmp_path / "texts"), unseen=True)
    found = evaluate(str(tmp_path / "adapter"), tmp_path / "out", small_plan(), **given)
    kl = {row.variant: row.value for row in found.rows if row.task == "kl"}
    assert kl["base"] == kl["dense"] == 0 < kl["sparse"]


def test_corpus_files_are_data(tmp_path):
    done = CliRunner().invoke(app, ["corpus", "-o", str(tmp_path), "--chars", "30000", "--sources", "python"])
    assert done.exit_code == 0, done.output
    documents = load_texts(str(tmp_path / "python.jsonl"))
    assert f"{len(documents)} documents" in done.output
    assert min(map(len, documents)) >= 29_900
    with pytest.raises(ValueError, match="no source 'psalms'"):
        write_corpus(tmp_path, chars=30_000, sources=("psalms",))
    with pytest.raises(ValueError, match="at least 1000 characters"):
        write_corpus(tmp_path, chars=10, sources=("python",))


# ablations


def test_setups_train_only_what_differs():
    found = setups(("p", "window", "index_dim", "sharing"), preset("demo", context=1024, index_dim=16))
    assert [v.name for v in found[0].variants] == [
        *("dense", "headwise", "default"),
        *("p=0.8", "p=0.85", "p=0.9", "p=0.95", "p=0.99"),
        *("window=128", "window=256", "window=512", "index_dim=16", "sharing=head"),
    ]
    assert [(s.settings.index_dim, s.settings.index_key_sharing, len(s.variants)) for s in found[1:]] == [
        (4, "head", 1),
        (32, "head", 1),
        (16, "kv_head", 1),
    ]
    split = setups(("split", "selector"), preset("demo", context=1024, index_dim=16, index_rotary_dim=4))
    assert [v.name for v in split[0].variants[3:]] == ["split=12+4", "topk:equal", "quest:equal", "oracle", "int8"]
    shapes = [(s.settings.index_dim, s.settings.index_rotary_dim) for s in split[1:]]
    assert shapes == [(16, 0), (16, 8), (32, 8), (32, 16)]
    heads = setups(("heads",), preset("demo", context=1024))
    assert [v.name for v in heads[0].variants[3:]] == ["headwise,heads=even", "heads=even"]
    assert [(s.settings.head_rule, [v.mode for v in s.variants]) for s in heads[1:]] == [
        ("score", ["headwise", "sparse"])
    ]
    small = setups(("index_dim",), preset("demo", index_dim=16, index_rotary_dim=4))[1].settings
    assert (small.index_dim, small.index_rotary_dim) == (4, 2)
    with pytest.raises(ValueError, match="no ablation speed"):
        setups(("speed",), preset("demo"))


def test_ablation_trains_scores_and_resumes(checkpoint, tmp_path, monkeypatch):
    base = tiny_base(vocab_size=len(small_tokenizer()), num_hidden_layers=2, hidden_size=128, num_attention_heads=4)
    base.save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    changes = {"sliding_window": 64, "steps": 3, "train_blocks": 3, "warmup_steps": 1, "index_min_tokens": 8}
    sizes = {"context": 640, "ratio": 0.25, "eval_blocks": 2, "eval_prompts": 2}
    settings = preset("demo", head_rule="score", **sizes, **changes)
    plan = small_plan(suites=("ppl", "sparsity"), lengths=(640,))
    given = {
        "names": ("init", "p", "heads"),
        "settings": settings,
        "data": str(checkpoint / "texts"),
        "progress": False,
    }
    found = ablate(str(tmp_path / "base"), tmp_path / "out", plan, **given)
    assert [path.name for path in found.files] == ["ablation.json", "ablation.md", "ablation.png"]
    kl = {row.variant: row.value for row in found.rows if row.task == "kl"}
    rules = {f"{kind}heads={rule}" for kind in ("", "headwise,") for rule in ("score", "even")}
    assert set(kl) == {"dense", "headwise", "default", "init=svd", "init=random"} | rules | {
        f"p={p}" for p in (0.8, 0.85, 0.9, 0.95, 0.99)
    }
    assert kl["dense"] == 0
    assert kl["default"] == kl["init=svd"] == kl["heads=score"] != kl["init=random"]
    calibration = Calibration.load(tmp_path / "out" / "calibration.json")
    changed = calibration.retrieval_heads != calibration.select(rule="even").retrieval_heads
    assert (kl["headwise"] != kl["headwise,heads=even"]) == changed
    tokens = {row.variant: row.value for row in found.rows if row.task == "text/active_tokens"}
    assert tokens["p=0.8"] < tokens["p=0.9"] == tokens["default"] < tokens["p=0.99"]
    assert all(row.delta is not None for row in found.rows if row.task == "kl" and row.variant != "dense")
    monkeypatch.setattr("rtpurbo_hf.ablation.train_indexers", None)
    assert ablate(str(tmp_path / "base"), tmp_path / "out", plan, **given).rows == found.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ablate", "speed"), "no ablation speed"),
        (("--suite", "ppl", "--variants", "sparse:prefill=fast"), "prefill: expected one of dense, sparse"),
        (("--suite", "speed"), "no suite speed"),
        (("--variants", "sparser"), "no variant 'sparser'"),
        (("--suite", "ruler", "--variants", "oracle"), "name them in --emulated"),
        (("--suite", "ruler", "--tasks", "qa"), "task qa needs --qa-data"),
        (("--suite", "ruler", "--tasks", "niah_multiquery", "--lengths", "128"), "is too short"),
        (("--suite", "ppl", "--lengths", "8"), "at least 64 tokens"),
        (("--suite", "ppl", "--lengths", "4k"), "expected integers"),
        (("--suite", "ppl", "--variants", "topk:equal"), "list that too"),
    ],
)
def test_bad_input(checkpoint, tmp_path, arguments, message):
    always = ["eval", str(checkpoint / "tiny"), "-o", str(tmp_path / "out"), "--data", str(checkpoint / "texts")]
    done = CliRunner().invoke(app, [*always, "--device", "cpu", *arguments])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_store_refuses_other_settings(tmp_path):
    path = tmp_path / "partial.jsonl"
    # regression: a run that ended before its first result kept the folder from any other
    RecordStore(path, {"seed": 0})
    RecordStore(path, {"seed": 1}).put(("text", "block", 64, "dense", 0), Record({"nll": (1.5, 2.0)}))
    assert RecordStore(path, {"seed": 1})["text", "block", 64, "dense", 0].sums == {"nll": (1.5, 2.0)}
    with pytest.raises(ValueError, match="other settings"):
        RecordStore(path, {"seed": 2})
