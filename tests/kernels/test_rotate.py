"""RoPE: the kernel against the base models' own function, and which families it serves."""

import functools

import pytest
import torch
from families import FAMILY_OPTIONS, tiny_base
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rtpurbo_hf.kernels.rotate import TOKENS, rotate, rotate_reference
from rtpurbo_hf.modeling.families_rtpurbo import _rebound, unrotated_forward
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM


@pytest.mark.parametrize("rows", [1, 2])
def test_same_as_llama(rows):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 24).transpose(1, 2), torch.randn(2, 2, 3, 24)
    angle = torch.randn(rows, 3, 12).repeat(1, 1, 2)
    got = rotate(query, key, angle.cos(), angle.sin())
    expected = apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotate_reference(query, angle.cos(), angle.sin()), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("q_len", "dim"), [(1, 64), (63, 96), (111, 80), (2 * TOKENS + 1, 16)])
def test_a_prefill_as_projections_leave_it(q_len, dim, dtype):
    """Bit for bit the base's own rounding, in the layout of the inputs."""
    torch.manual_seed(q_len)
    query, key = (torch.randn(3, q_len, heads, dim, dtype=dtype).transpose(1, 2) for heads in (5, 1))
    angle = torch.randn(1, q_len, dim // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got = rotate(query, key, cos, sin)
    for one, other, given in zip(got, apply_rotary_pos_emb(query, key, cos, sin), (query, key), strict=True):
        assert one.stride() == given.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_tokens_and_odd_heads():
    cos = torch.zeros(1, 0, 16)
    assert rotate(torch.zeros(1, 2, 0, 16), torch.zeros(1, 1, 0, 16), cos, cos)[1].shape == (1, 1, 0, 16)
    cos = torch.zeros(1, 3, 15)
    with pytest.raises(ValueError, match="even number of dimensions"):
        rotate(torch.zeros(1, 2, 3, 15), torch.zeros(1, 1, 3, 15), cos, cos)


def test_cos_must_cover_the_head():
    query, key, cos = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match=r"must be \[1, 1, 16\]"):
        rotate(query, key, cos, cos)


@pytest.mark.parametrize(
    ("family", "halves"), [("llama", True), ("qwen3", True), ("cohere", False), ("glm", False), ("gpt_neox", True)]
)
def test_which_families_swap_halves(family, halves):
    if family not in FAMILY_OPTIONS:
        pytest.skip(f"{family} is not in the table of tiny bases")
    base = tiny_base(family)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0]] * base.config.num_hidden_layers)
    assert {module.rtpurbo.swaps_halves for module in model.converted()} == {halves}


@pytest.mark.parametrize(("family", "skips"), [("llama", True), ("qwen3", True), ("gpt_neox", False), ("glm", False)])
def test_which_families_skip_the_identity(family, skips):
    """q and k from before RoPE come out of the base's forward without a pass over them."""
    base = tiny_base(family)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[0]] * base.config.num_hidden_layers)
    assert {module.rtpurbo.skips_identity for module in model.converted()} == {skips}


@pytest.mark.parametrize("family", sorted(FAMILY_OPTIONS))
def test_which_families_leave_their_rotation_out(family):
    """All but those that slice the rotated dimensions themselves, with transformers' decorators around the forward."""
    base = tiny_base(family)
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=[[]] * base.config.num_hidden_layers)
    left_out = {unrotated_forward(type(module)) is not None for module in model.converted()}
    own = {"forward" in vars(module) for module in model.converted()}
    assert left_out == {True}
    assert own == {family not in ("phi", "stablelm")}


def test_the_rotation_of_the_base_itself_stays():
    base = tiny_base("llama").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = base(ids).logits
        unrotated_forward(type(base.model.layers[0].self_attn))
        assert torch.equal(base(ids).logits, expected)


def _decorated(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return call


def _forgetful(function):
    """A decorator whose inner function cannot be exchanged."""
    held = [function]

    @functools.wraps(function)
    def call(*args, **kwargs):
        return held[0](*args, **kwargs)

    return call


def apply_rotary_pos_emb_stand_in(query, key):
    raise AssertionError("the rotation must not be called")


def _attend(query, *, scale=2):
    query, _ = apply_rotary_pos_emb_stand_in(query, None)
    return query * scale


def test_a_forward_is_copied_with_its_decorators():
    name = "apply_rotary_pos_emb_stand_in"
    made = _rebound(_decorated(_decorated(_attend)), name, lambda query, key: (query, key))
    assert made(3) == 8
    assert made(3, scale=4) == 14
    with pytest.raises(AssertionError, match="must not be called"):
        _attend(3)
    assert _rebound(_forgetful(_attend), name, None) is None
    assert _rebound(_decorated(print), name, None) is None
    assert _rebound(_rows, name, None) is None


def _rows():
    return 1
