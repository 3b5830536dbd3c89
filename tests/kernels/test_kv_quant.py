"""8-bit keys and values: how far they are off, what their edge cases are, and what is refused."""

import pytest
import torch

from rtpurbo_hf.kernels.kv_quant import (
    KV_DTYPES,
    check_kv_scales,
    dequantize_kv,
    kv_dtype,
    quantize_kv,
    rounded_kv,
)


@pytest.mark.parametrize("name", KV_DTYPES)
def test_error_is_within_half_a_step_of_each_token(name: str) -> None:
    """Magnitudes over twelve orders: each row has a scale of its own."""
    states = torch.randn(2, 3, 50, 64) * torch.logspace(-5, 6, 50)[:, None]
    payload, scale = quantize_kv(states, KV_DTYPES[name])
    assert payload.dtype == KV_DTYPES[name]
    assert scale.dtype == torch.float16
    error = (dequantize_kv(payload, scale, torch.float32) - states).abs()
    largest = states.abs().amax(-1, keepdim=True)
    # half a step; fp16's own range makes tiny scales coarse: half its smallest number, times the limit
    if name == "int8":
        assert (error <= 0.57 / 127 * largest + 127 * 2.0**-25).all()
    else:
        step = torch.maximum(states.abs() / 16, largest / 448 * 2.0**-10)
        assert (error <= step * 1.01 + 448 * 2.0**-25).all()


@pytest.mark.parametrize("name", KV_DTYPES)
def test_zero_rows_huge_rows_and_tokens_alone(name: str) -> None:
    states = torch.randn(1, 2, 5, 16)
    states[:, :, 1] = 0
    states[:, :, 2] *= 1e9  # beyond the largest scale: clipped, and finite
    payload, scale = quantize_kv(states, KV_DTYPES[name])
    back = dequantize_kv(payload, scale, torch.float32)
    assert torch.isfinite(back).all()
    assert (back[:, :, 1] == 0).all()
    alone = dequantize_kv(*quantize_kv(states[:, :, 3:4], KV_DTYPES[name]), torch.float32)
    assert torch.equal(alone, back[:, :, 3:4])


def test_int8_is_closer_than_fp8_for_normal_rows() -> None:
    states = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    error = {
        name: float((rounded_kv(states, dtype) - states).norm() / states.norm()) for name, dtype in KV_DTYPES.items()
    }
    assert 0.004 < error["int8"] < 0.008
    assert 0.02 < error["fp8"] < 0.03


def test_gradients_pass_through_the_rounding() -> None:
    states = torch.randn(3, 16, requires_grad=True)
    rounded = rounded_kv(states, torch.int8)
    assert not torch.equal(rounded, states)
    rounded.backward(torch.ones_like(states))
    assert torch.equal(states.grad, torch.ones_like(states))


def test_refusals() -> None:
    assert kv_dtype("auto") is None
    with pytest.raises(ValueError, match="must be 'auto', 'int8' or 'fp8', got 'int4'"):
        kv_dtype("int4")
    payload, scale = quantize_kv(torch.randn(2, 3, 5, 8), torch.int8)
    check_kv_scales(payload, payload, scale, scale)
    with pytest.raises(ValueError, match=r"value_scale must be contiguous \(2, 3, 5\)"):
        check_kv_scales(payload, payload, scale, scale[:, :, :4])
    with pytest.raises(ValueError, match="needs key_scale"):
        check_kv_scales(payload, payload, None, None)
    with pytest.raises(ValueError, match="quantised alike"):
        check_kv_scales(payload, payload.to(torch.float8_e4m3fn), scale, scale)
