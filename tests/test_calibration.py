"""Calibration: scores against full attention, the sink trap, ranking, records and their refusals."""

import dataclasses
import json
import math

import numpy
import pytest
import torch
from families import tiny_base

from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.calibration import MIN_PREFIX, Calibration, calibrate, draw_needle, place_needle, plot_heads
from rtpurbo_hf.training.head_ranking import default_ratio, default_retrieval_heads, rank_correlation, rank_heads

NEEDLE = [70, 11, 45, 32, 88]


def documents(count=2, length=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for _ in range(count)]


def brute_force(base, document, start):
    """Scores from the base's own eager attention matrices."""
    placed, (first, last, post, end) = place_needle(document, NEEDLE, start)
    with torch.no_grad():
        attentions = base(placed[None], output_attentions=True).attentions
    return [None if a is None else a[0, :, post:end, first:last].sum(-1).mean(-1) for a in attentions]


@pytest.mark.parametrize("chunk", [None, 37])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3", "cohere2", "smollm3", "phi"])
def test_scores_equal_full_attention(family, chunk):
    """GQA, soft-cap, learned sinks, NoPE layers, partial rotary: against the base's own attention matrices."""
    base = tiny_base(family, seed=3)
    expected = [brute_force(base, document, MIN_PREFIX) for document in documents()]
    model = RTPurboForCausalLM.from_base(base)
    found = calibrate(model, documents(), needle=NEEDLE, ratio=0.5, chunk=chunk)
    converted = {module.layer_idx for module in model.converted()}
    for layer, row in enumerate(found.scores):
        if layer not in converted:
            assert row == ()
            continue
        mean = torch.stack([scores[layer] for scores in expected]).mean(0)
        assert (torch.tensor(row) - mean).abs().max() < 1e-5


def induction_base():
    """A llama of one layer whose head 1 attends to tokens equal to its own; the other heads see uniformly."""
    base = tiny_base("llama", head_dim=32, num_hidden_layers=1, num_key_value_heads=4, hidden_size=128)
    with torch.no_grad():
        attention = base.model.layers[0].self_attn
        base.model.layers[0].input_layernorm.weight.fill_(1.0)
        # a token's vector is its number in binary, -1 and 1: equal tokens have the largest product
        bits = torch.arange(97)[:, None] // 2 ** torch.arange(8) % 2 * 2.0 - 1
        base.model.embed_tokens.weight.zero_()
        base.model.embed_tokens.weight[:, :8] = bits
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        # the slowest rotary pairs, so that rotation does not undo the match
        for bit, dim in enumerate((*range(12, 16), *range(28, 32))):
            attention.q_proj.weight[32 + dim, bit] = 2.0
            attention.k_proj.weight[32 + dim, bit] = 1.0
    return base


def test_planted_retrieval_head_wins():
    model = RTPurboForCausalLM.from_base(induction_base())
    text = [torch.where(torch.isin(d, torch.tensor(NEEDLE)), 3, d) for d in documents()]
    found = calibrate(model, text, needle=NEEDLE, ratio=0.25)
    assert found.retrieval_heads == ((1,),)
    uniform = [found.scores[0][h] for h in (0, 2, 3)]
    assert all(score == pytest.approx(len(NEEDLE) / 198, rel=0.05) for score in uniform)
    # the other half goes to the token itself
    assert 0.4 < found.scores[0][1] < 0.51


def test_sink_head_is_not_taken_for_a_retrieval_head():
    """A head that looks at the first tokens only scores nothing, which a needle at the start would have hidden."""
    base = tiny_base("llama", num_hidden_layers=1, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        attention = base.model.layers[0].self_attn
        base.model.layers[0].input_layernorm.weight.fill_(1.0)
        mark, everyone = torch.eye(32)[0], torch.eye(32)[1]
        words = torch.randn(97, 32, generator=generator)
        words[:, :2] = 0
        base.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(words, dim=-1) + everyone)
        base.model.embed_tokens.weight[1] = everyone + 2 * mark
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.q_proj.weight[2 * 8 + 3] = 20 * everyone
        attention.k_proj.weight[2 * 8 + 3] = 20 * mark
    model = RTPurboForCausalLM.from_base(base)
    document = documents(1)[0]
    document[:4] = 1
    found = calibrate(model, [document], needle=NEEDLE, needle_start=80, ratio=0.25)
    assert found.scores[0][2] < 1e-4 < min(found.scores[0][h] for h in (0, 1, 3))
    with pytest.raises(ValueError, match="at least 64 ordinary tokens"):
        calibrate(model, [document], needle=NEEDLE, needle_start=1)
    # 64 tokens, but four of them are begin-of-text marks
    with pytest.raises(ValueError, match="60 stand before slot 64"):
        calibrate(model, [document], needle=NEEDLE, needle_start=MIN_PREFIX)
    assert calibrate(model, [document], needle=NEEDLE).needle.start == 68


def test_place_needle_keeps_the_length_and_the_text():
    document = torch.arange(200)
    placed, where = place_needle(document, NEEDLE, 70)
    assert where == (70, 75, 195, 200)
    assert placed.shape == document.shape
    assert placed[70:75].tolist() == NEEDLE == placed[195:].tolist()
    assert torch.equal(torch.cat([placed[:70], placed[75:195]]), document[:190])
    with pytest.raises(ValueError, match="too short"):
        place_needle(torch.arange(130), NEEDLE, 70)


def test_drawn_needle_is_different_tokens_of_the_documents():
    needle = draw_needle(documents(), length=16, seed=5)
    assert needle == draw_needle(documents(), length=16, seed=5) != draw_needle(documents(), length=16, seed=6)
    assert len(set(needle)) == 16
    with pytest.raises(ValueError, match="different tokens"):
        draw_needle([torch.zeros(300, dtype=torch.long)])


def test_ranking_is_stable_and_over_the_whole_model():
    scores = ((0.5, 0.5, 0.1, 0.5), (), (0.5, 0.9, 0.0, 0.0))
    assert rank_heads(scores, 0.25) == ((0,), (), (1,))
    assert rank_heads(scores, 0.5) == ((0, 1, 3), (), (1,))
    assert rank_heads(scores, 1.0) == ((0, 1, 2, 3), (), (0, 1, 2, 3))
    assert rank_heads(scores, 0.01) == ((), (), (1,))


def test_heads_that_score_too_little_are_not_taken():
    scores = ((0.9, 0.02, 0.01, 0.0), (), (0.3, 0.0, 0.0, 0.0))
    assert rank_heads(scores, 0.625) == ((0, 1, 2, 3), (), (0,))
    assert rank_heads(scores, 0.625, above=0.05) == ((0,), (), (0,))
    assert rank_heads(scores, 0.125, above=0.05) == ((0,), (), ())
    # one head is always there
    assert rank_heads(scores, 0.625, above=0.95) == ((0,), (), ())
    # a group goes by its best head
    assert rank_heads(scores, 1.0, granularity="kv_head", num_kv_heads=2, above=0.05) == ((0, 1), (), (0, 1))


def test_kv_head_granularity_takes_whole_groups():
    scores = ((0.5, 0.5, 0.1, 0.5), (0.0, 0.9, 0.0, 0.0))
    assert rank_heads(scores, 0.5, granularity="kv_head", num_kv_heads=2) == ((0, 1), (0, 1))
    assert rank_heads(scores, 0.4, granularity="kv_head", num_kv_heads=2) == ((0, 1), ())
    with pytest.raises(ValueError, match="num_kv_heads"):
        rank_heads(scores, 0.5, granularity="kv_head", num_kv_heads=3)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, math.nan, True])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="ratio"):
        rank_heads(((0.1,),), ratio)


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # ranks 1 2 3 4 against 1.5 1.5 3 4
    assert rank_correlation(a, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(0.9486832981)


@pytest.mark.parametrize(("family", "expected"), [("llama", 0.15), ("gemma3_text", 0.15), ("cohere2", 1.0)])
def test_few_full_attention_layers_are_all_indexed(family, expected):
    """A base that is itself local in three of four layers keeps all heads of the fourth."""
    options = {}
    if family == "cohere2":
        options["layer_types"] = ["sliding_attention"] * 3 + ["full_attention"]
    model = RTPurboForCausalLM.from_base(tiny_base(family, **options))
    assert default_ratio(model) == expected
    found = calibrate(model, documents(), needle=NEEDLE)
    assert found.ratio == expected
    assert found.retrieval_heads == default_retrieval_heads(model, found.scores)
    if expected == 1.0:
        assert found.retrieval_heads == ((), (), (), (0, 1, 2, 3))


@pytest.fixture(scope="module")
def calibration():
    model = RTPurboForCausalLM.from_base(tiny_base("llama"), base_model_name_or_path="some/base")
    return calibrate(model, documents(3), ratio=0.3, seed=4)


def test_record_round_trip_and_selection(calibration, tmp_path):
    calibration.save(tmp_path / "a" / "calibration.json")
    again = Calibration.load(tmp_path / "a" / "calibration.json")
    assert again == calibration
    assert again.model_name == "some/base"
    assert sum(map(len, again.retrieval_heads)) == 4
    more = again.select(0.75)
    assert sum(map(len, more.retrieval_heads)) == 12
    assert all(set(few) <= set(many) for few, many in zip(again.retrieval_heads, more.retrieval_heads, strict=True))
    grouped = again.select(0.5, granularity="kv_head")
    assert all(set(row) in (set(), {0, 1}, {2, 3}, {0, 1, 2, 3}) for row in grouped.retrieval_heads)
    assert -1 <= again.agreement.rank_correlation_min <= again.agreement.rank_correlation <= 1


def test_rules_are_kept_and_changed_later(tmp_path):
    """Uniform heads score what even attention gives, and the planted one more."""
    text = [torch.where(torch.isin(d, torch.tensor(NEEDLE)), 3, d) for d in documents()]
    model = RTPurboForCausalLM.from_base(induction_base())
    found = calibrate(model, text, needle=NEEDLE, ratio=0.75, rule="even")
    found.save(tmp_path / "calibration.json")
    again = Calibration.load(tmp_path / "calibration.json")
    assert again == found
    assert again.even == pytest.approx(len(NEEDLE) / 200)
    by_score = again.select(rule="score")
    assert by_score == calibrate(model, text, needle=NEEDLE, ratio=0.75)
    assert sum(map(len, by_score.retrieval_heads)) == 3
    assert by_score.select(rule="even") == found
    assert found.retrieval_heads == rank_heads(found.scores, 0.75, above=found.even)
    assert found.select(1.0).retrieval_heads == ((0, 1, 2, 3),), "a ratio of 1 takes all heads"
    with pytest.raises(ValueError, match="rule must be one of"):
        calibrate(model, text, needle=NEEDLE, rule="luck")
    with pytest.raises(ValueError, match="rule must be one of"):
        found.select(rule="luck")
    check_refused(found, tmp_path, {"rule": "luck"}, "rule must be one of")


def test_needle_and_scores_depend_on_the_seed_only(calibration):
    model = RTPurboForCausalLM.from_base(tiny_base("llama"))
    assert calibrate(model, documents(3), ratio=0.3, seed=4).scores == calibration.scores
    assert calibrate(model, documents(3), ratio=0.3, seed=5).needle != calibration.needle


BROKEN = {
    "scores": ([], "scores"),
    "scores[0]": ([[float("nan")] * 4] + [[0.1] * 4] * 3, "scores\\[0\\]"),
    "score above one": ([[0.1] * 4] * 3 + [[1.5] * 4], "scores\\[3\\]"),
    "score as text": ([["0.1"] * 4] * 4, "scores\\[0\\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_scores_are_refused(calibration, tmp_path, case):
    value, message = BROKEN[case]
    check_refused(calibration, tmp_path, {"scores": value}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieval_heads": [[1, 1], [], [], []]}, "retrieval_heads\\[0\\] must be without duplicates"),
        ({"retrieval_heads": [[2, 1], [], [], []]}, "retrieval_heads\\[0\\] must be ascending"),
        ({"retrieval_heads": [[4], [], [], []]}, "retrieval_heads\\[0\\] must be heads in \\[0, 4\\)"),
        ({"retrieval_heads": [[], [True], [], []]}, "retrieval_heads\\[1\\] must be integers"),
        ({"retrieval_heads": [[]]}, "retrieval_heads"),
        ({"ratio": 0}, "ratio"),
        ({"granularity": "layer"}, "granularity"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"seed": "zero"}, "seed"),
        ({"needle": {"token_ids": [1], "start": 3, "description": ""}}, "needle.start"),
        ({"needle": {"token_ids": [], "start": 64, "description": ""}}, "needle.token_ids"),
        ({"needle": {"token_ids": [1], "start": 64}}, "'needle.description' is missing"),
        ({"document_hashes": ["abc"] * 3}, "document_hashes"),
        ({"positions": [[1, 2, 3, 4]]}, "positions"),
        ({"agreement": {"overlap": 1}}, "'agreement.overlap_min' is missing|agreement"),
        ({"model_name": 3}, "model_name"),
        ({"format_version": 3}, "format_version 3 is newer"),
        ({"format_version": None}, "format_version"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_broken_records_are_refused(calibration, tmp_path, change, message):
    check_refused(calibration, tmp_path, change, message)


def check_refused(calibration, tmp_path, change, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**dataclasses.asdict(calibration), **change}))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"scores"'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json"):
        Calibration.load(path)


def test_documents_are_checked():
    model = RTPurboForCausalLM.from_base(tiny_base("llama"))
    with pytest.raises(ValueError, match="at least one document"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="too short"):
        calibrate(model, [torch.arange(3, 100)], needle=NEEDLE)
    with pytest.raises(ValueError, match="document 0"):
        calibrate(model, [torch.rand(200)], needle=NEEDLE)
    with pytest.raises(ValueError, match="granularity"):
        calibrate(model, documents(), needle=NEEDLE, granularity="layer")
    with torch.no_grad():
        model.model.model.layers[2].self_attn.k_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="layer 2 are not finite"):
        calibrate(model, documents(), needle=NEEDLE)


@pytest.mark.parametrize(("layers", "heads", "converted"), [(48, 32, 48), (18, 4, 3)], ids=["48x32", "3-of-18"])
def test_heat_map(calibration, tmp_path, layers, heads, converted):
    pytest.importorskip("matplotlib")
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    scores = tuple(
        tuple((torch.rand(heads, generator=generator) ** 8).tolist()) if layer >= layers - converted else ()
        for layer in range(layers)
    )
    big = dataclasses.replace(
        calibration, scores=scores, retrieval_heads=rank_heads(scores, 0.15), num_kv_heads=heads // 4
    )
    plot_heads(big, tmp_path / "heads.png")
    with Image.open(tmp_path / "heads.png") as image:
        assert min(image.size) > 300
        red, green, blue = torch.tensor(numpy.asarray(image.convert("RGB"))).unbind(-1)
    # frames of the chosen heads
    assert int(((red > 240) & (green < 20) & (blue < 20)).sum()) > 20
