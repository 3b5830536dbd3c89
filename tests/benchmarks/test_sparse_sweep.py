"""The sweep of sparse prefill: its settings reach the kernels, change only what they say, and end with it."""

import pytest
import torch

from rtpurbo_hf.benchmarks.kernels import run_kernel_benchmarks
from rtpurbo_hf.benchmarks.kernels_sparse_sweep import ATTEND, SCORE, SELECT, attending, scoring, selecting
from rtpurbo_hf.kernels import sparse_prefill, sparse_prefill_hopper, sparse_prefill_triton, tile_blocks
from rtpurbo_hf.kernels.common import HAS_TRITON
from rtpurbo_hf.kernels.sparse_prefill import sparse_prefill_attention

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attend(backend="triton", length=450):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 32, device=DEVICE) for _ in range(3))
    index_query, index_key = (torch.randn(1, 1, length, 16, device=DEVICE) for _ in range(2))
    return sparse_prefill_attention(
        query, key, value, index_query, index_key, heads=(0,), kv_heads=(0,), index_heads=(0,), top_p=0.4, scale=0.2,
        out=query.new_empty(1, length, 1, 32), backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("setting", [SCORE[-1], {"columns": 16, "rows": 32, "keys": 64}], ids=str)
def test_launches_of_the_scores_change_nothing(setting):
    expected = attend()
    with scoring(setting):
        assert tile_blocks.MASS_LAUNCH.items() >= setting.items()
        torch.testing.assert_close(attend(), expected)


def test_launches_of_the_attention_change_nothing():
    expected = attend()
    with attending({"rows": 128, "warps": 1, "stages": 1, "step_keys": 128}):
        torch.testing.assert_close(attend(), expected)


@pytest.mark.parametrize("setting", ATTEND, ids=str)
def test_launches_of_the_attention_end_with_the_sweep(setting):
    def shipped():
        tiles = dict(sparse_prefill_hopper.TILES)
        return tiles, sparse_prefill.hopper_fits, sparse_prefill_triton._launch, sparse_prefill_triton.STEP_KEYS

    before = shipped()
    with attending(setting):
        assert (shipped() != before) == bool(setting)
    assert shipped() == before


@pytest.mark.parametrize("setting", SELECT, ids=str)
def test_settings_of_the_selection_hold_in_kernels_and_reference_alike(setting):
    shipped = {module: dict(vars(module)) for module in (tile_blocks, sparse_prefill)}
    with selecting(setting):
        assert all(any(vars(module).get(name) == value for module in shipped) for name, value in setting.items())
        torch.testing.assert_close(attend(), attend("reference"), rtol=1e-4, atol=1e-5)
    assert all(vars(module)[name] is value for module, held in shipped.items() for name, value in held.items())


def test_other_parts_have_no_sweep(tmp_path):
    with pytest.raises(ValueError, match="sweep of 'sparse' alone"):
        run_kernel_benchmarks("quick", tmp_path, "decode", sweep=True)
