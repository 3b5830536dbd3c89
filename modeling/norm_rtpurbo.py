"""The base's RMSNorms in one pass each, where their class is known to compute exactly that.

A base's own code makes several passes over its input, most of them in fp32; at 128K tokens they take as long as a good
part of the matrix products. Which form of RMSNorm a class computes is found by trying it: the trial must agree bit for
bit. All other classes, training, torch.compile, fp32 and `attention_backend="reference"` keep to the base's code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import nn

from ..kernels.common import use_triton
from ..kernels.custom_op import needs_grad
from ..kernels.rms_norm import FORMS, MAX_DIM, rms_norm, rms_norm_reference

_EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class NormRule:
    """How a module normalises, and the config whose `attention_backend` says who computes it."""

    form: str
    eps: float
    config: object


def _probe(cls: type[nn.Module], eps: float, dtype: torch.dtype) -> bool | str:
    """The form whose result `cls.forward` gives bit for bit on random numbers, or False."""
    generator = torch.Generator("cpu").manual_seed(0)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    weight = torch.randn(16, generator=generator, device="cpu").to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    for name in _EPSILONS:
        setattr(module, name, eps)
    # rows so small that eps shows, and larger ones
    sizes = torch.tensor([eps**0.5, 1.0, 30.0], device="cpu").repeat(32)[:, None]
    hidden = (torch.randn(96, 16, generator=generator, device="cpu") * sizes).to(dtype)
    try:
        out = cls.forward(module, hidden)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(out, torch.Tensor) or out.dtype != dtype:
        return False
    for form in FORMS:
        if torch.equal(out, rms_norm_reference(hidden, weight, eps, form=form)):
            return form
    return False


@lru_cache(maxsize=256)
def norm_form(cls: type[nn.Module], eps: float) -> str | None:
    """Which of `FORMS` the class computes with this eps, found by trying; None: none of them."""
    if len(inspect.signature(cls.forward).parameters) != 2:
        return None
    with torch.inference_mode(False), torch.no_grad():
        found = {_probe(cls, eps, dtype) for dtype in (torch.bfloat16, torch.float16)}
    form = found.pop()
    return form if isinstance(form, str) and not found else None


def norm_rule(module: nn.Module, config) -> NormRule | None:
    """The rule of an RMSNorm that is known exactly, or None for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.shape[0] > MAX_DIM:
        return None
    if len(module._parameters) > 1 or module._buffers or module._modules:
        return None
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    form = None if eps is None or eps <= 0 else norm_form(type(module), eps)
    return None if form is None or eps is None else NormRule(form, eps, config)


def _forward(module, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the module's own forward: one launch where the kernel serves, else the base's code."""
    rule: NormRule = module.rtpurbo_norm
    weight = module.weight
    if (
        hidden_states.dtype != weight.dtype
        or torch.compiler.is_compiling()
        or not use_triton(rule.config.attention_backend, hidden_states)
        or needs_grad(hidden_states, weight)
    ):
        return type(module).forward(module, hidden_states)
    return rms_norm(hidden_states, weight, rule.eps, form=rule.form)


def fuse_norms(model: nn.Module, config) -> int:
    """Let every RMSNorm of `model` that is known exactly run in one pass; returns how many there are."""
    count = 0
    for module in model.modules():
        rule = norm_rule(module, config)
        if rule is not None:
            module.rtpurbo_norm = rule
            module.forward = partial(_forward, module)
            count += 1
    return count
