"""The sink + window kernel against its fp32 reference, in Triton's interpreter where there is no GPU."""

from dataclasses import dataclass, replace

import pytest
import torch

from rtpurbo_hf.kernels.common import HAS_TRITON
from rtpurbo_hf.kernels.sink_window import sink_window_attention, sink_window_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@dataclass(frozen=True)
class Case:
    """One call: `kv_len` defaults to `length`; queries are the last `length` slots."""

    length: int
    group: int = 3
    head_dim: int = 64
    window: int = 20
    num_sinks: int = 4
    kv_len: int | None = None
    kv_start: int = 0
    start: tuple[int, ...] | None = None
    apart: bool = False
    softcap: float | None = None
    logits: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = [f"m{self.length}", f"g{self.group}", f"d{self.head_dim}", f"w{self.window}s{self.num_sinks}"]
        parts += [f"n{self.kv_len}"] if self.kv_len else []
        parts += ["padded"] if self.start else []
        parts += ["apart"] if self.apart else []
        parts += ["cap"] if self.softcap else []
        parts += ["logits"] if self.logits else []
        parts += ["fp16"] if self.dtype == torch.float16 else []
        return "-".join(parts)


CASES = [
    Case(1),
    Case(3),
    Case(63),
    Case(111, group=1),
    Case(111, group=4, window=1),
    Case(63, group=5, head_dim=80),
    Case(63, group=7, head_dim=96, num_sinks=0),
    Case(63, window=1000),
    Case(63, num_sinks=40),
    Case(63, num_sinks=100, window=7),
    Case(111, start=(0, 5, 70), window=33),
    Case(63, start=(0, 62, 61), num_sinks=0),
    Case(20, kv_len=63, start=(0, 50, 3)),
    Case(5, kv_len=111, window=64),
    Case(40, kv_len=60, kv_start=51, apart=True),
    Case(40, kv_len=60, kv_start=51, apart=True, start=(0, 5, 70)),
    Case(2, kv_len=2, apart=True),
    Case(63, softcap=5.0),
    Case(63, logits=True),
    Case(63, softcap=5.0, logits=True, start=(0, 30, 1), num_sinks=0),
    Case(63, dtype=torch.float16),
]


def inputs(case: Case, seed: int = 0) -> dict:
    """Keyword arguments of the operation; every second head is listed, and `out` is NaN everywhere."""
    torch.manual_seed(seed)
    batch = len(case.start) if case.start else 1
    kv_heads, heads = 2, 2 * case.group
    kv_len = case.kv_len or case.length

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(case.dtype)

    # stored [B, length, heads, D], seen as [B, heads, length, D], as a model's projections leave them
    query = random(batch, case.length, heads, case.head_dim).transpose(1, 2)
    listed = tuple(range(0, heads, 2))
    made = {
        "query": query,
        "key": random(batch, kv_heads, kv_len, case.head_dim),
        "value": random(batch, kv_len, kv_heads, case.head_dim).transpose(1, 2),
        "heads": listed,
        "kv_heads": tuple(head // case.group for head in listed),
        "window": case.window,
        "num_sinks": case.num_sinks,
        "scale": 1.3 * case.head_dim**-0.5,
        "out": torch.full_like(query.transpose(1, 2).contiguous(), float("nan")),
        "q_start": case.kv_start + kv_len - case.length,
        "kv_start": case.kv_start,
        "start": None if case.start is None else torch.tensor(case.start, device=DEVICE),
        "softcap": case.softcap,
        "sink_logits": torch.randn(heads, device=DEVICE) if case.logits else None,
    }
    if case.apart:
        size = min(case.num_sinks, kv_len + case.kv_start)
        made["sink_key"] = random(batch, kv_heads, size, case.head_dim)
        made["sink_value"] = random(batch, kv_heads, size, case.head_dim)
    return made


def run(arguments: dict, backend: str) -> torch.Tensor:
    """The listed heads of a fresh output; the others must still be NaN."""
    arguments = arguments | {"out": arguments["out"].clone()}
    out = sink_window_attention(**arguments, backend=backend)
    assert out is arguments["out"]
    others = [head for head in range(out.shape[2]) if head not in arguments["heads"]]
    assert torch.isnan(out[:, :, others]).all()
    return out[:, :, list(arguments["heads"])]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def dense_oracle(arguments: dict) -> torch.Tensor:
    """Every (query, key) pair written out, for calls whose keys start at slot 0."""
    query, key, value = (arguments[name].double() for name in ("query", "key", "value"))
    heads, kv_heads = list(arguments["heads"]), list(arguments["kv_heads"])
    first = 0 if arguments["start"] is None else arguments["start"][:, None]
    m = arguments["q_start"] + torch.arange(query.shape[2], device=DEVICE) - first
    n = torch.arange(key.shape[2], device=DEVICE) - first
    m, n = m.expand(query.shape[0], -1)[:, :, None], n.expand(query.shape[0], -1)[:, None]
    mask = (n >= 0) & (n <= m) & ((m - n < arguments["window"]) | (n < arguments["num_sinks"]))
    scores = query[:, heads] @ key[:, kv_heads].transpose(-1, -2) * arguments["scale"]
    if arguments["softcap"] is not None:
        scores = arguments["softcap"] * torch.tanh(scores / arguments["softcap"])
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if arguments["sink_logits"] is not None:
        column = arguments["sink_logits"][heads].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value[:, kv_heads]).transpose(1, 2)


@pytest.mark.parametrize("case", [case for case in CASES if not case.apart], ids=str)
def test_reference_is_the_written_rule(case):
    arguments = inputs(replace(case, dtype=torch.float32))
    assert relative_error(run(arguments, "reference"), dense_oracle(arguments)) < 1e-5


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_reference(case):
    arguments = inputs(case)
    tolerance = 1e-5 if case.dtype == torch.float32 and DEVICE == "cpu" else 5e-3
    assert relative_error(run(arguments, "triton"), run(arguments, "reference")) < tolerance


@needs_triton
def test_padded_rows_equal_the_unpadded_sequence():
    case = Case(60, start=(0, 17, 44))
    arguments = inputs(case)
    padded = run(arguments, "triton")
    for row, first in enumerate(case.start):
        alone = arguments | {"start": None}
        for name in ("query", "key", "value"):
            alone[name] = arguments[name][row : row + 1, :, first:]
        alone["out"] = arguments["out"][row : row + 1, first:]
        torch.testing.assert_close(padded[row : row + 1, first:], run(alone, "triton"), rtol=1e-5, atol=1e-5)
        assert torch.equal(padded[row, :first], torch.zeros_like(padded[row, :first]))


@needs_triton
def test_chunks_with_sinks_apart_equal_one_call():
    """A ring-buffered store hands over sinks and the last keys only; the answer must not change."""
    case = Case(90, window=25)
    arguments = inputs(case)
    whole = run(arguments, "triton")
    first = 61
    low = first - 24
    chunk = arguments | {
        "query": arguments["query"][:, :, first:],
        "key": arguments["key"][:, :, low:],
        "value": arguments["value"][:, :, low:],
        "out": arguments["out"][:, first:],
        "q_start": first,
        "kv_start": low,
        "sink_key": arguments["key"][:, :, :4],
        "sink_value": arguments["value"][:, :, :4],
    }
    torch.testing.assert_close(run(chunk, "triton"), whole[:, first:], rtol=1e-5, atol=1e-5)


@needs_triton
def test_keys_after_the_last_query_are_not_read():
    """A preallocated cache holds garbage there; NaN in it must not reach the output."""
    arguments = inputs(Case(30, kv_len=50)) | {"q_start": 0}
    expected = run(arguments, "triton")
    for name in ("key", "value"):
        arguments[name][:, :, 30:] = float("nan")
    assert torch.equal(run(arguments, "triton"), expected)


@needs_triton
def test_head_tensors_and_tuples_agree():
    arguments = inputs(Case(33))
    tensors = {name: torch.tensor(arguments[name], device=DEVICE) for name in ("heads", "kv_heads")}
    out = sink_window_attention(**(arguments | tensors), backend="triton")
    assert torch.equal(out[:, :, list(arguments["heads"])], run(inputs(Case(33)), "triton"))


@needs_triton
def test_gradients_fall_back_to_the_reference():
    arguments = inputs(Case(20, softcap=3.0))
    grads = []
    for backend in ("triton", "reference"):
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("query", "key", "value")}
        out = sink_window_attention(**(arguments | leaves | {"out": arguments["out"].clone()}), backend=backend)
        out[:, :, list(arguments["heads"])].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    assert all(float(grad.abs().sum()) > 0 for grad in grads[0])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


@needs_triton
def test_compile_does_not_break_the_graph():
    arguments = inputs(Case(20))
    expected = run(arguments, "triton")
    compiled = torch.compile(lambda **kw: sink_window_attention(**kw) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(**arguments, backend="triton")
    torch.testing.assert_close(out[:, :, list(arguments["heads"])], expected * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window >= 1"),
        ({"scale": 0.0}, "scale > 0"),
        ({"heads": (0, 2, 9)}, r"heads must be in \[0, 6\)"),
        ({"kv_heads": (0, 1)}, "of one length"),
        ({"kv_start": 3}, "give sink_key"),
        ({"start": torch.zeros(2, dtype=torch.long)}, r"start must be \[B\]"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must be \[Hq\]"),
        ({"sink_key": torch.zeros(1, 2, 4, 64)}, "given together"),
        (
            {"sink_key": torch.zeros(1, 2, 5, 64), "sink_value": torch.zeros(1, 2, 5, 64)},
            "more than num_sinks=4",
        ),
        ({"out": torch.zeros(1, 6, 20, 64)}, r"out must be \[B, M, Hq, D\]"),
        ({"value": torch.zeros(1, 2, 19, 64)}, "of one shape"),
        ({"backend": "cuda"}, "attention_backend must be one of"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sink_window_attention(**(inputs(Case(20)) | change))


def test_reference_backend_is_the_reference():
    arguments = inputs(Case(30, start=(0, 4, 29)))
    tensors = {name: torch.tensor(arguments[name], device=DEVICE) for name in ("heads", "kv_heads")}
    expected = sink_window_attention_reference(**(arguments | tensors | {"out": arguments["out"].clone()}))
    assert torch.equal(run(arguments, "reference"), expected[:, :, list(arguments["heads"])])
