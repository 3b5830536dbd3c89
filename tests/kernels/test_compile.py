"""Every Triton and Gluon kernel compiles for real GPUs and fits them; no GPU is needed (see `compile_kernels.py`)."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fake_gpu import SHARED_LIMIT

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
# by capability and kernel: the bytes that a thread is known to spill, with ptxas 13.4 (of Triton 3.9); every other
# kernel spills nothing. The Hopper kernel spills nothing with ptxas 12.8 and 12.9 either.
KNOWN_WITH = "3.9."
KNOWN_SPILLS = {
    (80, "sink_window_triton._sink_window_kernel"): 260,
    (80, "sparse_prefill_triton._sparse_prefill_kernel"): 104,
    (90, "sink_window_hopper._sink_window_hopper_kernel"): 1048,
    (90, "indexer_kl_triton._rows_kernel"): 424,
    (90, "indexer_kl_triton._keys_kernel"): 248,
    (90, "window_gradient_triton._keys_kernel"): 668,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The rows of `compile_kernels.py`, in a process of its own: this one may have Triton's interpreter."""
    output = tmp_path_factory.mktemp("compile") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_kernels.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def test_no_kernel_is_left_out(compiled):
    defined = {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"@(?:triton|gluon)\.jit.*?def (\w+_kernel)\(", path.read_text(), re.DOTALL)
    }
    assert {row["kernel"] for row in compiled} == defined


def test_shared_memory_fits(compiled):
    assert {row["capability"] for row in compiled} == set(SHARED_LIMIT)
    beyond = [row for row in compiled if row["shared"] + row["declared"] > SHARED_LIMIT[row["capability"]]]
    assert not beyond


def test_assembly_gets_what_it_relies_on(compiled):
    """Its shared memory and the warps' rows.

    Triton asks for more than 48 KiB by its own part alone: with less of its own, both together must stay within. Its
    own part begins where the declared one ends, and its tiles at multiples of 1 KiB: 48 bytes beside that, scoring
    took a fifth longer.
    """
    declaring = [row for row in compiled if row["declared"]]
    assert {row["kernel"] for row in declaring} == {"score_select._score_select_kernel"}
    refused = [row for row in declaring if row["shared"] <= 48 * 1024 < row["shared"] + row["declared"]]
    assert not refused
    assert not [row for row in declaring if row["shared"] and row["declared"] % 1024]
    # counting takes a warp's values for those of one group of 128 keys, 16 rows of 8; listing has no rows
    counting = [row for row in declaring if row["shared"]]
    assert counting
    assert all(row["assembly_warps"] == [row["warps"], 1] for row in counting)
    listing = [row for row in declaring if not row["shared"]]
    assert listing
    assert all((row["assembly_warps"], row["assembly_sizes"]) == ([row["warps"]], [1]) for row in listing)


def test_registers_suffice(compiled):
    """No more is spilled than was known: a launch that asks for too much shows here, not in a benchmark."""
    installed = version("triton")
    if not installed.startswith(KNOWN_WITH):
        pytest.skip(f"known spills are those of Triton {KNOWN_WITH}x: compare, then enter those of {installed}")
    more = [row for row in compiled if row["spills"] > KNOWN_SPILLS.get((row["capability"], row["kernel"]), 0)]
    assert not more
