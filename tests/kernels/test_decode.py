"""Decode attention: the references against the whole sequence, the kernel against the reference."""

import pytest
import torch
from decode_case import Case, relative_error

from rtpurbo_hf.kernels.decode import decode_attention, decode_attention_reference, decode_step, launch_attend
from rtpurbo_hf.kernels.kv_quant import dequantize_kv
from rtpurbo_hf.kernels.score_select import NewTokens, select_top_p
from rtpurbo_hf.kernels.selection import Selection, select_top_p_reference
from rtpurbo_hf.kernels.workspace import DecodeWorkspace


def stores(case: Case) -> tuple[torch.Tensor, ...]:
    return case.full_key, case.full_value, case.window_key, case.window_value


def select(case: Case, **changes) -> Selection | None:
    if not case.retrieval_heads:
        return None
    arguments = case.select_arguments(**({"min_tokens": 9} | changes))
    return select_top_p_reference(case.index_query, case.index_key, **arguments)


CASES = {
    "one": {"length": 1},
    "five": {"length": 5, "q_len": 3},
    "63": {"length": 63, "groups": 1, "retrieval_heads": (1,)},
    "111 padded": {"length": 111, "q_len": 3, "batch": 3, "padding": (0, 7, 30), "groups": 3},
    "padding to the end": {"length": 30, "q_len": 3, "batch": 2, "padding": (0, 28)},
    "wrapped often": {"length": 1000, "groups": 4, "retrieval_heads": (0, 2, 3)},
    "16 rows": {"length": 90, "q_len": 16, "groups": 5, "kv_heads": 2, "retrieval_heads": (6, 7)},
    "no retrieval heads": {"length": 150, "groups": 7, "kv_heads": 2, "retrieval_heads": ()},
    "all retrieval heads": {"length": 70, "groups": 3, "kv_heads": 2, "retrieval_heads": (0, 1, 2, 3, 4, 5)},
    "group of 8, dim 96": {"length": 63, "groups": 8, "kv_heads": 2, "head_dim": 96},
    "dim 80": {"length": 40, "head_dim": 80},
    "short ring, no wrap": {"length": 20, "ring": 20, "num_sinks": 2},
    "no sinks": {"length": 77, "num_sinks": 0},
    "window of 1": {"length": 77, "window": 1, "q_len": 3},
    "int8": {"length": 111, "q_len": 3, "batch": 3, "padding": (0, 7, 30), "groups": 3, "kv": "int8"},
    "int8, no ring": {"length": 70, "kv_heads": 2, "retrieval_heads": (0, 3), "head_dim": 96, "kv": "int8"},
    "int8, no retrieval heads": {"length": 33, "retrieval_heads": (), "kv": "int8"},
    "fp8": {"length": 111, "q_len": 3, "batch": 3, "padding": (0, 7, 30), "groups": 3, "kv": "fp8"},
    "fp8, wrapped often": {"length": 1000, "groups": 4, "retrieval_heads": (0, 2, 3), "kv": "fp8"},
}


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_the_prefill_of_the_last_rows(case: dict, block_size: int) -> None:
    case = Case(**case)
    case.fill()
    logits = torch.linspace(-1, 1, case.kv_heads * case.groups)
    variants = {"softcap": 5.0, "sink_logits": logits}
    selection = select(case, block_size=block_size)
    arguments = case.attend_arguments(block_size=block_size, **variants)
    out = decode_attention(case.query, *stores(case), selection, backend="reference", **arguments)
    expected = case.oracle(block_size=block_size, min_tokens=9, **variants)
    real = case.real_rows()
    assert relative_error(out[real], expected[real]) < 1e-5


@pytest.mark.parametrize("variants", [False, True], ids=["plain", "softcap and sink logits"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_is_the_reference(case: dict, variants: bool) -> None:
    case = Case(**case)
    case.fill()
    more = {}
    if variants:
        more = {"softcap": 5.0, "sink_logits": torch.linspace(-1, 1, case.kv_heads * case.groups)}
    selection = select(case, block_size=16 if variants else 1)
    arguments = case.attend_arguments(block_size=16 if variants else 1, **more)
    expected = decode_attention_reference(case.query, *stores(case), selection, **arguments).clone()
    arguments["out"] = case.empty_output()
    out = decode_attention(case.query, *stores(case), selection, backend="triton", **arguments)
    assert relative_error(out, expected) < 1e-5


def test_whole_step_through_the_kernels() -> None:
    case = Case(111, q_len=3, batch=3, padding=(0, 7, 30), peak=2.0)
    case.fill()
    selection = select_top_p(case.index_query, case.index_key, backend="triton", **case.select_arguments(top_p=1.0))
    out = decode_attention(case.query, *stores(case), selection, backend="triton", **case.attend_arguments())
    assert relative_error(out, case.oracle(top_p=1.0)) < 1e-5


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_half_against_fp32(kv: str | None) -> None:
    case = Case(150, dtype=torch.float16, groups=4, head_dim=64, kv=kv)
    case.fill()
    selection = select(case)
    arguments = case.attend_arguments()
    out = decode_attention(case.query, *stores(case), selection, backend="triton", **arguments).clone()
    arguments["out"] = case.empty_output().float()
    expected = decode_attention_reference(case.query, *stores(case), selection, **arguments)
    assert relative_error(out, expected) < 5e-3


def test_workspace_serves_layers_in_turn() -> None:
    workspace = DecodeWorkspace(
        batch=2,
        retrieval_heads=3,
        queries=3,
        capacity=130,
        query_heads=12,
        kv_heads=3,
        head_dim=16,
        block_size=1,
        device="cpu",
    )
    for retrieval_heads in ((1, 2), (0, 5, 9), (), (11,)):
        case = Case(111, q_len=3, batch=2, groups=4, retrieval_heads=retrieval_heads, seed=len(retrieval_heads))
        case.fill()
        selection = None
        if retrieval_heads:
            selection = select_top_p(
                case.index_query,
                case.index_key,
                backend="triton",
                workspace=workspace,
                **case.select_arguments(),
            )
        arguments = case.attend_arguments()
        expected = decode_attention_reference(case.query, *stores(case), selection, **arguments).clone()
        arguments["out"] = case.empty_output()
        out = decode_attention(case.query, *stores(case), selection, backend="triton", workspace=workspace, **arguments)
        assert relative_error(out, expected) < 1e-5, retrieval_heads
    case = Case(20, batch=9)
    with pytest.raises(ValueError, match="the workspace is for"):
        decode_attention(
            case.query,
            *stores(case),
            select(Case(20)),
            backend="triton",
            workspace=workspace,
            **case.attend_arguments(),
        )


def test_bad_input_is_named() -> None:
    case = Case(20)
    case.fill()
    with pytest.raises(ValueError, match="need a selection"):
        decode_attention(case.query, *stores(case), None, **case.attend_arguments())
    arguments = case.attend_arguments(out=case.query)
    with pytest.raises(ValueError, match="out must be"):
        decode_attention(case.query, *stores(case), select(case), **arguments)
    arguments = case.attend_arguments(full_slot=(0, 1))
    with pytest.raises(ValueError, match="query must be"):
        decode_attention(case.query, *stores(case), select(case), **arguments)


STEPS = {
    "plain": {"length": 111, "q_len": 1, "batch": 2, "padding": (30, 0)},
    "three rows": {"length": 64, "q_len": 3, "groups": 3},
    "over two tiles": {"length": 130, "q_len": 16, "shared_index": True},
    "more rows than a launch takes": {"length": 70, "q_len": 18, "kv_heads": 2, "retrieval_heads": (1,)},
    "int8": {"length": 90, "q_len": 2, "int8": True},
    "no retrieval heads": {"length": 50, "retrieval_heads": ()},
    "first token": {"length": 1},
    "K/V int8": {"length": 111, "q_len": 3, "batch": 2, "padding": (30, 0), "kv": "int8"},
}


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_decode_step_is_its_three_operations(case: dict, top_p: float) -> None:
    ours, theirs = Case(**case), Case(**case)
    results = []
    for step, backend in ((ours, "triton"), (theirs, "reference")):
        before = step.length - step.q_len
        if before:
            step.fill(until=before, step=before if step.ring else step.q_len)
        arguments = step.attend_arguments() | step.select_arguments(top_p=top_p, min_tokens=step.length // 2)
        inputs = step.step_inputs(before, step.length)
        chosen = bool(step.retrieval_heads)
        results.append(
            decode_step(
                step.query,
                *inputs[:2],
                step.index_query if chosen else None,
                inputs[2] if chosen else None,
                *step.stores(),
                backend=backend,
                **arguments,
            )
        )
    for name, got, expected in zip(
        ("full_key", "full_value", "index_key", "window_key", "window_value", "key_scale", "value_scale"),
        (*ours.stores(), *(scale for scale in ours.scales().values() if scale is not None)),
        (*theirs.stores(), *(scale for scale in theirs.scales().values() if scale is not None)),
        strict=False,
    ):
        assert torch.equal(got.nan_to_num(55.0), expected.nan_to_num(55.0)), name
    if top_p == 1.0 or ours.length == 1:
        assert relative_error(*results) < 1e-5
    elif ours.retrieval_heads:
        local = [h for h in range(ours.kv_heads * ours.groups) if h not in ours.retrieval_heads]
        assert relative_error(results[0][:, :, local], results[1][:, :, local]) < 1e-5
        selection = select_top_p(
            ours.index_query,
            ours.index_key,
            backend="triton",
            **ours.select_arguments(min_tokens=ours.length // 2),
        )
        arguments = ours.attend_arguments()
        expected = decode_attention_reference(ours.query, *stores(ours), selection, **arguments)
        assert relative_error(results[0], expected) < 1e-5


@pytest.mark.parametrize("padding", [None, (30, 0)], ids=["plain", "padded"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_local_heads_read_no_slot_that_is_being_written(q_len: int, padding: tuple[int, ...] | None) -> None:
    """On a GPU they run beside the append: the slots of the step's tokens may hold old tokens, new ones or halves."""
    case = Case(200, q_len=q_len, batch=2, padding=padding, kv_heads=3, groups=2, retrieval_heads=(1, 2))
    before = case.length - q_len
    case.fill(until=before, step=1)
    written = torch.arange(before, case.length)
    case.full_key[:, :, written] = case.full_value[:, :, written] = float("nan")
    for row, begin in enumerate(padding or (0, 0)):
        ring = case.num_sinks + (written - begin - case.num_sinks) % (case.window_key.shape[2] - case.num_sinks)
        case.window_key[row, :, ring] = case.window_value[row, :, ring] = float("nan")
    # lists of early tokens: what a list holds is there once the selection is
    indices = torch.arange(case.length, dtype=torch.int32).expand(2, 2, q_len, -1).contiguous()
    selection = Selection(indices, torch.full((2, 2, q_len), 7, dtype=torch.int32))
    key, value, index_key = case.step_inputs(before, case.length)
    arguments = case.attend_arguments()
    rest = {"softcap": None, "sink_logits": None, "workspace": None}
    new_tokens = NewTokens(key, value, index_key, *stores(case), case.full_slot + case.window_slot, case.num_sinks)
    out = launch_attend(case.query, *stores(case), selection, **arguments, **rest, new_tokens=new_tokens).clone()

    whole = Case(200, q_len=q_len, batch=2, padding=padding, kv_heads=3, groups=2, retrieval_heads=(1, 2))
    whole.fill(step=1)
    expected = decode_attention_reference(whole.query, *stores(whole), selection, **whole.attend_arguments())
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("kv", [None, "int8"])
def test_decode_step_under_torch_compile(kv: str | None) -> None:
    case = Case(60, q_len=2, batch=2, padding=(5, 0), kv=kv)
    workspace = DecodeWorkspace(
        batch=2,
        retrieval_heads=2,
        queries=2,
        capacity=67,
        query_heads=6,
        kv_heads=3,
        head_dim=16,
        block_size=1,
        device="cpu",
    )
    case.fill(until=58, step=2)
    inputs = case.step_inputs(58, 60)
    arguments = case.attend_arguments() | case.select_arguments()
    arguments |= {"backend": "reference", "workspace": workspace}

    def step(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        given = (query * 1.0, *inputs[:2], case.index_query, inputs[2], *case.stores())
        return decode_step(*given, **(arguments | {"out": out})) + 0.0

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(case.query, case.empty_output())
    written = case.full_key[:, :, 58:60]
    if case.key_scale is not None:
        written = dequantize_kv(written, case.key_scale[:, :, 58:60], torch.float32)
    assert torch.equal(written, case.as_stored(case.key)[:, [0, 1], 58:60])
    expected = case.oracle()
    real = case.real_rows()
    assert relative_error(compiled[real], expected[real]) < 1e-5
