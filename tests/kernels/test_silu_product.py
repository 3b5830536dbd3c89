"""The gated MLP's product in one pass: the kernel (through the interpreter without a GPU) against two operations."""

import pytest
import torch

from rtpurbo_hf.kernels.silu_product import TILE, silu_product, silu_product_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [(1,), (3, 63, 7), (2, TILE - 1), (5, TILE)])
def test_same_as_two_operations(shape, dtype, tolerance):
    torch.manual_seed(0)
    gate, up = (10 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    got = silu_product(gate, up)
    assert got.dtype == dtype
    torch.testing.assert_close(got, silu_product_reference(gate, up), rtol=tolerance, atol=1e-6)


def test_the_ends_of_the_activation():
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    torch.testing.assert_close(silu_product(gate, torch.ones(5)), silu_product_reference(gate, torch.ones(5)))


def test_apart_in_memory_and_nothing_at_all():
    gate, up = torch.randn(6, 10)[:, ::2], torch.randn(5, 6).T
    torch.testing.assert_close(silu_product(gate, up), silu_product_reference(gate, up))
    assert silu_product(gate[:0], up[:0]).shape == (0, 5)


@pytest.mark.parametrize("up", [torch.zeros(2, 3), torch.zeros(3, 2).half()])
def test_both_must_be_alike(up):
    with pytest.raises(ValueError, match="of one shape and dtype"):
        silu_product(torch.zeros(3, 2), up)
