"""The base's RMSNorms and gated MLPs with fewer passes, where their class is known to compute exactly that.

A base's own code makes several passes over its input, most of them in fp32; at 128K tokens they take as long as a good
part of the matrix products. What a class computes is found by trying it: the trial must agree bit for bit. All other
classes, training, torch.compile, fp32 and `attention_backend="reference"` keep to the base's code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..kernels.common import use_triton
from ..kernels.custom_op import needs_grad
from ..kernels.rms_norm import FORMS, MAX_DIM, rms_norm, rms_norm_reference
from ..kernels.silu_product import silu_product
from .families_rtpurbo import UNFIT

_EPSILONS = ("variance_epsilon", "eps")
_MLP_PARTS = ("act_fn", "down_proj", "gate_proj", "up_proj")
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


@dataclass(frozen=True)
class NormRule:
    """How a module normalises, and the config whose `attention_backend` says who computes it."""

    form: str
    eps: float
    config: object


def _empty_module(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


def _takes_one_tensor(cls: type[nn.Module]) -> bool:
    return len(inspect.signature(cls.forward).parameters) == 2


def _try_norm(cls: type[nn.Module], eps: float, dtype: torch.dtype) -> str | None:
    """The form whose result `cls.forward` gives bit for bit on random numbers, or None."""
    generator = torch.Generator("cpu").manual_seed(0)
    module = _empty_module(cls)
    weight = torch.randn(16, generator=generator, device="cpu").to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    for name in _EPSILONS:
        setattr(module, name, eps)
    # rows so small that eps shows, and larger ones
    sizes = torch.tensor([eps**0.5, 1.0, 30.0], device="cpu").repeat(32)[:, None]
    hidden = (torch.randn(96, 16, generator=generator, device="cpu") * sizes).to(dtype)
    try:
        out = cls.forward(module, hidden)
    except UNFIT:
        return None
    if not isinstance(out, torch.Tensor) or out.dtype != dtype:
        return None
    same = (form for form in FORMS if torch.equal(out, rms_norm_reference(hidden, weight, eps, form=form)))
    return next(same, None)


@lru_cache(maxsize=256)
def norm_form(cls: type[nn.Module], eps: float) -> str | None:
    """Which of `FORMS` the class computes with this eps, found by trying; None: none of them."""
    if not _takes_one_tensor(cls):
        return None
    with torch.inference_mode(False), torch.no_grad():
        found = {_try_norm(cls, eps, dtype) for dtype in (torch.bfloat16, torch.float16)}
    return found.pop() if len(found) == 1 else None


def norm_rule(module: nn.Module, config) -> NormRule | None:
    """The rule of an RMSNorm that is known exactly, or None for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.shape[0] > MAX_DIM:
        return None
    if len(module._parameters) > 1 or module._buffers or module._modules:
        return None
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    kind: Any = type(module)
    form = None if eps is None or eps <= 0 else norm_form(kind, eps)
    return None if form is None or eps is None else NormRule(form, eps, config)


@lru_cache(maxsize=256)
def is_gated_silu(cls: type[nn.Module]) -> bool:
    """Whether a class computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, found by trying."""
    if not _takes_one_tensor(cls):
        return False
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        module, act = _empty_module(cls), nn.SiLU()
        sizes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
        weights = {name: torch.randn(size, generator=generator, device="cpu") for name, size in sizes.items()}
        for name, weight in weights.items():
            linear: Any = _empty_module(nn.Linear)  # its constructor would draw from the global generator
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), None
            setattr(module, name, linear)
        module.act_fn = act
        hidden = torch.randn(3, 8, generator=generator, device="cpu")
        gate, up, down = (
            partial(nn.functional.linear, weight=weights[f"{name}_proj"]) for name in ("gate", "up", "down")
        )
        try:
            out = cls.forward(module, hidden)
        except UNFIT:
            return False
        return isinstance(out, torch.Tensor) and torch.equal(out, down(act(gate(hidden)) * up(hidden)))


def is_known_mlp(module: nn.Module) -> bool:
    """Whether a module is an MLP gated by SiLU whose forward is known exactly."""
    if tuple(sorted(module._modules)) != _MLP_PARTS or module._parameters or module._buffers:
        return False
    kind: Any = type(module)
    return type(module.act_fn) in _SILU and is_gated_silu(kind)


def _serves(config, *tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors, which are all of one dtype then."""
    if torch.compiler.is_compiling() or len({tensor.dtype for tensor in tensors}) > 1:
        return False
    return use_triton(config.attention_backend, tensors[0]) and not needs_grad(*tensors)


def _norm_forward(module, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the module's own forward: one launch where the kernel serves, else the base's code."""
    rule: NormRule = module.rtpurbo_norm
    if not _serves(rule.config, hidden_states, module.weight):
        return type(module).forward(module, hidden_states)
    return rms_norm(hidden_states, module.weight, rule.eps, form=rule.form)


def _mlp_forward(module, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the MLP's own forward; its parts are called as ever, so that hooks and adapters on them work."""
    if not _serves(module.rtpurbo_mlp, hidden_states):
        return type(module).forward(module, hidden_states)
    gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    if not _serves(module.rtpurbo_mlp, gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(silu_product(gate, up))


def fuse(model: nn.Module, config) -> None:
    """Let every RMSNorm and gated MLP of `model` that is known exactly run in fewer passes, as `config` says."""
    module: Any
    for module in model.modules():
        rule = norm_rule(module, config)
        if rule is not None:
            module.rtpurbo_norm = rule
            module.forward = partial(_norm_forward, module)
        elif is_known_mlp(module):
            module.rtpurbo_mlp = config
            module.forward = partial(_mlp_forward, module)
