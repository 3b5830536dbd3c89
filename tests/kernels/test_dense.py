"""Dense causal attention over a head subset: every CPU path against the fp32 reference."""

import pytest
import torch

from rtpurbo_hf.kernels.common import HAS_TRITON
from rtpurbo_hf.kernels.dense import HeadGroup, dense_attention, dense_attention_reference, head_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
GRADIENT_NAMES = ("query", "key", "value")


def inputs(
    length: int = 63,
    *,
    group: int = 3,
    head_dim: int = 64,
    kv_len: int | None = None,
    start: tuple[int, ...] | None = None,
    softcap: float | None = None,
    logits: bool = False,
    heads: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict:
    torch.manual_seed(1)
    batch, kv_heads, kv_len = len(start) if start else 1, 3, kv_len or length
    num_heads = kv_heads * group
    heads = heads or tuple(range(0, num_heads, 2))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    return {
        "query": random(batch, length, num_heads, head_dim).transpose(1, 2),
        "key": random(batch, kv_heads, kv_len, head_dim),
        "value": random(batch, kv_heads, kv_len, head_dim),
        "heads": heads,
        "kv_heads": tuple(head // group for head in heads),
        "scale": 1.3 * head_dim**-0.5,
        "out": torch.full((batch, length, num_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE),
        "q_start": kv_len - length,
        "start": None if start is None else torch.tensor(start, device=DEVICE),
        "softcap": softcap,
        "sink_logits": torch.randn(num_heads, device=DEVICE) if logits else None,
    }


def run(arguments: dict, backend: str) -> torch.Tensor:
    """The listed heads of a fresh output; the others must still be NaN."""
    arguments = arguments | {"out": arguments["out"].clone()}
    out = dense_attention(**arguments, backend=backend)
    assert out is arguments["out"]
    listed = [int(head) for head in arguments["heads"]]
    others = [head for head in range(out.shape[2]) if head not in listed]
    assert torch.isnan(out[:, :, others]).all()
    return out[:, :, listed]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


CASES = {
    "one-token": {"length": 1},
    "g1": {"length": 111, "group": 1},
    "g4-d80": {"group": 4, "head_dim": 80},
    "g5-d96": {"group": 5, "head_dim": 96},
    "g7-uneven": {"group": 7, "heads": (0, 1, 6, 9, 20)},
    "last-kv-head": {"heads": (8,)},
    "chunk": {"length": 20, "kv_len": 63},
    "padded": {"start": (0, 5, 62)},
    "padded-chunk": {"length": 20, "kv_len": 63, "start": (0, 50, 3)},
    "softcap": {"softcap": 4.0},
    "logits": {"logits": True},
    "all-at-once": {"length": 30, "kv_len": 41, "start": (0, 12, 40), "softcap": 4.0, "logits": True},
    "fp16": {"dtype": torch.float16},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_auto_matches_reference(case):
    arguments = inputs(**case)
    tolerance = 5e-3 if arguments["query"].dtype == torch.float16 else 1e-5
    assert relative_error(run(arguments, "auto"), run(arguments, "reference")) < tolerance


@needs_triton
@cases
def test_triton_matches_reference(case):
    arguments = inputs(**case)
    exact = arguments["query"].dtype == torch.float32 and DEVICE == "cpu"
    assert relative_error(run(arguments, "triton"), run(arguments, "reference")) < (1e-5 if exact else 5e-3)


def test_reference_is_scaled_dot_product_attention():
    arguments = inputs(group=1, heads=(0, 1, 2))
    query, key, value = (arguments[name] for name in GRADIENT_NAMES)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=arguments["scale"]
    )
    assert relative_error(run(arguments, "reference"), expected.transpose(1, 2)) < 1e-5


def test_reference_backend_is_the_reference():
    arguments = inputs(start=(0, 5, 62))
    tensors = {name: torch.tensor(arguments[name], device=DEVICE) for name in ("heads", "kv_heads")}
    expected = dense_attention_reference(**(arguments | tensors | {"out": arguments["out"].clone()}))
    assert torch.equal(run(arguments, "reference"), expected[:, :, list(arguments["heads"])])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_head_tensors_and_tuples_agree(backend):
    arguments = inputs()
    tensors = {name: torch.tensor(arguments[name], device=DEVICE) for name in ("heads", "kv_heads")}
    assert relative_error(run(arguments | tensors, backend), run(arguments, backend)) < 1e-6


def test_keys_after_the_last_query_are_not_read():
    arguments = inputs(30, kv_len=50) | {"q_start": 0}
    expected = run(arguments, "auto")
    for name in ("key", "value"):
        arguments[name][:, :, 30:] = float("nan")
    torch.testing.assert_close(run(arguments, "auto"), expected)


@pytest.mark.parametrize("case", ["g4-d80", "chunk", "padded", "softcap", "logits"])
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_gradients_equal_the_reference(case, backend):
    arguments = inputs(**CASES[case])
    grads = []
    for name in (backend, "reference"):
        leaves = {key: arguments[key].clone().requires_grad_() for key in GRADIENT_NAMES}
        out = dense_attention(**(arguments | leaves | {"out": arguments["out"].clone()}), backend=name)
        out[:, :, list(arguments["heads"])].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    assert all(float(grad.abs().sum()) > 0 for grad in grads[0])
    for ours, expected in zip(*grads, strict=True):
        # A row that sees one key has gradient zero; a backend leaves the rounding of larger terms there.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_compile_does_not_break_the_graph():
    arguments = inputs(20)
    expected = run(arguments, "auto")
    compiled = torch.compile(lambda **kw: 2 * dense_attention(**kw), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments)[:, :, list(arguments["heads"])], expected * 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups"),
    [
        ((0, 1, 9, 17), (0, 0, 1, 2), [HeadGroup((0, 1), (0,)), HeadGroup((9, 17), (1, 2))]),
        ((3, 11, 27), (0, 1, 3), [HeadGroup((3, 11), (0, 1)), HeadGroup((27,), (3,))]),
        ((1, 17), (0, 2), [HeadGroup((1, 17), (0, 2))]),
        ((5,), (2,), [HeadGroup((5,), (2,))]),
    ],
    ids=["uneven", "broken-run", "strided", "single"],
)
def test_head_groups(heads, kv_heads, groups):
    assert list(head_groups(heads, kv_heads)) == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale > 0"),
        ({"q_start": 1}, "q_start <= keys - queries"),
        ({"heads": (0, 1, 9), "kv_heads": (0, 0, 1)}, r"heads must be in \[0, 9\)"),
        ({"kv_heads": (0, 1)}, "of one length"),
        ({"start": torch.zeros(4, dtype=torch.long)}, r"start must be \[B\]"),
        ({"backend": "fast"}, "attention_backend must be one of"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dense_attention(**(inputs(20) | change))
