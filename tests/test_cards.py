"""Model cards: metadata that the Hub accepts, only what was measured, and nothing that breaks out of its place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
import yaml
from families import tiny_base
from hub_steps import REPORT
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from rtpurbo_hf import cli_hub
from rtpurbo_hf.auto import RTPurboConfig
from rtpurbo_hf.cards import License, eval_results, read_report, render_card
from rtpurbo_hf.memory_plot import memory_figure

EXAMPLES = Path(__file__).resolve().parent.parent / "hub_cards" / "examples"


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n", 2)[1])


def test_card_from_a_report_alone():
    card = render_card(REPORT)
    data = front(str(card))
    assert data["base_model"] == "alice/base"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["alice/texts"]
    assert "rtpurbo" in data["tags"]
    assert "license" not in data, "no licence is invented"
    values = {m["type"]: m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert values == {"perplexity": 9.75, "exact_match": 0.625, "top1_agreement": 0.875, "kl_divergence": 0.03125}
    text = str(card)
    assert "rtpurbo adapt alice/base --output run" in text
    assert "| Commit | 0123abc |" in text
    assert "4 of 16 query heads" in text
    assert "![" not in text, "no figure is invented"
    # the stock class reads back what was written
    assert ModelCard(text).data.eval_results[0].metric_value == 9.75


def test_card_says_only_what_is_known():
    text = str(render_card({"model": "alice/base"}))
    assert "model-index" not in front(text)
    for heading in ("## Fidelity", "## Figures", "## Settings", "## How it was made"):
        assert heading not in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "9.5", True])
def test_values_that_are_no_numbers_are_left_out(bad):
    report = {**REPORT, "rtpurbo": {**REPORT["rtpurbo"], "perplexity": bad}}
    assert "perplexity" not in [result.metric_type for result in eval_results(report)]
    row = next(line for line in str(render_card(report)).splitlines() if line.startswith("| Perplexity"))
    assert row.endswith("| 9.500 | 12.500 |  |")


def test_every_table_row_has_its_columns():
    """KL(dense || variant) once tore its row apart."""
    lines = str(render_card(REPORT)).splitlines()
    first = lines.index("| | dense | no retrieval heads | RTPurbo |")
    rows = [line for line in lines[first : first + 6] if line.startswith("|")]
    assert len(rows) == 6
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_figures_are_shown_in_order_with_captions():
    text = str(render_card(REPORT, figures=["figures/heads.png", "figures/decode_speed.png"]))
    assert text.index("](figures/heads.png)") < text.index("](figures/decode_speed.png)")
    assert "Retrieval score of every query head" in text


def test_memory_figure_follows_the_config(tmp_path):
    config = RTPurboConfig(base_config=tiny_base().config, retrieval_heads=[[0], [], [1], []])
    png = memory_figure(config)
    assert png.startswith(b"\x89PNG")
    assert png == memory_figure(config), "a dry run's sizes are those of the push"
    config.retrieval_heads = [[0, 1, 2, 3]] * 4
    assert memory_figure(config) != png
    config.retrieval_heads = None
    with pytest.raises(ValueError, match="no retrieval heads"):
        memory_figure(config)


def test_licence_is_inherited():
    assert front(str(render_card({"model": "smollm2-135m"})))["license"] == "apache-2.0"
    assert front(str(render_card({"model": "smollm2-135m"})))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = front(str(render_card(REPORT, license=License("other", "tiny", "https://example.org/tiny"))))
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "tiny",
        "https://example.org/tiny",
    )


def test_hostile_report_stays_in_its_place():
    """Markdown, YAML, HTML and Jinja in a stranger's report are text."""
    environment = {
        "command": "x\n```\n# owned\n{{ 7 * 7 }} <script>",
        "commit": "a | b\n---\nlicense: mit",
        "device": "<img src=x>",
    }
    report = {**REPORT, "model": "x\n---\nlicense: mit\n{{ 7 * 7 }}<b>", "environment": environment}
    text = str(render_card(report))
    assert "license" not in front(text)
    assert "49" not in text
    assert not any(line.startswith("# owned") for line in text.splitlines())
    assert "<img" not in text
    assert text.count("```") == 4


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ([], "a report is a JSON object"),
        ({}, "'model' must name"),
        ({"model": 3}, "'model' must name"),
        ({"model": "x", "settings": []}, "'settings' must be an object"),
        ({"model": "x", "rtpurbo": 3}, "'rtpurbo' must be an object"),
    ],
)
def test_malformed_report_is_refused(tmp_path, report, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=message):
        read_report(path)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "no text", "deep"])
def test_report_that_is_no_json_is_refused(tmp_path, data):
    path = tmp_path / "report.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"report\.json is not JSON"):
        read_report(path)


def test_command_writes_card_and_figures(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "heads.png").write_bytes(b"\x89PNG")
    app = typer.Typer()
    cli_hub.register(app)
    arguments = ["card", str(folder), "-o", str(tmp_path / "out" / "README.md"), "--repo-id", "me/x"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'name = "me/x"' in text
    assert (tmp_path / "out" / "figures" / "heads.png").is_file()
    assert "](figures/heads.png)" in text
    assert isinstance(CliRunner().invoke(app, arguments).exception, ValueError), "an existing card is not replaced"


def test_example_card_is_what_its_report_gives():
    report = read_report(EXAMPLES / "report.json")
    config = RTPurboConfig.from_pretrained(EXAMPLES)
    figures = [f"figures/{path.name}" for path in sorted((EXAMPLES / "figures").iterdir())]
    assert figures == ["figures/heads.png", "figures/losses.png", "figures/memory.png"]
    options = {"license": License("apache-2.0"), "shape": "adapter", "repo_id": "OWNER/SmolLM2-135M-RTPurbo"}
    card = render_card(report, config=config, figures=figures, **options)
    assert str(card).strip() == (EXAMPLES / "README.md").read_text().strip()


def test_code_of_cards_and_readme_asks_no_question():
    """Regression: a tokenizer of a repository with code prompts where `trust_remote_code` is not given."""
    root = Path(__file__).parents[1]
    for page in (root / "README.md", root / "hub_cards" / "model_card.md.jinja"):
        calls = [line for line in page.read_text(encoding="utf-8").splitlines() if ".from_pretrained(" in line]
        assert calls
        assert all("trust_remote_code=True" in line for line in calls), page
