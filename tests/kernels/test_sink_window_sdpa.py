"""The library path of sink + window attention (CPUs, training) against the reference, forward and backward."""

import pytest
import torch

from rtpurbo_hf.kernels import sink_window_sdpa
from rtpurbo_hf.kernels.sink_window import sink_window_attention


@pytest.mark.parametrize("chunk", [0, 37], ids=["whole", "chunk"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_equals_reference_with_gradients(chunk, padded, sinks, monkeypatch):
    monkeypatch.setattr(sink_window_sdpa, "TILE", 32)
    generator = torch.Generator().manual_seed(0)
    length, heads, kv_heads = 111, (0, 2, 3, 4), (0, 1, 1, 1)
    start = torch.tensor([0, 50, 7]) if padded else None
    query = torch.randn(3, 5, length - chunk, 24, generator=generator)
    key, value = (torch.randn(3, 2, length, 24, generator=generator) for _ in range(2))
    weight = torch.randn(3, length - chunk, 5, 24, generator=generator)
    results = []
    for backend in ("auto", "reference"):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out = torch.zeros(3, length - chunk, 5, 24)
        out = sink_window_attention(
            *inputs, heads=heads, kv_heads=kv_heads, window=19, num_sinks=sinks, scale=0.2, out=out,
            q_start=chunk, start=start, backend=backend,
        )  # fmt: skip
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - reference).norm() / reference.norm() < 1e-5
