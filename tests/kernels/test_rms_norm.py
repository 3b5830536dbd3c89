"""RMSNorm in one pass: the kernel (through the interpreter without a GPU) against the base models' own operations."""

import pytest
import torch

from rtpurbo_hf.kernels.rms_norm import FORMS, TILE, rms_norm, rms_norm_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 63, 96), (3, 111, 5, 64), (5, TILE + 8)])
def test_same_as_the_operations(shape, form, dtype, tolerance):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(shape)).to(dtype)
    hidden.view(-1, shape[-1])[0] = 1e-3  # a row in which eps counts
    weight = torch.randn(shape[-1]).to(dtype)
    got = rms_norm(hidden, weight, 1e-5, form=form)
    expected = rms_norm_reference(hidden, weight, 1e-5, form=form)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-6)


def test_rows_apart_in_memory_and_none_at_all():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 24)[:, ::2], torch.randn(24)
    got = rms_norm(hidden, weight, 1e-6, form="plain")
    torch.testing.assert_close(got, rms_norm_reference(hidden, weight, 1e-6, form="plain"))
    assert rms_norm(hidden[:0], weight, 1e-6, form="plain").shape == (0, 3, 24)


def test_forms_differ():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).half(), torch.randn(32).half()
    outs = [rms_norm(hidden, weight, 1e-6, form=form) for form in FORMS]
    assert not torch.equal(outs[0], outs[1])
    assert (outs[1] - outs[2]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "layer"}, "form must be one of"),
        ({"weight": torch.zeros(7)}, r"a weight \[8\]"),
        ({"weight": torch.zeros(8).half()}, r"of torch.float32"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": 1e-6, "form": "plain"} | arguments
    with pytest.raises(ValueError, match=message):
        rms_norm(given["hidden"], given["weight"], given["eps"], form=given["form"])
