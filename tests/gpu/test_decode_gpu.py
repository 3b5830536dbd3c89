"""The decode kernels on a GPU: real sizes, int64 addressing, determinism, CUDA graphs, no synchronisation."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from decode_case import Case, relative_error

from rtpurbo_hf.kernels.append import append_step
from rtpurbo_hf.kernels.decode import decode_attention, decode_attention_reference, decode_step
from rtpurbo_hf.kernels.score_select import select_top_p
from rtpurbo_hf.kernels.selection import Selection, select_top_p_reference, selection_mask
from rtpurbo_hf.kernels.workspace import DecodeWorkspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REAL = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "kv_heads": 4,
    "groups": 8,
    "head_dim": 128,
    "retrieval_heads": (1, 2, 5, 12, 20),
    "window": 1024,
    "peak": 0.6,
}
CASES = {
    "32K": {"length": 32768},
    "32K int8": {"length": 32768, "int8": True},
    "three rows, padded": {"length": 5000, "q_len": 3, "batch": 3, "padding": (0, 7, 3000)},
    "16 rows, group of 5": {"length": 3000, "q_len": 16, "groups": 5, "retrieval_heads": (3, 19)},
    "shared index, dim 64": {"length": 4097, "shared_index": True, "head_dim": 64},
    "group of 7, dim 80": {"length": 2000, "groups": 7, "kv_heads": 2, "head_dim": 80, "retrieval_heads": (9,)},
    "dim 96": {"length": 1111, "head_dim": 96, "groups": 3, "retrieval_heads": (0, 1)},
    "dim 256": {"length": 9000, "groups": 2, "head_dim": 256, "retrieval_heads": (1,)},
    "no retrieval heads": {"length": 9000, "retrieval_heads": ()},
    "all retrieval heads": {"length": 2000, "groups": 2, "retrieval_heads": tuple(range(8))},
    "index dim 8": {"length": 7000, "index_dim": 8},
    "index dim 32 int8": {"length": 7000, "index_dim": 32, "int8": True, "peak": 0.4},
    "index dim 64": {"length": 7000, "index_dim": 64, "peak": 0.3},
    "first token": {"length": 1},
    "32K, K/V int8": {"length": 32768, "kv": "int8"},
    "32K, K/V fp8": {"length": 32768, "kv": "fp8"},
    "K/V int8, padded, fp16": {
        "length": 4111,
        "q_len": 3,
        "batch": 2,
        "padding": (0, 700),
        "kv": "int8",
        "dtype": torch.float16,
    },
    "K/V fp8, head_dim 256": {"length": 4111, "groups": 2, "head_dim": 256, "retrieval_heads": (1, 5), "kv": "fp8"},
    "many rows": {"length": 700, "batch": 8, "q_len": 8},
}


def make(**changes) -> Case:
    return Case(**(REAL | changes))


def workspace_for(case: Case, block_size: int = 1) -> DecodeWorkspace:
    return DecodeWorkspace(
        batch=case.batch,
        retrieval_heads=len(case.retrieval_heads),
        queries=case.q_len,
        capacity=case.full_key.shape[2],
        query_heads=case.groups * case.kv_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        block_size=block_size,
        device="cuda",
    )


def run(case: Case, workspace: DecodeWorkspace | None, *, out: torch.Tensor, **changes) -> torch.Tensor:
    before = case.length - case.q_len
    arguments = case.attend_arguments() | case.select_arguments() | {"backend": "triton"} | changes
    key, value, index = case.step_inputs(before, case.length)
    chosen = bool(case.retrieval_heads)
    return decode_step(
        case.query,
        key,
        value,
        case.index_query if chosen else None,
        index if chosen else None,
        *case.stores(),
        **(arguments | {"out": out, "workspace": workspace}),
    )


def expected_of(case: Case, workspace: DecodeWorkspace, *, block_size: int = 1, **changes) -> torch.Tensor:
    """The references on the stores as they stand, with the selection that the step left in its workspace."""
    selection = None
    if case.retrieval_heads:
        shape = (case.batch, len(case.retrieval_heads), case.q_len)
        blocks = -(-case.index_key.shape[2] // block_size)
        rows = shape[0] * shape[1] * shape[2]
        selection = Selection(
            workspace.indices[: rows * blocks].view(*shape, blocks), workspace.counts[:rows].view(shape)
        )
        arguments = case.select_arguments(block_size=block_size)
        exact = select_top_p_reference(case.index_query, case.index_key, **arguments)
        where = {"num_slots": case.length, "block_size": block_size, "q_slots": case.q_slots(), "start": case.start}
        ours, theirs = selection_mask(selection, **where), selection_mask(exact, **where)
        assert (theirs & ~ours).sum() <= 2 * block_size * rows, "the exact set is missing"
        assert (ours.sum(-1) <= 2 * theirs.sum(-1) + 2 * block_size).all()
    arguments = case.attend_arguments(block_size=block_size, **changes)
    arguments["out"] = case.empty_output().float()
    stores = (case.full_key, case.full_value, case.window_key, case.window_value)
    return decode_attention_reference(case.query, *stores, selection, **arguments)


BLOCKS = dict.fromkeys(CASES, 1) | {"32K int8": 16, "three rows, padded": 64, "index dim 32 int8": 32}


@pytest.mark.parametrize("name", CASES)
def test_step_against_the_references(name: str) -> None:
    case, block_size = make(**CASES[name]), BLOCKS[name]
    if case.length > case.q_len:
        case.fill(until=case.length - case.q_len, step=1024)
    logits = torch.linspace(-1, 1, case.groups * case.kv_heads, device="cuda")
    variants = {"block_size": block_size} | ({"softcap": 20.0, "sink_logits": logits} if block_size > 1 else {})
    workspace = workspace_for(case, block_size)
    out = run(case, workspace, out=case.empty_output(), **variants)
    assert relative_error(out, expected_of(case, workspace, **variants)) < 5e-3


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_append_quantises_as_the_reference_does(kv: str) -> None:
    """Bit for bit, the rounding of the hardware included: prefill and decode write alike."""
    ours, theirs = make(length=3000, kv=kv), make(length=3000, kv=kv)
    ours.fill(append=partial(append_step, backend="triton"), step=1000)
    theirs.fill(step=1000)
    for got, expected in zip(ours.stores(), theirs.stores(), strict=True):
        assert torch.equal(got.float().nan_to_num(55.0), expected.float().nan_to_num(55.0))
    for name, scale in ours.scales().items():
        assert torch.equal(scale.nan_to_num(55.0), theirs.scales()[name].nan_to_num(55.0))


def test_two_runs_are_bitwise_equal() -> None:
    case = make(length=32768)
    case.fill(until=32767, step=1024)
    workspace = workspace_for(case)
    first = run(case, workspace, out=case.empty_output())
    lists = workspace.indices.clone(), workspace.counts.clone()
    for _ in range(5):
        again = run(case, workspace, out=case.empty_output())
        assert torch.equal(first, again)
        assert torch.equal(lists[1], workspace.counts)
        for row in range(5):
            count = int(lists[1][row])
            rows = [part.view(5, -1)[row, :count] for part in (lists[0], workspace.indices)]
            assert torch.equal(*rows)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_graph_replay_with_growing_length_and_without_synchronisation(kv: str | None) -> None:
    case = make(length=3000, capacity=4096, kv=kv)
    case.fill(until=2990, step=1024)
    workspace, out = workspace_for(case), case.empty_output()
    length = torch.tensor([2991], dtype=torch.int32, device="cuda")
    key, value, index = (part.clone() for part in case.step_inputs(2990, 2991))
    arguments = case.attend_arguments() | case.select_arguments() | {"backend": "triton"}
    arguments |= {"out": out, "workspace": workspace, "length": length}

    def step() -> None:
        decode_step(case.query, key, value, case.index_query, index, *case.stores(), **arguments)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for end in range(2991, 3001):
        length.fill_(end)
        for target, source in zip((key, value, index), case.step_inputs(end - 1, end), strict=True):
            target.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        now = make(length=end, capacity=4096, kv=kv)
        for name in ("full_key", "full_value", "index_key", "window_key", "window_value", "query", "index_query"):
            setattr(now, name, getattr(case, name))
        now.key_scale, now.value_scale = case.key_scale, case.value_scale
        assert relative_error(out, expected_of(now, workspace)) < 5e-3, end
    if kv is None:
        assert torch.equal(case.full_key[:, :, 2990:3000], case.key[:, [0, 1, 2], 2990:3000])


def test_offsets_beyond_int32() -> None:
    case = make(length=4096, kv_heads=20, groups=1, retrieval_heads=tuple(range(20)), window=64)
    slots = 1 << 20
    for name in ("full_key", "full_value"):
        store = torch.empty(1, 20, slots, 128, dtype=torch.bfloat16, device="cuda")
        assert store.numel() > 1 << 31
        setattr(case, name, store)
    index = torch.empty(1, 160, slots, 16, dtype=torch.bfloat16, device="cuda")
    assert index.numel() > 1 << 31
    rows = list(range(140, 160))
    index[:, rows, :4096] = case.index_keys
    case.index_key, case.index_heads = index, tuple(rows)
    case.full_key[:, :, :4096], case.full_value[:, :, :4096] = case.key, case.value
    workspace = workspace_for(case)
    arguments = case.select_arguments() | {"backend": "triton", "workspace": workspace}
    selection = select_top_p(case.index_query, index, **arguments)
    stores = (case.full_key, case.full_value, case.window_key, case.window_value)
    arguments = case.attend_arguments()
    out = decode_attention(case.query, *stores, selection, backend="triton", **arguments)
    assert relative_error(out, expected_of(case, workspace)) < 5e-3
