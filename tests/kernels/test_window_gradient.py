"""Gradients of sink + window and dense attention against autograd through the fp32 references."""

from dataclasses import dataclass

import pytest
import torch

from rtpurbo_hf.kernels import window_gradient
from rtpurbo_hf.kernels.common import HAS_TRITON
from rtpurbo_hf.kernels.dense import dense_attention
from rtpurbo_hf.kernels.sink_window import sink_window_attention
from rtpurbo_hf.kernels.window_gradient import window_attention_with_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "query", "key", "value", "logits")


@dataclass(frozen=True)
class Case:
    length: int
    heads: tuple[int, ...] = (0, 2, 3, 5)
    head_dim: int = 64
    window: int = 20
    num_sinks: int = 4
    start: tuple[int, ...] | None = None
    softcap: float | None = None
    logits: bool = False

    def __str__(self) -> str:
        parts = [f"m{self.length}", f"h{len(self.heads)}", f"d{self.head_dim}", f"w{self.window}s{self.num_sinks}"]
        parts += ["padded"] if self.start else []
        parts += ["cap"] if self.softcap else []
        parts += ["logits"] if self.logits else []
        return "-".join(parts)


CASES = [
    Case(1),
    Case(63),
    Case(111, heads=(0, 1, 2, 3, 4, 5), window=1),
    Case(63, head_dim=80, num_sinks=0),
    Case(63, head_dim=96, num_sinks=17, window=9),
    Case(70, window=70),
    Case(111, start=(0, 70), window=33),
    Case(63, start=(5, 62), softcap=3.0, logits=True),
    Case(111, softcap=2.0),
    Case(111, logits=True, window=40),
    Case(40, head_dim=256, heads=(4,), softcap=5.0, logits=True),
]
BACKENDS = [
    "tiled",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton")),
]


def inputs(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(case.length)
    batch = 1 if case.start is None else len(case.start)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    query = draw(batch, 6, case.length, case.head_dim)
    key, value = (draw(batch, 2, case.length, case.head_dim) for _ in range(2))
    logits = draw(6) if case.logits else None
    weight = draw(batch, case.length, 6, case.head_dim)
    return query, key, value, logits, weight


def run(case, tensors, backend, attention=sink_window_attention):
    *leaves, weight = (None if x is None else x.clone() for x in tensors)
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    query, key, value, logits = leaves
    start = None if case.start is None else torch.tensor(case.start, device=DEVICE)
    options = {"heads": case.heads, "kv_heads": tuple(h // 3 for h in case.heads), "scale": case.head_dim**-0.5}
    options |= {"start": start, "softcap": case.softcap, "sink_logits": logits}
    if attention is sink_window_attention:
        options |= {"window": case.window, "num_sinks": case.num_sinks}
    # heads that are not listed keep what they hold, and its gradient
    before = torch.ones_like(weight).requires_grad_()
    out = before * 2
    if backend == "tiled":
        out = window_attention_with_gradient(
            query, key, value, out=out, attend=sink_window_attention, fused=False, **options
        )
    else:
        attention(query, key, value, out=out, backend=backend, **options)
    (out * weight).sum().backward()
    found = [out.detach(), *(None if x is None else x.grad for x in leaves)]
    return dict(zip((*NAMES, "before"), (*found, before.grad), strict=True))


def assert_close(ours, reference, tolerance):
    for name, expected in reference.items():
        if expected is None:
            continue
        error = (ours[name].float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case, backend, monkeypatch):
    # several tiles of rows
    monkeypatch.setattr(
        window_gradient, "row_tiles", lambda rows, width: [slice(i, min(i + 25, rows)) for i in range(0, rows, 25)]
    )
    tensors = inputs(case)
    assert_close(run(case, tensors, backend), run(case, tensors, "reference"), 1e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_half_precision():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    for case in (Case(200, window=60), Case(111, softcap=2.0, logits=True, head_dim=128)):
        tensors = inputs(case, dtype)
        reference = run(case, [None if x is None else x.float() for x in tensors], "reference")
        assert_close(run(case, tensors, "triton"), reference, 0.01)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=BACKENDS[1].marks)])
@pytest.mark.parametrize("case", [Case(70, softcap=2.0, logits=True), Case(70, start=(0, 40)), Case(70)], ids=str)
def test_dense_attention_has_the_same_gradients(case, backend):
    tensors = inputs(case)
    ours, reference = (run(case, tensors, name, dense_attention) for name in (backend, "reference"))
    assert_close(ours, reference, 1e-5 if DEVICE == "cpu" else 2e-3)


def test_soft_cap_and_learned_sinks_keep_no_matrix_of_scores():
    """Regression: what was kept for the backward grew with the square of the length."""
    kept = []
    for length in (64, 256):
        case, sizes = Case(length, softcap=2.0, logits=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            run(case, inputs(case), "auto")
            run(case, inputs(case), "auto", dense_attention)
        kept.append(max(sizes))
    assert kept[1] <= 4 * kept[0]
