"""The model benchmark without a GPU: its plan, planted caches, checks and peers on tiny models; times are made up."""

import functools
import json

import pytest
import torch
from families import tiny_base
from transformers import DynamicCache

from rtpurbo_hf.benchmarks import model_dense
from rtpurbo_hf.benchmarks.harness import Row, Timing, relative_error
from rtpurbo_hf.benchmarks.model import compile_order, convert, longest
from rtpurbo_hf.benchmarks.model_check import check_decode, check_prefill, verdict
from rtpurbo_hf.benchmarks.model_dense import Budget, Peers, add_compiled, graphed_peers
from rtpurbo_hf.benchmarks.model_plan import SHAPES, draw_retrieval_heads, make_plan, selected_share
from rtpurbo_hf.benchmarks.model_planted import CountSelected, PlantedIndex, ScaleIndex, TwoLevels, planted_cache
from rtpurbo_hf.benchmarks.part_results import Results
from rtpurbo_hf.modeling import attention_rtpurbo
from rtpurbo_hf.modeling.families_rtpurbo import CACHE_ARGUMENT
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM


def test_paper_preset_reaches_256k_with_the_real_geometry():
    plan = make_plan("paper")
    assert plan.batches == (1, 4)
    assert plan.parts == ("context", "decode", "prefill")
    assert plan.prefill[-1] == plan.decode[-1] == 262_144
    assert plan.decode[0] == 8192
    config = plan.shape.config()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (36, 4096, 12_288)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    moe = SHAPES["qwen3-30b-a3b"]
    assert (moe.whole, moe.config(moe.whole).num_key_value_heads, moe.config().num_hidden_layers) == (48, 4, 12)


def test_lengths_and_layers_replace_the_preset():
    plan = make_plan("quick", shape="qwen3-30b-a3b", lengths=[65_536], layers=3)
    assert plan.prefill == plan.decode == (65_536,)
    assert plan.shape.layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "full"}, "preset must be one of"),
        ({"preset": "quick", "shape": "llama"}, "shape must be one of"),
        ({"preset": "quick", "lengths": [4096]}, "start at the window"),
        ({"preset": "quick", "batches": ()}, "positive numbers"),
        ({"preset": "quick", "layers": 37}, "1..36"),
        ({"preset": "quick", "only": ["decoding"]}, "the parts are"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(arguments.pop("preset"), **arguments)


def test_parts_and_the_model_of_the_checks():
    assert make_plan("paper", only=["prefill", "context"]).parts == ("context", "prefill")
    config = SHAPES["qwen3-30b-a3b"].check_config(2)
    assert (config.num_hidden_layers, config.mlp_only_layers, config.num_key_value_heads) == (2, [0, 1], 4)
    assert all(
        draw_retrieval_heads(2, 32, shape.config(2).num_key_value_heads, ratio=0.15) for shape in SHAPES.values()
    )


def test_the_budget_for_compiling_goes_to_the_ends_first():
    cases = [(8192, 1), (8192, 4), (32_768, 1), (32_768, 4), (131_072, 1)]
    assert compile_order(cases)[:3] == [(8192, 1), (131_072, 1), (8192, 4)]
    assert sorted(compile_order(cases)) == cases


def test_retrieval_heads_are_uneven_and_the_stated_share():
    heads = draw_retrieval_heads(36, 32, 8, ratio=0.15)
    counts = [len(layer) for layer in heads]
    assert sum(counts) == round(0.15 * 36 * 32)
    assert max(counts) >= 3 * max(min(counts), 1)
    assert all(layer == sorted(set(layer)) for layer in heads)
    assert heads == draw_retrieval_heads(36, 32, 8, ratio=0.15)


def test_selected_share_is_that_of_the_length_below():
    assert selected_share(8192) > selected_share(40_000) == selected_share(32_768) > selected_share(262_144)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = RTPurboForCausalLM.from_base(
        tiny_base("llama").eval(), retrieval_heads=[[0, 1], [], [3], [0, 1, 2, 3]], sliding_window=64, num_sink_tokens=4
    )
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj)
    return model


@torch.no_grad()
def test_planted_share_is_what_the_model_selects(model):
    cache = planted_cache(model, 4000, 2)
    ids = torch.ones(2, 1, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache, observer=ScaleIndex(cache, 0.15))
    counter = CountSelected(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=counter)
    assert counter.mean() == pytest.approx(0.15, rel=0.25)


@torch.no_grad()
def test_two_levels_leave_one_possible_selection(model):
    cache = planted_cache(model, 640, 1)
    ids = torch.ones(1, 1, dtype=torch.long)
    levels = TwoLevels(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=levels)
    cache.crop(-1)
    model.config.index_min_tokens = levels.count
    counter = CountSelected(model, cache)
    first = model(input_ids=ids, past_key_values=cache, observer=counter).logits
    assert counter.mean() == pytest.approx(levels.count / 640)
    cache.crop(-1)
    assert torch.equal(first, model(input_ids=ids, past_key_values=cache).logits)


def test_longest_finds_the_last_length_that_fits():
    def allocate(length: int) -> int:
        if length > 100_000:
            raise torch.cuda.OutOfMemoryError("full")
        return length

    assert longest(allocate, 1 << 20) == 98_304
    assert longest(allocate, 50_000) == 49_152


# --- the checks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """In fp16: Triton's interpreter takes the bits of bf16 operands of a dot for integers."""
    torch.manual_seed(0)
    base = tiny_base("llama", num_hidden_layers=2).half()
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0, 1], [3]], sliding_window=64, num_sink_tokens=4)
    for indexer in model.indexers().values():
        torch.nn.init.normal_(indexer.q_proj)
    return model


def test_the_decode_check_is_green_with_a_wide_margin(small):
    """The real kernels, in Triton's interpreter where there is no GPU."""
    entries = check_decode(small, length=200, backend="triton")
    assert entries["check"] == "ok"
    assert entries["control_error"] > 10 * max(entries["checked_error"], 0.02)
    assert entries["check_layers"] == 2
    assert small.config.index_min_tokens == 0


def test_the_decode_check_is_red_when_the_selection_is_ignored(small, monkeypatch):
    whole = attention_rtpurbo.decode_step

    def ignoring(*args, **options):
        return whole(*args, **{**options, "min_tokens": 1 << 20})

    monkeypatch.setattr(attention_rtpurbo, "decode_step", ignoring)
    entries = check_decode(small, length=200, backend="triton")
    assert entries["check"] == "red"
    assert entries["checked_error"] == pytest.approx(entries["control_error"], rel=0.05)


def test_a_check_whose_control_is_near_the_error_is_red():
    expected = torch.ones(1, 1, 100)
    assert verdict(expected * 1.01, expected, expected * 2)["check"] == "ok"
    assert verdict(expected * 1.01, expected, expected * 1.03)["check"] == "red"
    assert verdict(expected * 1.01, expected, expected * float("nan"))["check"] == "ok"
    assert verdict(expected * float("nan"), expected, expected * 2)["check"] == "red"


@pytest.mark.parametrize("mode", ["dense", "sparse_tiled"])
def test_the_prefill_check_goes_both_ways(small, monkeypatch, mode):
    green = check_prefill(small, mode, length=400, backend="auto")
    assert green["check"] == "ok"
    assert green["control_error"] > 4 * green["checked_error"]
    name = "dense_attention" if mode == "dense" else "sparse_prefill_attention"
    whole = getattr(attention_rtpurbo, name)

    def ignoring(*args, **options):
        if options["backend"] == "auto":
            options["out"][:, :, list(options["heads"])] = 0
            return options["out"]
        return whole(*args, **options)

    monkeypatch.setattr(attention_rtpurbo, name, ignoring)
    assert check_prefill(small, mode, length=400, backend="auto")["check"] == "red"


def test_planted_prefill_index_has_the_stated_selectivity(model):
    few, many = (PlantedIndex(model, 4096, share) for share in (0.02, 0.4))
    assert few.selected_blocks(model.config) < 0.5 < many.selected_blocks(model.config) <= 1
    ids = torch.ones(1, 4096, dtype=torch.long)
    with torch.no_grad(), few:
        seen = []
        model(ids[:, :4096], use_cache=False, logits_to_keep=1, observer=lambda inputs: seen.append(inputs.indexer))
        indexer = next(indexer for indexer in seen if indexer is not None)
        got = indexer.queries(torch.zeros(1, 4, 4096, 8), torch.arange(4096)[None])
        assert torch.equal(got, few.vectors(indexer)[0])
        with pytest.raises(ValueError, match="planted for prefills of"):
            model(ids[:, :100], use_cache=False)
    assert "queries" not in vars(indexer)


# --- dense peers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def base(monkeypatch):
    """A tiny Qwen3, and a `measure` that runs the step and reports a millisecond: CUDA events need a GPU."""

    def measure(step, **options):
        step()
        return Timing(1.0, 1.0, 1.0)

    def no_graph(cases):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(model_dense, "measure", measure)
    monkeypatch.setattr(model_dense, "capture", no_graph)
    base = tiny_base("qwen3")
    base.set_attn_implementation("sdpa")
    return base


def test_converted_twin_leaves_the_base_as_it_was(base):
    base.config.vocab_size, ids = 97, torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = convert(base)
        with model.attention_mode("dense"):
            assert relative_error(model(ids, use_cache=False).logits, before) < 1e-5
        assert torch.equal(base(ids).logits, before)
    assert {p.data_ptr() for p in base.parameters()} < {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("make", list(model_dense.STAGES.values()), ids=["packed", "static"])
@torch.no_grad()
def test_dense_stages_equal_a_dynamic_cache(base, make):
    """What is timed as the peer attends to the whole planted context, and to nothing else."""
    model_dense.register()
    with make(base, 40, 2) as stage:
        got = stage.run(base)
        again = (stage.rewind(), stage.run(base))[1]
        held = [(layer.keys[:, :, :39], layer.values[:, :, :39]) for layer in stage.cache.layers]
    cache = DynamicCache(config=base.config)
    for index, (key, value) in enumerate(held):
        cache.update(key.clone(), value.clone(), index)
    arguments = {"position_ids": stage.positions, CACHE_ARGUMENT: cache}
    expected = base(input_ids=stage.ids, use_cache=True, **arguments).logits
    assert relative_error(got, expected) < 1e-5
    assert relative_error(again, expected) < 1e-5


@torch.no_grad()
def test_peers_are_timed_or_named_with_the_reason(base, monkeypatch):
    peers = graphed_peers(base, 40, 2)
    assert set(peers.times) == {"packed FA2 split-KV, eager", "StaticCache + SDPA, eager"}
    assert peers.best()[0] == 1.0
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiler(call, backend="eager"))
    add_compiled(peers, base, 40, 2, Budget(1e6))
    compiled = {name: ms for name, ms in peers.times.items() if "torch.compile" in name}
    assert len(compiled) == 2
    assert set(compiled.values()) == {1.0}

    def fails(call, **options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    add_compiled(peers, base, 40, 2, Budget(1e6))
    assert peers.times["StaticCache + SDPA, torch.compile(reduce-overhead)"] == "failed: RuntimeError: no compiler here"
    monkeypatch.setattr(torch, "compile", lambda call, **options: functools.partial(_wrong, call))
    add_compiled(peers, base, 40, 2, Budget(1e6))
    assert peers.times["packed FA2 split-KV, torch.compile(reduce-overhead)"].startswith("wrong: its logits are off")
    add_compiled(peers, base, 40, 2, Budget(0))
    assert "the 0 s for compiling were spent" in peers.times["StaticCache + SDPA, torch.compile(reduce-overhead)"]


def _wrong(call, **arguments):
    out = call(**arguments)
    out.logits = -out.logits
    return out


def test_best_peer_is_the_fastest_that_has_a_time():
    peers = Peers({"a": 3.0, "b": "failed: RuntimeError", "c": 2.0})
    assert peers.best() == (2.0, "c")
    assert peers.entries() == {"peer": "c", "peers": peers.times}
    assert Peers({"b": "does not fit on this card"}).entries()["peer"] == "no dense peer fits"


# --- results -------------------------------------------------------------------------------------------------------


def row(case, length, ms=1.0, batch=1):
    extra = {"shape": "qwen3-8b", "layers": 36, "batch": batch, "check": "ok", "peers": {"a": 2.0}}
    return Row(case, length, 0.15, ms, 2.0, None, extra)


def test_results_are_stored_row_by_row_and_parts_add_up(tmp_path):
    meta = {"device": "card", "versions": {"torch": "2"}, "commit": "c", "preset": "paper", "command": "first"}
    stored = tmp_path / "model.json"
    results = Results(tmp_path / "model", meta)
    results.add(row("ttft", 8192))
    assert len(json.loads(stored.read_text())["rows"]) == 1
    results.add(row("tpot", 8192))
    results.add(row("tpot", 8192, batch=4))
    results.add(row("tpot", 8192, ms=5.0))
    assert [(r["case"], r["batch"], r["ms"]) for r in json.loads(stored.read_text())["rows"]] == [
        ("ttft", 1, 1.0), ("tpot", 4, 1.0), ("tpot", 1, 5.0)
    ]  # fmt: skip
    later = Results(tmp_path / "model", {**meta, "command": "second"})
    later.add(row("tpot", 8192, ms=0.5))
    rows = later.close()
    assert [(r.case, r.ms, r.speedup) for r in rows] == [("ttft", 1.0, 2.0), ("tpot", 1.0, 2.0), ("tpot", 0.5, 4.0)]
    assert json.loads(stored.read_text())["meta"]["commands"] == ["first", "second"]
    with pytest.raises(ValueError, match="measured with another device"):
        Results(tmp_path / "model", {**meta, "device": "another"})
    changed = Results(tmp_path / "model", {**meta, "commit": "d"})
    changed.add(row("ttft", 8192))
    assert {(r.case, r.extra["batch"]): r.extra["commit"] for r in changed.rows} == {
        ("ttft", 1): "d", ("tpot", 4): meta["commit"], ("tpot", 1): meta["commit"]
    }  # fmt: skip
