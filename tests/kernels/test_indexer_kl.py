"""The stage-1 loss: the Triton kernels and the tiled torch path against the fp32 reference under autograd."""

import math

import pytest
import torch

from rtpurbo_hf.kernels.indexer_kl import indexer_kl, indexer_kl_reference
from rtpurbo_hf.kernels.indexer_kl_triton import _row_tiles_of_keys

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
TRITON = pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has its own"))


def case(
    rows=17, keys=63, *, batch=1, group=3, kv_heads=2, head_dim=64, index_dim=16, dtype=torch.float32, shared=False,
    slots=None, **options,
):  # fmt: skip
    """Two heads of the first KV group (as far as there are two), one of each other; the last rows unless given."""
    generator = torch.Generator().manual_seed(rows * keys + head_dim)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    heads = sorted({0, min(1, group - 1), *(kv * group + group - 1 for kv in range(kv_heads))})
    kv_of = torch.tensor([head // group for head in heads])
    if slots is None:
        slots = torch.arange(keys - rows, keys)
    return {
        "query": random(batch, rows, kv_heads * group, head_dim).to(dtype).transpose(1, 2),
        "key": random(batch, kv_heads, keys, head_dim).to(dtype),
        "index_query": random(batch, len(heads), rows, index_dim),
        "index_key": random(batch, kv_heads if shared else len(heads), keys, index_dim),
        "heads": torch.tensor(heads),
        "kv_heads": kv_of,
        "index_heads": kv_of if shared else torch.arange(len(heads)),
        "q_slots": torch.as_tensor(slots).expand(batch, rows).contiguous(),
        "scale": 1.7 * head_dim**-0.5,
        **options,
    }


def loss_and_gradients(function, arguments, **options):
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("index_query", "index_key")}
    loss = function(**(arguments | leaves), **options)
    upstream = torch.linspace(0.5, 2, loss.numel())
    return [loss.detach(), *torch.autograd.grad(loss @ upstream, list(leaves.values()))]


def check(arguments, backend):
    expected = loss_and_gradients(indexer_kl_reference, arguments)
    found = loss_and_gradients(indexer_kl, arguments, backend=backend)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.shape == reference.shape
        assert bool(torch.isfinite(ours).all())
        error = (ours - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error < TOLERANCE[arguments["query"].dtype]
    return found


CASES = {
    "one row": {"rows": 1},
    "all rows": {"rows": 63, "keys": 63},
    "odd": {"rows": 63, "keys": 111, "group": 4},
    "no groups": {"rows": 17, "keys": 111, "group": 1},
    "head_dim 80": {"head_dim": 80},
    "head_dim 128": {"head_dim": 128, "rows": 5},
    "narrow index": {"index_dim": 6},
    "wide index": {"index_dim": 64, "rows": 5},
    "left padding": {"rows": 63, "keys": 63, "batch": 3, "start": torch.tensor([0, 5, 40])},
    "rows that are none": {"rows": 7, "slots": [-1, 3, 20, 33, 34, 62, -1]},
    "sampled, then needles": {"rows": 6, "keys": 111, "slots": [40, 77, 110, 3, 90, -1]},
    "softcap": {"softcap": 2.0},
    "shared index keys": {"shared": True, "rows": 40, "batch": 2},
    "weights": {"rows": 40, "row_weight": torch.linspace(0, 1, 40)[None].pow(4)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_loss_and_gradients(name, dtype, backend):
    check(case(dtype=dtype, **CASES[name]), backend)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_everything_at_once_in_fp16(backend):
    slots = torch.tensor([[-1, -1, 2, 9, 30, 62, 7], [-1, 2, 3, 4, 5, 6, 7], [62, 61, 60, -1, 59, 1, 20]])
    arguments = case(rows=7, batch=3, dtype=torch.float16, shared=True, softcap=3.0, start=torch.tensor([9, 0, 1]))
    check(arguments | {"q_slots": slots, "row_weight": torch.linspace(0.1, 2, 21).view(3, 7)}, backend)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_peaked_scores_stay_finite_and_right(backend):
    arguments = case(rows=63, keys=63, dtype=torch.bfloat16)
    arguments["index_query"] *= 6
    check(arguments | {"scale": 3.0}, backend)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_no_counted_row_gives_zero(backend):
    arguments = case(rows=3, slots=[-1, -1, -1], dtype=torch.bfloat16)
    assert all(not result.any() for result in loss_and_gradients(indexer_kl, arguments, backend=backend))


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_runs_repeat_bit_for_bit(backend):
    arguments = case(rows=40, shared=True, dtype=torch.bfloat16)
    first, second = (loss_and_gradients(indexer_kl, arguments, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_without_gradients_the_loss_is_the_same(backend):
    arguments = case(dtype=torch.bfloat16)
    with_gradients = loss_and_gradients(indexer_kl, arguments, backend=backend)[0]
    assert torch.equal(indexer_kl(**arguments, backend=backend), with_gradients)


@pytest.mark.parametrize("ascending", [True, False])
def test_skipped_row_tiles_see_nothing_and_whole_ones_everything(ascending):
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, 200, (3, 77), generator=generator)
    if ascending:
        slots = slots.sort().values
    start = torch.tensor([0, 10, 100])
    weight = (slots >= start[:, None]).float()
    first, full = _row_tiles_of_keys(slots, weight, start, 200, 8, 16)
    for b in range(3):
        for tile in range(13):
            keys = torch.arange(tile * 16, tile * 16 + 16)
            seen = (keys <= slots[b, :, None]) & (keys >= start[b])
            seen[weight[b] == 0] = False
            assert not seen[: first[b, tile] * 8].any()
            assert seen[full[b, tile] * 8 :][weight[b, full[b, tile] * 8 :] > 0].all()
            if ascending and tile * 16 < slots[b].max():
                assert seen[first[b, tile] * 8 : first[b, tile] * 8 + 8].any() or tile * 16 + 15 < start[b]


def test_reference_backend_is_the_reference():
    arguments = case()
    assert torch.equal(indexer_kl(**arguments, backend="reference"), indexer_kl_reference(**arguments))


@pytest.mark.parametrize(
    ("wrong", "backend", "message"),
    [
        ({}, "flash", "must be one of"),
        ({"head_dim": 320}, "triton", "head_dim <= 256"),
        ({"index_dim": 128}, "triton", "index_dim <= 64"),
        ({"q_slots": torch.zeros(1, 5, dtype=torch.long)}, "auto", "q_slots"),
        ({"index_key": torch.zeros(1, 4, 63, 8)}, "auto", "index_key"),
        ({"row_weight": torch.zeros(5)}, "auto", "row_weight"),
    ],
)
def test_wrong_input_is_named(wrong, backend, message):
    with pytest.raises(ValueError, match=message):
        indexer_kl(**case(**wrong), backend=backend)


def test_the_reference_on_one_row_by_hand():
    arguments = case(rows=1, keys=5, kv_heads=1, group=1)
    q, k = arguments["query"][0, 0, 0], arguments["key"][0, 0]
    teacher = torch.softmax(k @ q * arguments["scale"], 0)
    student = torch.softmax(arguments["index_key"][0, 0] @ arguments["index_query"][0, 0, 0], 0)
    expected = sum(float(p) * math.log(float(p) / float(s)) for p, s in zip(teacher, student, strict=True))
    assert indexer_kl_reference(**arguments).item() == pytest.approx(expected, abs=1e-6)
