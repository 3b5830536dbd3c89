"""A GPU that is not there: tensors without memory, and kernel launches that compile and go no further.

Under `fake_gpu()` the wrappers of `kernels/` run as on a CUDA device, on torch's fake tensors. What they launch is
specialised by its arguments and compiled by Triton down to a cubin, with the LLVM and the ptxas of Triton's wheel, and
described as a `Launch`; nothing is executed. Triton must have been imported without its interpreter.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# by compute capability: bytes of shared memory that one program may use (CUDA programming guide, "technical
# specifications for compute capabilities"), and multiprocessors of the A100, H100 and B200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PROCESSORS = {80: 108, 90: 132, 100: 148}
PACKAGE = "rtpurbo_hf.kernels."


@dataclass(frozen=True)
class Launch:
    """One compiled kernel: what its code depends on, and what it takes of the device.

    kernel: its file and name. registers: of a thread (with warp groups of unequal shares: of a thread at the start).
    spills: bytes that a thread stores for want of registers, and loads again. shared: bytes of a program
    that the launch asks for. layouts: the kernel in Triton's language, with the layout of each tensor.
    """

    kernel: str
    constants: dict[str, Any]
    warps: int
    registers: int
    spills: int
    shared: int
    layouts: str
    ptx: str
    cubin: bytes

    @cached_property
    def declared(self) -> int:
        """Bytes of shared memory that inline assembly declares, on top of `shared`."""
        sizes = re.findall(r"(?<!extern )\.shared\s+\.align\s+\d+\s+\.b(\d+)\s+\w+\[(\d+)\]", self.ptx)
        return sum(int(bits) // 8 * int(count) for bits, count in sizes)

    @cached_property
    def _assembly_layout(self) -> str:
        """The layout of what inline assembly with shared memory gets; empty without any."""
        found = re.search(r'elementwise_inline_asm "\.shared[^\n]*-> tensor<[0-9x]+xi32, (#\w+)>', self.layouts)
        layout = found and re.search(rf"^{found[1]} = .*", self.layouts, re.MULTILINE)
        return layout[0] if layout else ""

    def _of_layout(self, name: str) -> list[int] | None:
        found = re.search(rf"{name} = \[([\d, ]+)\]", self._assembly_layout)
        return [int(number) for number in found[1].split(",")] if found else None

    @property
    def assembly_warps(self) -> list[int] | None:
        """How warps lie over the rows and columns that inline assembly with shared memory gets; None without any."""
        return self._of_layout("warpsPerCTA")

    @property
    def assembly_sizes(self) -> list[int] | None:
        """How many values a thread has there in each direction; None where the layout is a product's."""
        return self._of_layout("sizePerThread")

    @cached_property
    def instructions(self) -> int:
        """SASS instructions of the kernel."""
        disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            listing = subprocess.run([disassembler, "-c", file.name], check=True, capture_output=True, text=True).stdout
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE))


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas reported no {pattern!r}; its output was:\n{log}")
    return int(found[1])


def _describe(name: str, kernel: Any, log: str, constants: dict[str, Any]) -> Launch:
    return Launch(
        kernel=name,
        constants=constants,
        warps=kernel.metadata.num_warps,
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared=kernel.metadata.shared,
        layouts=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        cubin=kernel.asm["cubin"],
    )


class FakeGPU:
    """The device: its capability (80, 90, 100), to be chosen first, and the new kernels of each run.

    It also is what Triton asks of a driver before a launch. The ordinal that Triton sees is the capability: compiled
    kernels are kept by ordinal.
    """

    def __init__(self) -> None:
        self.capability = 0
        self._launches: list[Launch] = []
        self._kernels: list[Any] = []
        self._run = JITFunction.run

    def become(self, capability: int) -> None:
        """A device of another capability; what `kernels/` remembers of the one before is forgotten."""
        self.capability = capability
        for name, module in sys.modules.items():
            if name.startswith(PACKAGE):
                for value in vars(module).values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()

    def launches(self) -> list[Launch]:
        """The kernels compiled since the last call."""
        found, self._launches = self._launches, []
        return found

    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=PROCESSORS[self.capability])

    def compile(self, function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        """In place of `JITFunction.run`."""
        if not all(size > 0 for size in grid):
            raise ValueError(f"{function.__name__} was launched with the grid {grid}")
        log = io.StringIO()
        with redirect_stdout(log):
            kernel = self._run(function, *args, grid=grid, warmup=True, **options)
        if not any(kernel is known for known in self._kernels):
            self._kernels.append(kernel)
            constants = {p.name: options[p.name] for p in function.params if p.is_constexpr and p.name in options}
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            self._launches.append(_describe(name, kernel, log.getvalue(), constants))
        return kernel

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def _address(tensor: torch.Tensor) -> int:
    """An address for kernels to be specialised on, aligned as the allocator's are."""
    return 4096 + tensor.storage_offset() * tensor.element_size()


def _getitem(tensor: torch.Tensor, places: Any) -> torch.Tensor:
    """`tensor[places]` by operators; torch's own asks for a device guard, which builds without CUDA do not have."""
    places = places if isinstance(places, tuple) else (places,)
    if any(place is Ellipsis for place in places):
        at = next(i for i, place in enumerate(places) if place is Ellipsis)
        named = sum(place is not None for place in places) - 1
        places = places[:at] + (slice(None),) * (tensor.dim() - named) + places[at + 1 :]
    indices: list[torch.Tensor | None] = []
    for place in places:
        axis = len(indices)
        if isinstance(place, int):
            tensor = tensor.select(axis, place)
            continue
        if place is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(place, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, axis, place.start, place.stop, place.step or 1)
        indexed = place is not None and not isinstance(place, slice)
        indices.append(torch.as_tensor(place, device=tensor.device) if indexed else None)
    return tensor if all(index is None for index in indices) else torch.ops.aten.index.Tensor(tensor, indices)


def _setitem(tensor: torch.Tensor, places: Any, value: Any) -> None:
    """`tensor[places] = value` as far as shapes go; there is no memory to write to."""
    torch.broadcast_to(torch.as_tensor(value, device=tensor.device), _getitem(tensor, places).shape)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Run CUDA code without a GPU; `kernels/` must be imported inside, for the first time in the process.

    Raises:
        RuntimeError: Triton is in interpreter mode, or `kernels/` was imported before.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would be interpreted: unset it")
    if any(name.startswith(PACKAGE) for name in sys.modules):
        raise RuntimeError("rtpurbo_hf.kernels was imported before fake_gpu(): call it in a process of its own")
    from rtpurbo_hf.kernels import custom_op

    gpu = FakeGPU()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as cache:
        for target, name, replacement in (
            # the dispatcher would run an operator's fake implementation, which launches nothing
            (custom_op, "define_op", lambda name, schema, run: run),
            (torch.cuda, "get_device_capability", lambda device=None: divmod(gpu.capability, 10)),
            (torch.cuda, "get_device_properties", lambda device=None: gpu.properties()),
            (torch.cuda, "device_of", lambda tensor: nullcontext()),
            (FakeTensor, "__getitem__", _getitem),
            (FakeTensor, "__setitem__", _setitem),
            (FakeTensor, "contiguous", _contiguous),
            (FakeTensor, "data_ptr", _address),
            (JITFunction, "run", lambda function, *args, **options: gpu.compile(function, *args, **options)),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        stack.enter_context(knobs.nvidia.scope())
        knobs.nvidia.dump_ptxas_log = True
        driver.set_active(gpu)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield gpu
