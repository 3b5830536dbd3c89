"""Compile the kernels of `kernels/` for real GPUs, on a machine without one, and say what each takes of the device.

    python tests/kernels/compile_kernels.py                       the cases of the test
    python tests/kernels/compile_kernels.py --all --output FILE   every case; FILE holds a JSON list

A row a kernel: warps, registers of a thread, bytes that it spills, shared memory of a program, SASS instructions (with
--all), and a hash of the PTX without its debug information: rows before and after a change tell whether it changed
the code on the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# before triton is imported: the kernels are to be compiled
os.environ.pop("TRITON_INTERPRET", None)

import torch
from fake_gpu import SHARED_LIMIT, Launch, fake_gpu

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Geometry:
    """Query heads, KV heads, head_dim, and the retrieval heads."""

    query_heads: int
    kv_heads: int
    head_dim: int
    retrieval: tuple[int, ...]

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(head for head in range(self.query_heads) if head not in self.retrieval)

    def rows(self, heads: tuple[int, ...]) -> tuple[int, ...]:
        """The KV head of each of `heads`."""
        return tuple(head // self.group for head in heads)

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.kv_heads}/{self.head_dim}"


# of `rtpurbo bench kernels`: the paper's and the others', then the head dims and group sizes of further families
PAPER = Geometry(32, 4, 128, (1, 2, 5, 12, 20))
GEOMETRIES = (
    PAPER,
    Geometry(32, 8, 128, (1, 2, 5, 12, 20)),
    Geometry(64, 8, 128, (1, 2, 3, 6, 12, 20, 21, 33, 40, 50)),
    Geometry(8, 4, 256, (1,)),
    Geometry(9, 3, 64, (0, 4)),
    Geometry(32, 32, 80, (3, 9)),
    Geometry(24, 8, 96, (0, 7, 8)),
)
LENGTH, WINDOW, NUM_SINKS, INDEX_DIM = 32_768, 8192, 4, 16


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _prefill(geometry: Geometry, length: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """Query, key and value as projections leave them, and room for the output."""
    heads = geometry.query_heads, geometry.kv_heads, geometry.kv_heads
    query, key, value = (_empty(1, length, n, geometry.head_dim, dtype=dtype).transpose(1, 2) for n in heads)
    return query, key, value, _empty(1, length, geometry.query_heads, geometry.head_dim, dtype=dtype)


def _extras(geometry: Geometry, *, padded: bool, special: bool, batch: int = 1) -> dict[str, Any]:
    """Left padding, and the soft-cap and learned sinks of some families."""
    return {
        "start": _empty(batch, dtype=torch.int64) if padded else None,
        "softcap": 50.0 if special else None,
        "sink_logits": _empty(geometry.query_heads) if special else None,
    }


def local_prefill(
    geometry: Geometry, *, padded: bool = False, special: bool = False, dtype: torch.dtype = BF16, apart: bool = False
) -> None:
    from rtpurbo_hf.kernels.sink_window import sink_window_attention

    query, key, value, out = _prefill(geometry, LENGTH, dtype)
    sinks = key[:, :, :NUM_SINKS].contiguous() if apart else None
    sink_window_attention(
        query,
        key,
        value,
        heads=geometry.local,
        kv_heads=geometry.rows(geometry.local),
        window=WINDOW,
        num_sinks=NUM_SINKS,
        scale=geometry.head_dim**-0.5,
        out=out,
        sink_key=sinks,
        sink_value=sinks,
        backend="triton",
        **_extras(geometry, padded=padded, special=special),
    )


def dense_prefill(geometry: Geometry) -> None:
    from rtpurbo_hf.kernels.dense import dense_attention

    query, key, value, out = _prefill(geometry, LENGTH)
    heads, rows = geometry.retrieval, geometry.rows(geometry.retrieval)
    scale = geometry.head_dim**-0.5
    dense_attention(query, key, value, heads=heads, kv_heads=rows, scale=scale, out=out, backend="triton")


def sparse_prefill(geometry: Geometry, *, padded: bool = False, special: bool = False) -> None:
    from rtpurbo_hf.kernels.sparse_prefill import sparse_prefill_attention

    query, key, value, out = _prefill(geometry, LENGTH)
    count = len(geometry.retrieval)
    sparse_prefill_attention(
        query,
        key,
        value,
        _empty(1, count, LENGTH, INDEX_DIM),
        _empty(1, count, LENGTH, INDEX_DIM),
        heads=geometry.retrieval,
        kv_heads=geometry.rows(geometry.retrieval),
        index_heads=tuple(range(count)),
        top_p=0.9,
        scale=geometry.head_dim**-0.5,
        out=out,
        backend="triton",
        **_extras(geometry, padded=padded, special=special),
    )


def decode(
    geometry: Geometry,
    *,
    queries: int = 1,
    batch: int = 1,
    int8: bool = False,
    block_size: int = 1,
    top_p: float = 0.9,
    padded: bool = False,
    special: bool = False,
    index_dim: int = INDEX_DIM,
) -> None:
    from rtpurbo_hf.kernels.decode import decode_step
    from rtpurbo_hf.kernels.workspace import DecodeWorkspace

    heads, count, dim = geometry.retrieval, len(geometry.retrieval), geometry.head_dim
    full = sorted(set(geometry.rows(heads)))
    ring = [kv for kv in range(geometry.kv_heads) if kv not in full]
    index = _empty(batch, count, LENGTH, index_dim, dtype=torch.int8 if int8 else BF16)
    decode_step(
        _empty(batch, geometry.query_heads, queries, dim),
        _empty(batch, geometry.kv_heads, queries, dim),
        _empty(batch, geometry.kv_heads, queries, dim),
        _empty(batch, count, queries, index_dim),
        _empty(batch, count, queries, index_dim),
        _empty(batch, len(full), LENGTH, dim),
        _empty(batch, len(full), LENGTH, dim),
        index,
        _empty(batch, len(ring), NUM_SINKS + WINDOW, dim),
        _empty(batch, len(ring), NUM_SINKS + WINDOW, dim),
        retrieval_heads=heads,
        index_heads=tuple(range(count)),
        full_slot=tuple(full.index(kv) if kv in full else -1 for kv in range(geometry.kv_heads)),
        window_slot=tuple(ring.index(kv) if kv in ring else -1 for kv in range(geometry.kv_heads)),
        length=_empty(1, dtype=torch.int32),
        top_p=top_p,
        min_tokens=0,
        block_size=block_size,
        window=WINDOW,
        num_sinks=NUM_SINKS,
        scale=dim**-0.5,
        out=_empty(batch, queries, geometry.query_heads, dim),
        index_scale=_empty(batch, count, LENGTH) if int8 else None,
        workspace=DecodeWorkspace(
            batch=batch,
            retrieval_heads=count,
            queries=queries,
            capacity=LENGTH,
            query_heads=geometry.query_heads,
            kv_heads=geometry.kv_heads,
            head_dim=dim,
            block_size=block_size,
            device="cuda",
        ),
        backend="triton",
        **_extras(geometry, padded=padded, special=special, batch=batch),
    )


def step_inputs(geometry: Geometry) -> None:
    """What runs before a decode step's attention: rotation, and the index projections."""
    from rtpurbo_hf.kernels.index_project import index_project
    from rtpurbo_hf.kernels.rotate import rotate

    dim, count = geometry.head_dim, len(geometry.retrieval)
    query, key = _empty(1, geometry.query_heads, 1, dim), _empty(1, geometry.kv_heads, 1, dim)
    rotate(query, key, _empty(1, 1, dim), _empty(1, 1, dim))
    weight = _empty(count, INDEX_DIM, dim, dtype=torch.float32)
    turn = _empty(1, 1, 1, INDEX_DIM // 2, dtype=torch.float32)
    for rotation in (None, (turn, turn)):
        index_project(
            query,
            key,
            weight,
            weight,
            heads=geometry.retrieval,
            kv_heads=geometry.rows(geometry.retrieval),
            rotation=rotation,
            dtype=BF16,
            backend="triton",
        )


def prefill_inputs(geometry: Geometry) -> None:
    """What runs around a prefill's attention: norms, rotation, index projections, and the product in an MLP."""
    from rtpurbo_hf.kernels.index_project import index_rows
    from rtpurbo_hf.kernels.rms_norm import FORMS, rms_norm
    from rtpurbo_hf.kernels.rotate import rotate
    from rtpurbo_hf.kernels.silu_product import silu_product

    dim, heads = geometry.head_dim, geometry.retrieval
    query, key, _, out = _prefill(geometry, LENGTH)
    cos = _empty(1, LENGTH, dim)
    rotate(query, key, cos, cos)
    silu_product(out, out)
    for form in FORMS:
        rms_norm(out.flatten(2), _empty(geometry.query_heads * dim), 1e-6, form=form)
        rms_norm(out, _empty(dim), 1e-6, form=form)
    weight = _empty(len(heads), INDEX_DIM, dim, dtype=torch.float32)
    turn = _empty(1, 1, LENGTH, INDEX_DIM // 2, dtype=torch.float32)
    for rotation in (None, (turn, turn)):
        index_rows(query, weight, heads=heads, rotation=rotation, dtype=BF16, backend="triton")


def stage_one_loss(geometry: Geometry, *, special: bool = False) -> None:
    """Past the wrapper: without a device guard there is no autograd."""
    from rtpurbo_hf.kernels.indexer_kl_triton import SampledRows, indexer_kl_triton

    rows, count = 512, len(geometry.retrieval)
    places = geometry.retrieval, geometry.rows(geometry.retrieval), tuple(range(count))
    sampled = SampledRows(
        *(torch.tensor(heads, device="cuda") for heads in places),
        q_slots=_empty(1, rows, dtype=torch.int64),
        weight=_empty(1, rows, dtype=torch.float32),
        first_slot=_empty(1, dtype=torch.int64),
        scale=geometry.head_dim**-0.5,
        softcap=50.0 if special else None,
    )
    indexer_kl_triton(
        _empty(1, geometry.query_heads, rows, geometry.head_dim),
        _empty(1, geometry.kv_heads, LENGTH, geometry.head_dim),
        _empty(1, count, rows, INDEX_DIM, dtype=torch.float32),
        _empty(1, count, LENGTH, INDEX_DIM, dtype=torch.float32),
        sampled,
        gradient=True,
    )


def window_gradient(geometry: Geometry, *, special: bool = False) -> None:
    from rtpurbo_hf.kernels.window_gradient_triton import window_gradient_triton

    length = 16_384
    query, key, value, out = _prefill(geometry, length)
    extras = _extras(geometry, padded=False, special=special)
    window_gradient_triton(
        out.transpose(1, 2),
        query,
        key,
        value,
        extras.pop("sink_logits"),
        heads=geometry.local,
        kv_heads=geometry.rows(geometry.local),
        window=WINDOW,
        num_sinks=NUM_SINKS,
        scale=geometry.head_dim**-0.5,
        **extras,
    )


@dataclass(frozen=True)
class Case:
    """A call of one public operation; `tested`: the capabilities for which the test compiles it."""

    label: str
    call: Callable[[], None]
    tested: tuple[int, ...] = ()


def cases() -> Iterator[Case]:
    tested: dict[Callable[..., None], tuple[int, ...]] = {
        local_prefill: (80, 90),
        sparse_prefill: (80, 90),
        decode: (90, 100),
        step_inputs: (90,),
        prefill_inputs: (80, 90),
        stage_one_loss: (90,),
        window_gradient: (90,),
    }
    everywhere = (*tested, dense_prefill)
    for geometry in GEOMETRIES:
        for call in everywhere:
            capabilities = tested.get(call, ()) if geometry is PAPER else ()
            yield Case(f"{call.__name__} {geometry}", partial(call, geometry), capabilities)
    for call in (local_prefill, sparse_prefill, decode):
        yield Case(f"{call.__name__} {PAPER} padded", partial(call, PAPER, padded=True))
    for call in (local_prefill, sparse_prefill, decode, stage_one_loss, window_gradient):
        yield Case(f"{call.__name__} {PAPER} softcap", partial(call, PAPER, special=True))
    yield Case(f"local_prefill {PAPER} sinks apart", partial(local_prefill, PAPER, apart=True))
    yield Case(f"local_prefill {PAPER} fp32", partial(local_prefill, PAPER, dtype=torch.float32))
    yield Case(f"decode {PAPER} int8 index", partial(decode, PAPER, int8=True), (90,))
    for index_dim in (4, 8, 32, 64):
        yield Case(f"decode {PAPER} index of {index_dim}", partial(decode, PAPER, index_dim=index_dim))
    yield Case(f"decode {PAPER} all selected", partial(decode, PAPER, top_p=1.0), (90,))
    yield Case(f"decode {PAPER} batch 4", partial(decode, PAPER, batch=4))
    yield Case(f"decode {PAPER} 4 queries", partial(decode, PAPER, queries=4))
    for block_size in (16, 32, 64):
        yield Case(f"decode {PAPER} blocks of {block_size}", partial(decode, PAPER, block_size=block_size))


def _ptx_hash(ptx: str) -> str:
    """Of the instructions: what tells where in the source they come from is left out."""
    code = re.sub(r"^\s*(\.loc|\.file|//|\$L__(tmp|func)).*$|//.*$", "", ptx.split(".section")[0], flags=re.MULTILINE)
    return hashlib.sha256("\n".join(line for line in code.splitlines() if line.strip()).encode()).hexdigest()[:16]


def _row(case: Case, capability: int, launch: Launch, *, disassemble: bool) -> dict[str, Any]:
    return {
        "capability": capability,
        "case": case.label,
        "kernel": launch.kernel,
        "warps": launch.warps,
        "registers": launch.registers,
        "spills": launch.spills,
        "shared": launch.shared,
        "declared": launch.declared,
        "assembly_warps": launch.assembly_warps,
        "assembly_sizes": launch.assembly_sizes,
        "instructions": launch.instructions if disassemble else None,
        "ptx": _ptx_hash(launch.ptx),
    }


def compile_cases(capabilities: tuple[int, ...], *, everything: bool, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each kernel that the cases launch, as it is compiled; what another case compiled is not repeated."""
    with fake_gpu() as gpu:
        for capability in capabilities:
            gpu.become(capability)
            for case in cases():
                if only not in case.label or not (everything or capability in case.tested):
                    continue
                case.call()
                for launch in gpu.launches():
                    yield _row(case, capability, launch, disassemble=everything)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case, not only the test's")
    parser.add_argument("--capability", type=int, action="append", choices=SHARED_LIMIT, help="default: all of them")
    parser.add_argument("--case", default="", help="only cases whose label holds this text")
    parser.add_argument("--output", type=argparse.FileType("w"), help="write the rows here, as JSON")
    options = parser.parse_args()
    rows, began = [], time.process_time()
    for row in compile_cases(tuple(options.capability or SHARED_LIMIT), everything=options.all, only=options.case):
        rows.append(row)
        print(*row.values(), sep="\t", flush=True)
    print(f"{len(rows)} kernels, {time.process_time() - began:.0f} s of this process", file=sys.stderr)
    if options.output:
        json.dump(rows, options.output, indent=1)


if __name__ == "__main__":
    main()
