"""The kernels around a prefill's attention at real sizes, bf16, against the operations that they replace."""

import pytest
import torch

from rtpurbo_hf.kernels.index_project import index_project_reference, index_rows
from rtpurbo_hf.kernels.rms_norm import FORMS, rms_norm, rms_norm_reference
from rtpurbo_hf.kernels.rotate import rotate, rotate_reference
from rtpurbo_hf.kernels.silu_product import silu_product, silu_product_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1, 5, 32_771)


def draw(*shape):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2560,), (32, 128)], ids=["rows", "heads"])
@pytest.mark.parametrize("length", LENGTHS)
def test_norm(length, shape, form):
    hidden, weight = draw(1, length, *shape), draw(shape[-1])
    got, expected = rms_norm(hidden, weight, 1e-6, form=form), rms_norm_reference(hidden, weight, 1e-6, form=form)
    assert (got != expected).float().mean() < 1e-4
    # a last bit, or with two roundings one in each
    torch.testing.assert_close(got, expected, rtol=2**-6 if form == "rounded" else 2**-7, atol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_rotation_is_the_bases_bit_for_bit(length):
    query, key = draw(1, length, 32, 128).transpose(1, 2), draw(1, length, 8, 128).transpose(1, 2)
    angle = draw(1, length, 64).float().repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    got = rotate(query, key, cos, sin)
    assert torch.equal(got[0], rotate_reference(query, cos, sin))
    assert torch.equal(got[1], rotate_reference(key, cos, sin))


@pytest.mark.parametrize("length", LENGTHS)
def test_product(length):
    gate, up = 4 * draw(1, length, 1536), draw(1, length, 1536).flip(-1)
    torch.testing.assert_close(silu_product(gate, up), silu_product_reference(gate, up), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rotary_dim", [0, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_index_rows(length, rotary_dim):
    vectors = draw(1, length, 32, 128).transpose(1, 2)
    weight, heads, rotation = draw(5, 16, 128).float() + 2**-12, (1, 2, 5, 12, 20), None
    if rotary_dim:
        angle = draw(1, 1, length, rotary_dim // 2).float()
        rotation = angle.cos(), angle.sin()
    got = index_rows(vectors, weight, heads=heads, rotation=rotation, dtype=torch.float32)
    expected = index_project_reference(vectors, weight, heads=heads, rotation=rotation)
    assert (got - expected).norm() / expected.norm() < 1e-4
