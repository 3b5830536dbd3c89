"""The benchmark harness: rows, checks and files (no GPU needed)."""

import csv
import json
import math

import pytest
import torch

from rtpurbo_hf.benchmarks import harness
from rtpurbo_hf.benchmarks.harness import Row, checked, relative_error, table, write
from rtpurbo_hf.benchmarks.kernels import run_kernel_benchmarks
from rtpurbo_hf.benchmarks.kernels_prefill import OTHERS, PAPER, Geometry, plan

META = {"device": "test", "commit": "0" * 40}


def rows() -> list[Row]:
    return [
        Row("good", 8192, 0.15, 2.0, 5.0, 0.5, {"geometry": "32/4/128"} | checked(1e-3, 5e-3)),
        Row("wrong", 8192, 0.15, 2.0, 5.0, 0.5, checked(0.2, 5e-3)),
        Row("nan", 8192, 0.15, 2.0, 5.0, 0.5, checked(math.nan, 5e-3)),
        Row("unchecked", 8192, None, 2.0, 5.0),
    ]


def test_only_a_checked_row_has_a_speedup():
    assert [row.speedup for row in rows()] == [2.5, None, None, None]
    assert [row.record()["peer_ms"] for row in rows()] == [5.0, None, None, None]


def test_files_hold_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    files = write(rows(), tmp_path / "new" / "kernels", meta=META)
    assert [file.name for file in files] == ["kernels.json", "kernels.csv", "kernels.png"]
    stored = json.loads(files[0].read_text())
    assert stored["meta"] == META
    assert {"case", "length", "ratio", "ms", "peer_ms", "roofline"} <= stored["rows"][0].keys()
    assert [row["speedup"] for row in stored["rows"]] == [2.5, None, None, None]
    with files[1].open() as stream:
        assert [line["case"] for line in csv.DictReader(stream)] == ["good", "wrong", "nan", "unchecked"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_figure_has_no_empty_panel(tmp_path):
    pytest.importorskip("matplotlib")
    both = write(rows(), tmp_path / "both", meta=META)[2]
    one = write([Row("tpot", 8192, 0.15, 2.0, 5.0, None, checked(1e-3, 5e-3))], tmp_path / "one", meta=META)[2]
    widths = [int.from_bytes(file.read_bytes()[16:20], "big") for file in (both, one)]
    assert widths[0] == 2 * widths[1]


def test_table_shows_no_speedup_of_a_red_row():
    lines = table(rows()).splitlines()
    assert "2.5" in lines[1]
    assert all("2.5" not in line for line in lines[2:])
    assert "red" in lines[2]


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected * 1.1, expected) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(torch.tensor([3.0, math.nan]), expected) == math.inf


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv("RTPURBO_COMMIT", "abc")
    assert harness.environment()["commit"] == "abc"


def test_command_names_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/bench", "--output", "/some/where/results"])
    command = harness.environment()["command"]
    assert command.endswith("--output results")
    assert "/some" not in command


@pytest.mark.parametrize("geometry", [PAPER, *OTHERS], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3])
def test_retrieval_heads_are_uneven_and_of_the_right_number(geometry, ratio):
    heads = geometry.retrieval(ratio)
    assert len(set(heads)) == len(heads) == max(1, round(ratio * geometry.query_heads))
    assert all(0 <= head < geometry.query_heads for head in heads)
    counts = [sum(head // geometry.group == kv for head in heads) for kv in range(geometry.kv_heads)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_every_head_can_be_a_retrieval_head():
    assert Geometry(8, 4, 64).retrieval(1.0) == tuple(range(8))


def test_paper_preset_is_the_paper_geometry():
    assert [length for _, length, _ in plan("paper")] == [32_768, 131_072, 262_144, 524_288, 1_048_576]
    assert {str(geometry) for geometry, _, _ in plan("paper")} == {"32/4/128"}
    assert len(plan("full")) > len(plan("paper"))


@pytest.mark.parametrize(("preset", "only"), [("large", None), ("quick", "training")])
def test_unknown_names_are_refused(preset, only, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        run_kernel_benchmarks(preset, tmp_path, only)


def test_parts_of_the_kernel_benchmarks_add_up(tmp_path, monkeypatch):
    from rtpurbo_hf.benchmarks import kernels, kernels_decode, kernels_prefill, kernels_sparse_prefill

    for module, case in ((kernels_prefill, "prefill"), (kernels_sparse_prefill, "sparse"), (kernels_decode, "decode")):
        monkeypatch.setattr(module, "run", lambda preset, case=case: [Row(case, 8192, 0.15, 1.0, 2.0, 0.5)])
    for name in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(kernels, name, lambda: 1.0)
    monkeypatch.setattr(kernels, "environment", lambda: META | {"versions": {}, "command": "a"})
    run_kernel_benchmarks("quick", tmp_path)
    rows = run_kernel_benchmarks("quick", tmp_path, "decode")
    assert [row.case for row in rows] == ["prefill", "sparse", "decode"]
    assert json.loads((tmp_path / "kernels.json").read_text())["meta"]["commands"] == ["a", "a"]


def test_measure_refuses_nothing_to_measure():
    with pytest.raises(ValueError, match="at least one call"):
        harness.measure([])
