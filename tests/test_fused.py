"""Norms and MLPs of base models in fewer passes: which classes are known, and that the model stays the base model."""

import copy
import pickle

import pytest
import torch
from families import FAMILY_OPTIONS, everything_retrieves, padded_batch, tiny_base
from torch import nn

from rtpurbo_hf.kernels.rms_norm import rms_norm_reference
from rtpurbo_hf.modeling import fused_rtpurbo
from rtpurbo_hf.modeling.fused_rtpurbo import fuse, is_gated_silu, is_known_mlp, norm_form, norm_rule
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM

OFFSET = {"gemma", "gemma2", "gemma3_text", "qwen3_5_text", "qwen3_next"}
PLAIN = {"gpt_oss", "olmo2", "olmo3"}
NONE = {"cohere", "cohere2", "gpt_neox", "nemotron", "olmo", "phi", "stablelm", "starcoder2"}


# gated by another activation, or not by `act_fn(gate_proj) * up_proj` of an MLP of its own
OTHER_MLP = {
    "arcee", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "lfm2", "minimax_m2", "mixtral",
    "nemotron", "olmoe", "phi", "phi3", "qwen3_moe", "seed_oss", "starcoder2",
}  # fmt: skip


def wrap(base, **options):
    return RTPurboForCausalLM.from_base(
        base, retrieval_heads=everything_retrieves(base), index_top_p=1.0, sliding_window=4, **options
    )


def norms(model):
    return [module for module in model.modules() if hasattr(module, "rtpurbo_norm")]


@pytest.mark.parametrize("family", sorted(FAMILY_OPTIONS))
def test_which_form_a_family_has(family):
    model = wrap(tiny_base(family))
    found = {module.rtpurbo_norm.form for module in norms(model)}
    expected = {"offset"} if family in OFFSET else {"plain"} if family in PLAIN else {"rounded"}
    assert found == (set() if family in NONE else expected)
    if family == "qwen3":
        assert len(norms(model)) == 4 * model.config.num_hidden_layers + 1
    assert any(hasattr(module, "rtpurbo_mlp") for module in model.modules()) == (family not in OTHER_MLP)


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def count(hidden, weight, eps, *, form):
        calls.append(form)
        return rms_norm_reference(hidden, weight, eps, form=form)

    monkeypatch.setattr(fused_rtpurbo, "rms_norm", count)
    return calls


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "qwen3", "qwen3_next"])
def test_the_model_stays_the_base_model(family):
    """The real kernels, in Triton's interpreter where there is no GPU, in rows and in heads."""
    base = tiny_base(family)
    ids, mask = padded_batch()
    real = mask.bool()
    model = wrap(copy.deepcopy(base), attention_backend="triton")
    with torch.no_grad(), model.attention_mode("dense"):
        expected = base(ids, attention_mask=mask).logits
        got = model(ids, attention_mask=mask).logits
    assert (got - expected)[real].abs().max() < 1e-5 * max(1.0, float(expected[real].abs().max()))


def test_adapters_on_the_parts_of_an_mlp_are_called():
    """Regression guard: the parts of a fused MLP are called as modules, not read as weights."""
    model = wrap(tiny_base("llama"), attention_backend="triton")
    mlp = next(module for module in model.modules() if hasattr(module, "rtpurbo_mlp"))
    hidden, called = torch.randn(1, 2, mlp.gate_proj.in_features), []
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, name).register_forward_hook(lambda *args, name=name: called.append(name))
    with torch.no_grad():
        got = mlp(hidden)
        assert called == ["gate_proj", "up_proj", "down_proj"]
        torch.testing.assert_close(got, type(mlp).forward(mlp, hidden))
    mlp(hidden).sum().backward()
    assert mlp.gate_proj.weight.grad is not None


def test_the_reference_backend_and_gradients_keep_the_base_code(counted):
    model = wrap(tiny_base("qwen3"), attention_backend="triton")
    module = norms(model)[0]
    hidden = torch.randn(2, 3, module.weight.shape[0])
    with torch.no_grad():
        module(hidden)
        assert counted == ["rounded"]
        model.config.attention_backend = "reference"
        module(hidden)
        model.config.attention_backend = "triton"
        module(hidden.half())
    module(hidden).sum().backward()
    assert module.weight.grad is not None
    assert counted == ["rounded"]


def test_a_copy_normalises_with_its_own_weights(counted):
    model = wrap(tiny_base("llama"), attention_backend="triton")
    twin = copy.deepcopy(model)
    module, other = norms(model)[0], norms(twin)[0]
    hidden = torch.randn(1, 2, module.weight.shape[0])
    with torch.no_grad():
        other.weight.zero_()
        assert module(hidden).abs().max() > 0.1
        assert other(hidden).abs().max() == 0
        again = pickle.loads(pickle.dumps(other))
        assert again(hidden).abs().max() == 0
    assert len(counted) >= 2


class _Shifted(nn.Module):
    """Nearly an RMSNorm."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden):
        return rms_norm_reference(hidden, self.weight, self.eps, form="plain") + self.shift(hidden)

    def shift(self, hidden):
        return 2**-7 * hidden


class _Same(_Shifted):
    def shift(self, hidden):
        return 0.0


class _TwoArguments(_Same):
    def forward(self, hidden, gate=None):
        return super().forward(hidden)


def test_trying_draws_no_global_random_numbers():
    """Regression: the first model of a process got other random weights than the second."""
    base = tiny_base("llama")
    for cached in (norm_form, is_gated_silu):
        cached.cache_clear()
    before = torch.get_rng_state()
    fuse(base, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(norms(base)) == 2 * base.config.num_hidden_layers + 1


def test_nearly_is_not_enough():
    assert norm_form(_Same, 1e-6) == "plain"
    assert norm_form(_Shifted, 1e-6) is None
    assert norm_form(_TwoArguments, 1e-6) is None
    assert norm_rule(_Same(8), None).eps == 1e-6
    for module in (_Same(8, eps=None), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4)):
        assert norm_rule(module, None) is None
    buffered = _Same(8)
    buffered.register_buffer("offset", torch.zeros(8))
    assert norm_rule(buffered, None) is None


class _Swapped(nn.Module):
    """Nearly a gated MLP."""

    def __init__(self, act):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = act

    def forward(self, hidden):
        return self.down_proj(self.gate_proj(hidden) * self.act_fn(self.up_proj(hidden)))


class _Right(_Swapped):
    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def test_which_mlps_are_known():
    assert is_gated_silu(_Right)
    assert is_known_mlp(_Right(nn.SiLU()))
    assert not is_known_mlp(_Right(nn.GELU()))
    assert not is_known_mlp(_Swapped(nn.SiLU()))
    extended = _Right(nn.SiLU())
    extended.dropout = nn.Dropout(0.1)
    assert not is_known_mlp(extended)
    assert not is_known_mlp(nn.Linear(4, 4))
