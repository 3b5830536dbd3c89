"""Dense prefill of a head subset on a GPU: every path that is installed, against the fp32 rule on sampled rows."""

import math

import pytest
import torch

from rtpurbo_hf.kernels import dense
from rtpurbo_hf.kernels.dense import dense_attention, flash_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, GROUP = (1, 2, 5, 12, 20), 8


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)


def layer(length: int, head_dim: int = 128, *, batch: int = 1, kv_len: int | None = None, heads: int = 32) -> dict:
    kv_len = kv_len or length
    return {
        "query": random(batch, length, heads, head_dim).transpose(1, 2),
        "key": random(batch, kv_len, heads // GROUP, head_dim, seed=1).transpose(1, 2),
        "value": random(batch, heads // GROUP, kv_len, head_dim, seed=2),
        "heads": HEADS,
        "kv_heads": tuple(head // GROUP for head in HEADS),
        "scale": head_dim**-0.5,
        "out": torch.full((batch, length, heads, head_dim), math.nan, dtype=torch.bfloat16, device="cuda"),
        "q_start": kv_len - length,
    }


def worst_error(arguments: dict, first: int = 0, row: int = 0) -> float:
    """Over every listed head, at sampled rows."""
    query, key, out = arguments["query"], arguments["key"], arguments["out"]
    length = query.shape[2]
    samples = {r for r in (0, 1, 63, 64, 127, 128, 500, length // 2, length - 65, length - 1) if 0 <= r < length}
    rows = torch.tensor(sorted(r for r in samples if r + arguments["q_start"] >= first), device="cuda")
    n = torch.arange(key.shape[2], device="cuda")
    mask = (n <= rows[:, None] + arguments["q_start"]) & (n >= first)
    worst = 0.0
    for head, kv_head in zip(arguments["heads"], arguments["kv_heads"], strict=True):
        scores = query[row, head, rows].float() @ key[row, kv_head].float().T * arguments["scale"]
        expected = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ arguments["value"][row, kv_head].float()
        found = out[row, rows, head].float()
        assert torch.isfinite(found).all()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


@pytest.mark.parametrize("path", ["flash", "cudnn", "sdpa", "triton"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_paths_at_32k(path, head_dim, monkeypatch):
    if path == "flash" and flash_function() is None:
        pytest.skip("no FlashAttention 3 or 4 here")
    monkeypatch.setattr(dense, "choose_path", lambda *args, **kwargs: path)
    arguments = layer(32_768 if head_dim == 128 else 8192 + 77, head_dim)
    dense_attention(**arguments)
    assert worst_error(arguments) < 5e-3
    others = [head for head in range(32) if head not in HEADS]
    assert torch.isnan(arguments["out"][:, :, others]).all()


@pytest.mark.parametrize("case", [{"length": 1}, {"length": 111}, {"length": 1000, "kv_len": 9000}], ids=str)
def test_chosen_path(case):
    arguments = layer(**case)
    dense_attention(**arguments)
    assert worst_error(arguments) < 5e-3


def test_padded_batch():
    arguments = layer(5000, batch=3)
    first = (0, 1234, 4999)
    dense_attention(**arguments, start=torch.tensor(first, device="cuda"))
    for row, slot in enumerate(first):
        assert worst_error(arguments, first=slot, row=row) < 5e-3
        assert (arguments["out"][row, :slot][:, list(HEADS)] == 0).all()


def test_head_tensors_do_not_synchronise():
    arguments = layer(3000)
    tensors = {name: torch.tensor(arguments[name], device="cuda") for name in ("heads", "kv_heads")}
    dense_attention(**(arguments | tensors))
    torch.cuda.set_sync_debug_mode("error")
    try:
        dense_attention(**(arguments | tensors))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert worst_error(arguments) < 5e-3


def test_gradients_equal_the_reference():
    arguments = layer(700) | {"q_start": 0}
    grads = []
    for backend in ("auto", "reference"):
        leaves = {name: arguments[name].clone().requires_grad_() for name in ("query", "key", "value")}
        out = dense_attention(**(arguments | leaves | {"out": torch.zeros_like(arguments["out"])}), backend=backend)
        out[:, :, list(HEADS)].float().square().sum().backward()
        grads.append([leaf.grad.float() for leaf in leaves.values()])
    for ours, expected in zip(*grads, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 2e-2


def test_compiled_call_equals_eager():
    arguments = layer(2000)
    dense_attention(**arguments)
    expected = arguments["out"][:, :, list(HEADS)].clone()
    compiled = torch.compile(lambda **kwargs: dense_attention(**kwargs) + 0, fullgraph=True)
    found = compiled(**(arguments | {"out": torch.zeros_like(arguments["out"])}))
    assert torch.equal(found[:, :, list(HEADS)], expected)
