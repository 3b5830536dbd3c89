"""Head patterns of other projects: what goes out comes back, what is malformed is refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
from families import tiny_base
from typer.testing import CliRunner

from rtpurbo_hf import cli_hub
from rtpurbo_hf.auto import RTPurboConfig, RTPurboForCausalLM
from rtpurbo_hf.interop import (
    HeadPattern,
    export_headwise,
    import_duo,
    import_headwise,
    import_plain,
    load_heads,
)

SIZE = {"num_layers": 4, "num_heads": 4}
HEADS = [[0], [], [1, 3], [2]]
ROWS = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


@pytest.fixture
def config():
    return RTPurboConfig(
        base_config=tiny_base().config, retrieval_heads=HEADS, sliding_window=8192, num_sink_tokens=4, index_dim=8
    )


def app() -> typer.Typer:
    made = typer.Typer()
    cli_hub.register(made)
    return made


def test_headwise_round_trip_and_the_window_one_larger(config):
    """RTP-LLM keeps keys up to a distance of swa_token_num: 8,191 is our window of 8,192."""
    config.dense_below = 16384
    exported = export_headwise(config)
    assert exported == {
        "sink_token_num": 4,
        "swa_token_num": 8191,
        "seqlen_threshold": 16384,
        **{str(layer): row for layer, row in enumerate(ROWS)},
    }
    pattern = import_headwise(json.loads(json.dumps({"headwise_config": exported})), **SIZE)
    assert pattern == HeadPattern(tuple(map(tuple, HEADS)), 8192, 4, 16384)
    again = RTPurboConfig(base_config=tiny_base().config, **pattern.options())
    assert (again.retrieval_heads, again.sliding_window) == (HEADS, 8192)


def rtp_llm_mask(distance: int, key: int, record: dict) -> bool:
    return distance <= record["swa_token_num"] or key < record["sink_token_num"]


def test_exported_window_sees_what_ours_sees():
    """A model's local heads, against the rule that RTP-LLM's own test oracle states."""
    model = RTPurboForCausalLM.from_base(tiny_base(), retrieval_heads=[[]] * 4, sliding_window=8, num_sink_tokens=2)
    record = export_headwise(model.config)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[0, -1]
        for key in (1, 2, 31, 32, 39):
            # one layer is enough: what the last row cannot see there cannot reach its layer-0 output
            seen = rtp_llm_mask(39 - key, key, record)
            probe = torch.autograd.functional.jacobian(
                lambda e: _first_layer(model, e)[-1], model.get_input_embeddings()(ids)[0].detach()
            )
            assert bool(probe[:, key].abs().sum() > 0) == seen, key
    assert torch.isfinite(full).all()


def _first_layer(model, embeddings):
    taken = []
    layer = model.model.model.layers[0]
    hook = layer.register_forward_hook(lambda module, args, output: taken.append(output))
    model(inputs_embeds=embeddings[None], use_cache=False)
    hook.remove()
    output = taken[0][0] if isinstance(taken[0], tuple) else taken[0]
    return output.reshape(embeddings.shape)


def test_headwise_layer_that_is_missing_retrieves():
    pattern = import_headwise({"swa_token_num": 7, "0": ROWS[0]}, **SIZE)
    assert pattern.retrieval_heads == ((0,), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
    assert (pattern.sliding_window, pattern.num_sink_tokens, pattern.dense_below) == (8, 4, 16384)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "headwise_config must be a JSON object"),
        ({"headwise_config": 3}, "headwise_config must be a JSON object"),
        ({}, "a list for each layer"),
        ({"0": [0, 0, 0, 2]}, r"headwise_config\[0\] must be a list of 0 and 1"),
        ({"0": [0, 0, 0, True]}, "a list of 0 and 1"),
        ({"0": [0, 0, 0]}, "a list of 4 numbers"),
        ({"0": "0000"}, "a list of 4 numbers"),
        ({"4": ROWS[0]}, r"a decimal number in \[0, 4\), got '4'"),
        ({"00": ROWS[0]}, "got '00'"),
        ({"../0": ROWS[0]}, r"got '\.\./0'"),
        ({"0": ROWS[0], "swa_token_num": -1}, "swa_token_num must be an integer in"),
        ({"0": ROWS[0], "swa_token_num": 1e3}, "swa_token_num must be an integer in"),
        ({"0": ROWS[0], "sink_token_num": 10**9}, "sink_token_num must be an integer in"),
        ({"0": ROWS[0], "seqlen_threshold": "1"}, "seqlen_threshold must be an integer in"),
    ],
)
def test_malformed_headwise_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        import_headwise(record, **SIZE)


def test_export_needs_heads_and_a_window(config):
    config.retrieval_heads = None
    with pytest.raises(ValueError, match="no retrieval heads are chosen"):
        export_headwise(config)
    small = RTPurboConfig(base_config=tiny_base().config, retrieval_heads=HEADS, sliding_window=1)
    with pytest.raises(ValueError, match="smallest window"):
        export_headwise(small)


def test_native_sliding_layers_are_not_exported():
    config = RTPurboConfig(base_config=tiny_base("gemma3_text").config, retrieval_heads=[[], [0], [], []])
    assert {key for key in export_headwise(config) if key.isdigit()} == {"1", "3"}


TSV = "9.5e-01\t0.0\n0.25\t0.5\n1.0\t1.0\n-0.5\t2.0\n"


def test_duo_gates_take_whole_groups():
    assert import_duo(TSV, **SIZE).retrieval_heads == ((0, 1), (2, 3), (0, 1, 2, 3), (2, 3))
    assert import_duo(TSV, **SIZE, threshold=0.9).retrieval_heads == ((0, 1), (), (0, 1, 2, 3), (2, 3))
    assert import_duo(TSV, **SIZE, threshold=0.0).retrieval_heads == ((0, 1, 2, 3),) * 4


def test_duo_sparsity_counts_kv_heads_and_breaks_ties_the_same_way():
    three_of_eight = import_duo(TSV, **SIZE, sparsity=0.625)
    assert three_of_eight.retrieval_heads == ((), (), (0, 1, 2, 3), (2, 3))
    tied = "\n".join(["0.5\t0.5"] * 4)
    found = [import_duo(tied, **SIZE, sparsity=0.5).retrieval_heads for _ in range(5)]
    assert found == [((0, 1, 2, 3), (0, 1, 2, 3), (), ())] * 5
    assert import_duo(TSV, **SIZE, sparsity=1.0).retrieval_heads == ((),) * 4


def test_duo_settings_beside_the_pattern(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text(TSV)
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256, "lr": 0.02}')
    pattern = load_heads(tmp_path, **SIZE)
    assert (pattern.sliding_window, pattern.num_sink_tokens, pattern.dense_below) == (256, 64, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "4 lines"),
        ("0.5\n" * 3, "4 lines"),
        ("0.5\t0.5\n0.5\n0.5\t0.5\n0.5\t0.5", "equally many values"),
        ("0.5\t0.5\t0.5\n" * 4, "a divisor of 4"),
        ("\t".join(["0.5"] * 5) + "\n" + "0.5\n" * 3, "at most 4 values"),
        ("nan\n" * 4, "line 1 must be finite numbers"),
        ("0.5\n0.5\ninf\n0.5", "line 3 must be finite numbers"),
        ("0,5\n" * 4, "line 1 must be finite numbers"),
    ],
)
def test_malformed_duo_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        import_duo(text, **SIZE)


@pytest.mark.parametrize("choice", [{"threshold": 2.0}, {"sparsity": math.nan}, {"threshold": 0.5, "sparsity": 0.5}])
def test_duo_choices_are_checked(choice):
    with pytest.raises(ValueError, match=r"in \[0, 1\]|not both"):
        import_duo(TSV, **SIZE, **choice)


@pytest.mark.parametrize(
    "record",
    [HEADS, {"retrieval_heads": HEADS}, {"retrieval_heads": {"0": [0], "2": [3, 1], "3": [2]}, "scores": [[0.5]]}],
    ids=["list", "object", "by layer"],
)
def test_plain_heads(record):
    assert import_plain(record, **SIZE).retrieval_heads == tuple(map(tuple, HEADS))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "a list per layer"),
        ([[0]], "4 lists"),
        ([[0], [0], [0], 3], r"retrieval_heads\[3\] must be a list"),
        ([[4], [], [], []], r"heads in \[0, 4\)"),
        ([[-1], [], [], []], r"heads in \[0, 4\)"),
        ([[1, 1], [], [], []], "without duplicates"),
        ([[True], [], [], []], "heads in"),
        ({"retrieval_heads": HEADS, "sliding_window": 0}, "sliding_window must be"),
        ({"9": [0]}, "a decimal number"),
    ],
)
def test_malformed_plain_heads_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        import_plain(record, **SIZE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ('{"0": [0,0,0,0], "0": [1,1,1,1], "swa_token_num": 8}', "occurs twice"),
        ("[" * 100_000, "not readable JSON"),
        ("[NaN]", "NaN is not JSON"),
    ],
)
def test_files_that_are_no_json_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"heads\.json.*{message}"):
        load_heads(path, **SIZE)
    with pytest.raises(ValueError, match="absent"):
        load_heads(tmp_path / "absent.json", **SIZE)


def test_format_is_found_by_content(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"sink_token_num": 2, "0": ROWS[0]}))
    assert load_heads(path, **SIZE).num_sink_tokens == 2
    path.write_text(json.dumps(HEADS))
    assert load_heads(path, **SIZE).retrieval_heads == tuple(map(tuple, HEADS))
    with pytest.raises(ValueError, match="must be a JSON object"):
        load_heads(path, **SIZE, format="headwise")


def test_commands_export_and_import(tmp_path, config):
    config.save_pretrained(tmp_path / "model")
    tiny_base().config.save_pretrained(tmp_path / "base")
    run = CliRunner().invoke
    out = tmp_path / "headwise.json"
    done = run(app(), ["export-headwise", str(tmp_path / "model"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["headwise_config"]["swa_token_num"] == 8191
    heads = tmp_path / "heads.json"
    done = run(app(), ["import-heads", str(out), "--base", str(tmp_path / "base"), "-o", str(heads)])
    assert done.exit_code == 0, done.output
    assert "4 retrieval heads in 4 layers" in done.output
    assert json.loads(heads.read_text())["retrieval_heads"] == HEADS
    again = run(app(), ["import-heads", str(heads), "--base", str(tmp_path / "model"), "-o", str(heads)])
    assert isinstance(again.exception, ValueError)
    assert "exists" in str(again.exception)
