"""Registration of kernels as `torch.library` operations: torch.compile calls them without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

_LIBRARIES: list[torch.library.Library] = []


def define_op(name: str, schema: str, run: Callable[..., None]) -> Any:
    """Register `run` for CPU and CUDA as an operation that mutates arguments and returns nothing; returns it.

    `schema` is the argument list, e.g. `"(Tensor query, Tensor(a!) out) -> ()"`. A process may hold two
    copies of this code (the package and a checkpoint's own): each takes the first namespace free of `name`.
    """
    for number in count():
        namespace = f"rtpurbo_{number}" if number else "rtpurbo"
        if not hasattr(getattr(torch.ops, namespace), name):
            break
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"{namespace}::{name}", lambda *args, **kwargs: None, lib=library)
    _LIBRARIES.append(library)
    return getattr(getattr(torch.ops, namespace), name).default


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to follow an operation on these tensors (the Triton kernels are forward only)."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
