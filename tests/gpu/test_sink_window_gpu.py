"""The sink + window kernels at real sizes on a GPU, against the fp32 rule on sampled rows."""

import math

import pytest
import torch

from rtpurbo_hf.kernels import sink_window, sink_window_hopper, sink_window_triton
from rtpurbo_hf.kernels.sink_window import sink_window_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATHS = ("default", "portable")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """The kernel that the device gets by default, and the portable one everywhere."""
    if request.param == "portable":
        monkeypatch.setattr(sink_window, "hopper_fits", lambda *args: False)
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)


def sampled_error(
    out,
    query,
    key,
    value,
    *,
    heads,
    kv_heads,
    window,
    num_sinks,
    scale,
    rows,
    first=0,
    softcap=None,
    logits=None,
    row=0,
):  # fmt: skip
    """Worst relative error over the heads at the given query rows (slots = rows) of batch row `row`."""
    rows = torch.tensor(sorted({r for r in rows if first <= r < query.shape[2]}), device="cuda")
    n = torch.arange(key.shape[2], device="cuda") - first
    m = rows[:, None] - first
    mask = (n >= 0) & (n <= m) & ((m - n < window) | (n < num_sinks))
    worst = 0.0
    for head, kv_head in zip(heads, kv_heads, strict=True):
        scores = query[row, head, rows].float() @ key[row, kv_head].float().T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if logits is not None:
            scores = torch.cat([scores, logits[head].expand(len(rows), 1)], 1)
        weights = torch.softmax(scores, -1)[:, : key.shape[2]]
        expected = weights @ value[row, kv_head].float()
        found = out[row, rows, head].float()
        assert torch.isfinite(found).all()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def edges(length: int, window: int) -> list[int]:
    near = [0, 1, 3, 4, 63, 64, 127, 128, 191, 192, window - 1, window, window + 1, window + 200]
    return [*near, length // 2 + 17, length - 130, length - 129, length - 2, length - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_at_8k(head_dim, dtype, path):
    length, group = 8192 + 111, 3
    query = random(1, length, 2 * group, head_dim, dtype=dtype).transpose(1, 2)
    key, value = (random(1, 2, length, head_dim, dtype=dtype, seed=s) for s in (1, 2))
    heads, kv_heads = (0, 2, 5), (0, 0, 1)
    out = torch.full((1, length, 2 * group, head_dim), math.nan, dtype=dtype, device="cuda")
    case = {"heads": heads, "kv_heads": kv_heads, "window": 1000, "num_sinks": 4, "scale": head_dim**-0.5}
    sink_window_attention(query, key, value, out=out, **case)
    assert sampled_error(out, query, key, value, rows=edges(length, 1000), **case) < 5e-3
    assert torch.isfinite(out[:, :, list(heads)]).all()
    assert torch.isnan(out[:, :, [1, 3, 4]]).all()


@pytest.mark.parametrize("num_sinks", [0, 4, 40])
@pytest.mark.parametrize("extra", [(None, False), (20.0, False), (None, True), (20.0, True)], ids=str)
def test_variants_with_padding(num_sinks, extra, path):
    softcap, with_logits = extra
    length, first = 3000, (0, 777, 2990)
    query = random(3, length, 8, 128).transpose(1, 2)
    key, value = random(3, 2, length, 128, seed=1), random(3, 2, length, 128, seed=2)
    logits = random(8, dtype=torch.float32, seed=3) if with_logits else None
    out = torch.full((3, length, 8, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    case = {"heads": tuple(range(8)), "kv_heads": (0,) * 4 + (1,) * 4, "window": 500, "scale": 0.1}
    start = torch.tensor(first, device="cuda")
    sink_window_attention(
        query, key, value, out=out, num_sinks=num_sinks, start=start, softcap=softcap, sink_logits=logits, **case
    )
    for row, slot in enumerate(first):
        rows = [slot + r for r in edges(length - slot, 500)]
        error = sampled_error(
            out, query, key, value, rows=rows, first=slot, softcap=softcap, logits=logits, row=row,
            num_sinks=num_sinks, **case,
        )  # fmt: skip
        assert error < 5e-3
        assert (out[row, :slot] == 0).all()


@pytest.mark.parametrize("length", [1, 5, 64, 129, 1000])
def test_short_sequences(length, path):
    query = random(1, 4, length, 128)
    key, value = random(1, 1, length, 128, seed=1), random(1, 1, length, 128, seed=2)
    out = torch.full((1, length, 4, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    case = {"heads": (0, 1, 2, 3), "kv_heads": (0,) * 4, "window": 100, "num_sinks": 4, "scale": 0.1}
    sink_window_attention(query, key, value, out=out, **case)
    assert sampled_error(out, query, key, value, rows=range(length), **case) < 5e-3


def test_chunk_with_sinks_apart_equals_one_call(path):
    length, first, window = 20_000, 15_000, 4096
    query = random(1, 8, length, 128)
    key, value = random(1, 2, length, 128, seed=1), random(1, 2, length, 128, seed=2)
    case = {"heads": (0, 3, 7), "kv_heads": (0, 0, 1), "window": window, "num_sinks": 4, "scale": 0.09}
    whole, chunk = (
        torch.full((1, rows, 8, 128), math.nan, dtype=torch.bfloat16, device="cuda")
        for rows in (length, length - first)
    )
    sink_window_attention(query, key, value, out=whole, **case)
    low = first - window + 1
    # slots behind the last query hold garbage
    spare = torch.full((1, 2, 300, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    sink_window_attention(
        query[:, :, first:],
        torch.cat([key[:, :, low:], spare], 2),
        torch.cat([value[:, :, low:], spare], 2),
        out=chunk,
        q_start=first,
        kv_start=low,
        sink_key=key[:, :, :4],
        sink_value=value[:, :, :4],
        **case,
    )
    heads = list(case["heads"])
    difference = chunk[:, :, heads].float() - whole[:, first:, heads].float()
    assert float(difference.norm() / whole[:, first:, heads].float().norm()) < 3e-3


def test_32k_paper_geometry_is_exact_and_deterministic(path):
    length = 32_768
    query = random(1, length, 32, 128).transpose(1, 2)
    key, value = (random(1, length, 4, 128, seed=s).transpose(1, 2) for s in (1, 2))
    heads = tuple(h for h in range(32) if h not in (1, 2, 5, 12, 20))
    case = {"heads": heads, "kv_heads": tuple(h // 8 for h in heads), "window": 8192, "num_sinks": 4, "scale": 0.09}
    outs = []
    for _ in range(2):
        out = torch.full((1, length, 32, 128), math.nan, dtype=torch.bfloat16, device="cuda")
        sink_window_attention(query, key, value, out=out, **case)
        outs.append(out[:, :, list(heads)])
    assert torch.equal(*outs)
    assert sampled_error(out, query, key, value, rows=edges(length, 8192), **case) < 5e-3


def test_keys_beyond_two_to_the_31_elements(path):
    """The last KV head starts after 2^31 elements of K; its keys must be read from there."""
    length, heads, dim = 1_048_576, 17, 128
    assert (heads - 1) * length * dim >= 2**31
    key = random(1, heads, length, dim)
    value = random(1, heads, length, dim, seed=1)
    query = random(1, 1, length, dim, seed=2)[:, :, -4096:]
    out = torch.full((1, 4096, 1, dim), math.nan, dtype=torch.bfloat16, device="cuda")
    case = {"heads": (0,), "kv_heads": (heads - 1,), "window": 2048, "num_sinks": 4, "scale": 0.09}
    sink_window_attention(query, key, value, out=out, q_start=length - 4096, **case)
    rows = torch.tensor([0, 1, 2047, 2048, 4000, 4095], device="cuda")
    m, n = (length - 4096 + rows)[:, None], torch.arange(length, device="cuda")
    mask = (n <= m) & ((m - n < 2048) | (n < 4))
    scores = (query[0, 0, rows].float() @ key[0, -1].float().T * 0.09).masked_fill(~mask, float("-inf"))
    expected = torch.softmax(scores, -1) @ value[0, -1].float()
    assert float((out[0, rows, 0].float() - expected).norm() / expected.norm()) < 5e-3


def test_lengths_do_not_recompile(path):
    kernel = sink_window_triton._sink_window_kernel
    if path == "default" and torch.cuda.get_device_capability()[0] == 9:
        kernel = sink_window_hopper._sink_window_hopper_kernel
    sizes = []
    for length, q_start in ((1000, 0), (1001, 0), (1024, 0), (16, 1), (333, 667)):
        query, key = random(1, 4, length, 128), random(1, 2, length + q_start, 128)
        out = torch.empty(1, length, 4, 128, dtype=torch.bfloat16, device="cuda")
        sink_window_attention(
            query, key, key, heads=(0, 3), kv_heads=(0, 1), window=100 + length, num_sinks=4, scale=0.1, out=out,
            q_start=q_start,
        )  # fmt: skip
        sizes.append(len(kernel.device_caches[torch.cuda.current_device()][0]))
    assert sizes[0] == sizes[-1]


def test_cuda_graph_replay_sees_new_inputs(path):
    query, key, value = (random(1, 4, 2000, 128, seed=s) for s in range(3))
    start = torch.zeros(1, dtype=torch.long, device="cuda")
    out = torch.empty(1, 2000, 4, 128, dtype=torch.bfloat16, device="cuda")
    case = {"heads": (0, 1, 3), "kv_heads": (0, 1, 3), "window": 300, "num_sinks": 4, "scale": 0.09}

    def call() -> None:
        sink_window_attention(query, key, value, out=out, start=start, **case)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    key.copy_(random(1, 4, 2000, 128, seed=9))
    start.fill_(700)
    out.fill_(math.nan)
    graph.replay()
    rows = [700 + r for r in edges(1300, 300)]
    assert sampled_error(out, query, key, value, rows=rows, first=700, **case) < 5e-3
