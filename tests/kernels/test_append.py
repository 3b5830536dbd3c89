"""Append: the kernel writes what the reference writes, and nothing else."""

import pytest
import torch
from decode_case import Case

from rtpurbo_hf.kernels.append import append_step, append_step_reference, quantize_index

CASES = {
    "one": {"length": 1},
    "wraps 6 times": {"length": 150, "q_len": 3},
    "16 at once": {"length": 64, "q_len": 16, "batch": 2, "padding": (3, 0)},
    "padded": {"length": 45, "q_len": 1, "batch": 3, "padding": (0, 7, 44)},
    "no retrieval heads": {"length": 31, "retrieval_heads": ()},
    "all retrieval heads": {"length": 31, "retrieval_heads": (0, 1, 2, 3, 4, 5)},
    "int8": {"length": 40, "q_len": 3, "int8": True},
    "fp16 shared": {"length": 40, "q_len": 2, "shared_index": True, "dtype": torch.float16},
    "dim 80, no sinks": {"length": 60, "head_dim": 80, "num_sinks": 0},
    "K/V int8": {"length": 63, "q_len": 3, "batch": 2, "padding": (0, 7), "kv": "int8"},
    "K/V int8, fp16, dim 80": {"length": 40, "q_len": 2, "head_dim": 80, "kv": "int8", "dtype": torch.float16},
    "K/V fp8": {"length": 111, "q_len": 16, "kv": "fp8"},
    "K/V fp8, fp16, dim 96": {"length": 40, "head_dim": 96, "kv": "fp8", "dtype": torch.float16, "int8": True},
}


def exact_in_fp8(states: torch.Tensor) -> None:
    """Numbers that need no rounding: the interpreter's conversion loses the carry of a rounded-up mantissa."""
    whole = (states.float() * 32).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    whole[whole.abs() < 2.0**-6] = 0  # its subnormal numbers are off as well
    whole[..., 5] = 448
    states.copy_(whole / 64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_writes_what_the_reference_writes(case: dict) -> None:
    ours, theirs = Case(**case), Case(**case)
    if ours.kv == "fp8":
        for states in (ours.key, ours.value, theirs.key, theirs.value):
            exact_in_fp8(states)
    # the steps before the last through the reference: the last one overwrites a wrapped ring
    before = ours.length - ours.q_len
    ours.fill(until=before)
    theirs.fill(until=before)

    def step(case: Case, append, **backend) -> None:
        append(
            *case.step_inputs(before, case.length),
            *case.stores(),
            full_slot=case.full_slot,
            window_slot=case.window_slot,
            length=case.length_tensor,
            start=case.start,
            num_sinks=case.num_sinks,
            index_scale=case.index_scale,
            **case.scales(),
            **backend,
        )

    step(ours, append_step, backend="triton")
    step(theirs, append_step_reference)
    for name, got, expected in zip(
        ("full_key", "full_value", "index_key", "window_key", "window_value"),
        ours.stores(),
        theirs.stores(),
        strict=True,
    ):
        assert torch.equal(got.float().nan_to_num(55.0), expected.float().nan_to_num(55.0)), name
    for name, scale in ours.scales().items():
        if scale is not None:
            assert torch.equal(scale.nan_to_num(55.0), theirs.scales()[name].nan_to_num(55.0)), name
    if ours.index_scale is not None:
        assert torch.equal(ours.index_scale.nan_to_num(55.0), theirs.index_scale.nan_to_num(55.0))


def test_reference_places_tokens_by_position() -> None:
    case = Case(60, batch=2, padding=(0, 9), window=8, num_sinks=2)
    case.fill()
    ring = case.window_key.shape[2] - 2
    for row, first in enumerate((0, 9)):
        for position in [0, 1, *range(60 - first - ring, 60 - first)]:
            slot = position if position < 2 else 2 + (position - 2) % ring
            expected = case.key[row, 2:, position + first]
            assert torch.equal(case.window_key[row, :, slot], expected), (row, position)


def test_quantisation_is_within_half_a_step_and_per_token() -> None:
    keys = torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50)[:, None]
    quantized, scale = quantize_index(keys, torch.bfloat16)
    error = (quantized.float() * scale.float()[..., None] - keys).abs()
    assert quantized.dtype == torch.int8
    # a bf16 scale may be rounded down by 2^-9, which clips the largest entry by half a step at most
    assert (error <= 0.76 * scale.float()[..., None]).all()
    alone, _ = quantize_index(keys[:, :, 7:8], torch.bfloat16)
    assert torch.equal(alone, quantized[:, :, 7:8])


def test_bad_input_is_named() -> None:
    case = Case(9)
    tables = {"full_slot": case.full_slot, "window_slot": case.window_slot, "num_sinks": 4}
    common = tables | {"length": case.length_tensor, "start": None}
    with pytest.raises(ValueError, match="must name each of the 3 KV heads"):
        append_step(*case.step_inputs(8, 9), *case.stores(), **(common | {"full_slot": (0,)}))
    with pytest.raises(ValueError, match="int8 index store needs index_scale"):
        append_step(*case.step_inputs(8, 9), *case.stores(), index_scale=torch.ones(1), **common)
    key, value, index = case.step_inputs(8, 9)
    with pytest.raises(ValueError, match="does not fit the index store"):
        append_step(key, value, index[..., :5], *case.stores(), **common)
    with pytest.raises(ValueError, match="quantised full_key needs key_scale, and only that does"):
        append_step(*case.step_inputs(8, 9), *case.stores(), **Case(9, kv="int8").scales(), **common)
    full_key, *others = case.stores()
    with pytest.raises(ValueError, match=r"full_key must be \[B, heads, slots, 16\]"):
        append_step(key, value, index, full_key[..., :8], *others, **common)
