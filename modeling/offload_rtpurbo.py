"""Weights that accelerate keeps aside (on disk, or on the CPU) and brings in for a module's forward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def _hooks(module: nn.Module) -> Iterator[object]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def execution_device(model: nn.Module) -> torch.device | None:
    """The device that accelerate runs the first of its modules on; None without any."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def bring_back(module: nn.Module, *, empty: bool = False) -> None:
    """Take a small module out of the offloading: its weights go to where it runs, and stay there.

    Indexers are a few thousand weights a head, and their keys and queries are asked for outside a forward. With
    `empty`, the weights are left to be filled.
    """
    offloaded = {name: value for name, value in module.named_parameters(recurse=False) if value.is_meta}
    if not offloaded:
        return
    device = execution_device(module)
    maps = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    aside = next((weights for weights in maps if weights is not None), None)
    if device is None or aside is None:
        raise ValueError(f"{type(module).__name__} has no weights, and accelerate holds none for it")
    values = {
        name: torch.empty_like(value, device=device) if empty else aside[name].to(device)
        for name, value in offloaded.items()
    }
    del module._hf_hook
    if hasattr(module, "_old_forward"):
        module.forward = module._old_forward  # type: ignore[assignment]
        del module._old_forward
    for name, value in values.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=offloaded[name].requires_grad)
