"""Score + select: the reference against `top_p_set_reference`, the kernels against what they promise."""

import pytest
import torch
from decode_case import Case

from rtpurbo_hf.kernels.score_select import select_top_p
from rtpurbo_hf.kernels.selection import Selection, select_top_p_reference, selection_mask
from rtpurbo_hf.kernels.top_p import top_p_set_reference
from rtpurbo_hf.kernels.workspace import DecodeWorkspace

# a bin is 1/8 octave wide: the listed mass may be taken for that much less, the rest for that much more
SLACK = 2.0 ** (2 / 8)
# on a GPU in half precision, for which its kernels are
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACE = {"device": DEVICE} | ({"dtype": torch.float16} if DEVICE == "cuda" else {})


def scores_of(case: Case) -> torch.Tensor:
    keys = case.index_key[:, list(case.index_heads), : case.length].float()
    if case.index_scale is not None:
        keys = keys * case.index_scale[:, list(case.index_heads), : case.length, None].float()
    return torch.matmul(case.index_query.float(), keys.transpose(-1, -2))


def valid_of(case: Case) -> torch.Tensor:
    slots = torch.arange(case.length, device=DEVICE)
    first = torch.zeros(case.batch, 1, 1, device=DEVICE) if case.start is None else case.start[:, None, None]
    valid = (slots <= case.q_slots()[:, None]) & (slots >= first)
    return valid[:, None].expand(-1, len(case.retrieval_heads), -1, -1)


def mask_of(case: Case, selection: Selection, block_size: int) -> torch.Tensor:
    where = {"num_slots": case.length, "q_slots": case.q_slots(), "start": case.start}
    return selection_mask(selection, block_size=block_size, **where)


def block_log_masses(case: Case, scores: torch.Tensor, valid: torch.Tensor, block_size: int) -> torch.Tensor:
    """log2 of the softmax mass of the block that each slot belongs to, `[B, n, M, N]`."""
    log_mass = torch.log_softmax(scores.double().masked_fill(~valid, float("-inf")), -1)
    first = torch.zeros(case.batch, 1, device=DEVICE) if case.start is None else case.start[:, None]
    block = ((torch.arange(case.length, device=DEVICE) - first).clamp_min(0) // block_size).long()[:, None, None]
    block = block.expand_as(scores)
    total = torch.zeros_like(log_mass).scatter_add_(-1, block, log_mass.exp().nan_to_num())
    return total.log2().gather(-1, block)


def check_promises(case: Case, selection: Selection, *, top_p: float, min_tokens: int, block_size: int) -> None:
    """Ascending lists that hold the exact set, reach p and the floor, and overshoot within the documented bound."""
    scores, valid = scores_of(case), valid_of(case)
    exact_args = {"block_size": block_size, "start": case.start}
    exact = top_p_set_reference(scores, valid, top_p=top_p, min_tokens=min_tokens, **exact_args)
    mask = mask_of(case, selection, block_size)
    counts = selection.counts
    for row in range(counts.numel()):
        listed = selection.indices.flatten(0, 2)[row, : counts.flatten()[row]]
        assert (listed.diff() > 0).all(), f"row {row} is not ascending: {listed.tolist()}"
    assert not (mask & ~valid).any()
    mass = torch.softmax(scores.masked_fill(~valid, float("-inf")), -1).nan_to_num()
    real = valid.any(-1)
    kept = (mass * mask).sum(-1)
    assert (kept[real] >= top_p - 1e-5).all(), f"kept mass {kept[real].min()} is under {top_p}"
    floor = valid.sum(-1).clamp_max(min_tokens)
    assert (mask.sum(-1) >= floor).all()
    # the exact set of the mass p', with whole bins around its lowest block, is as far as it may go
    wider = SLACK * top_p / (1 - top_p + SLACK * top_p) + 1e-6
    bound = top_p_set_reference(scores, valid, top_p=wider, min_tokens=min_tokens + block_size, **exact_args)
    log_mass = block_log_masses(case, scores, valid, block_size)
    lowest = torch.where(bound, log_mass, float("inf")).amin(-1, keepdim=True)
    assert not (mask & (log_mass < lowest - 1 / 8 - 1e-3)).any(), "more than one bin too many"
    # whatever lies a bin above the exact set's lowest block is in; ties below that may fall either way
    must = torch.where(exact, log_mass, float("inf")).amin(-1, keepdim=True)
    assert not (exact & ~mask & (log_mass > must + 1e-3)).any()


CASES = {
    "one": {"length": 1},
    "five": {"length": 5, "q_len": 3},
    "63": {"length": 63},
    "111 padded": {"length": 111, "q_len": 3, "batch": 3, "padding": (0, 7, 30)},
    "1000": {"length": 1000, "peak": 2.5},
    "16 rows shared": {"length": 150, "q_len": 16, "shared_index": True},
    "int8": {"length": 300, "int8": True, "peak": 2.0},
    "dim 4": {"length": 70, "index_dim": 4},
    "dim 24": {"length": 70, "index_dim": 24},
    "dim 64 int8": {"length": 70, "index_dim": 64, "int8": True, "peak": 0.5},
    "fp16 keys": {"length": 200, "dtype": torch.float16},
}


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_keep_their_promises(case: dict, block_size: int) -> None:
    case = Case(**(PLACE | case))
    case.fill(step=case.length)
    arguments = case.select_arguments(block_size=block_size, min_tokens=6)
    selection = select_top_p(case.index_query, case.index_key, backend="triton", **arguments)
    check_promises(case, selection, top_p=0.9, min_tokens=6, block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_reference_is_the_exact_set(top_p: float, block_size: int) -> None:
    case = Case(111, q_len=3, batch=3, padding=(0, 7, 30), **PLACE)
    case.fill(step=case.length)
    arguments = case.select_arguments(block_size=block_size, top_p=top_p, min_tokens=5)
    selection = select_top_p(case.index_query, case.index_key, backend="reference", **arguments)
    exact = top_p_set_reference(
        scores_of(case),
        valid_of(case),
        top_p=top_p,
        min_tokens=5,
        block_size=block_size,
        start=case.start,
    )
    assert torch.equal(mask_of(case, selection, block_size), exact)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_p_of_one_selects_everything_seen(backend: str) -> None:
    case = Case(83, q_len=3, batch=2, padding=(11, 0), **PLACE)
    case.fill(step=case.length)
    arguments = case.select_arguments(top_p=1.0, block_size=16)
    selection = select_top_p(case.index_query, case.index_key, backend=backend, **arguments)
    assert torch.equal(mask_of(case, selection, 16), valid_of(case))


def planted(case: Case, scores: torch.Tensor) -> None:
    """Index keys and queries whose scores are `scores` `[N]` in every row."""
    case.index_query.zero_()
    case.index_query[..., 0] = 1
    case.index_key.zero_()
    case.index_key[:, :, : case.length, 0] = scores


PLANTED = {
    "uniform": torch.zeros(200),
    "one token has it all": torch.zeros(200).index_fill_(0, torch.tensor([77]), 60.0),
    "ties": torch.arange(200).remainder(3).float(),
    "rising": torch.linspace(-30, 30, 200),
    "falling": torch.linspace(30, -30, 200),
    "far below": torch.cat([torch.full((100,), -3000.0), torch.full((100,), 3000.0)]),
    "past the last step": torch.linspace(100, 400, 200),
}


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("scores", PLANTED.values(), ids=PLANTED)
def test_planted_scores(scores: torch.Tensor, top_p: float) -> None:
    case = Case(200, **PLACE)
    case.fill(step=case.length)
    planted(case, scores)
    arguments = case.select_arguments(top_p=top_p)
    selection = select_top_p(case.index_query, case.index_key, backend="triton", **arguments)
    if scores.max() != 400:
        check_promises(case, selection, top_p=top_p, min_tokens=0, block_size=1)
    else:
        # beyond 1535 steps of 1/8 octave, a score of 133, everything ties and is taken
        assert (selection.counts >= 177).all()
        assert (selection.counts <= 181).all()


@pytest.mark.parametrize("floor", [1, 50, 199, 200, 5000])
def test_floor_below_the_histogram_takes_the_latest(floor: int) -> None:
    case = Case(200, **PLACE)
    case.fill(step=case.length)
    planted(case, PLANTED["one token has it all"])
    arguments = case.select_arguments(min_tokens=floor)
    selection = select_top_p(case.index_query, case.index_key, backend="triton", **arguments)
    wanted = min(floor, 200)
    assert (selection.counts == wanted).all()
    latest = [token for token in range(199, -1, -1) if token != 77][: wanted - 1]
    for row in selection.indices.flatten(0, 2):
        assert row[:wanted].tolist() == sorted([77, *latest])


def test_workspace_is_reused_and_too_small_is_refused() -> None:
    case = Case(63, **PLACE)
    case.fill(step=case.length)
    sizes = {"batch": 1, "retrieval_heads": 2, "queries": 1, "query_heads": 6, "kv_heads": 3, "head_dim": 16}
    workspace = DecodeWorkspace(capacity=70, block_size=1, device=DEVICE, **sizes)
    counts = []
    for _ in range(3):
        selection = select_top_p(
            case.index_query, case.index_key, backend="triton", workspace=workspace, **case.select_arguments()
        )
        assert selection.indices.data_ptr() == workspace.indices.data_ptr()
        counts.append(selection.counts.clone())
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])
    small = DecodeWorkspace(capacity=16, block_size=1, device=DEVICE, **sizes)
    with pytest.raises(ValueError, match="workspace holds"):
        select_top_p(case.index_query, case.index_key, backend="triton", workspace=small, **case.select_arguments())


def test_bad_input_is_named() -> None:
    case = Case(20, **PLACE)
    case.fill(step=20)
    with pytest.raises(ValueError, match="block_size must be"):
        select_top_p(case.index_query, case.index_key, **case.select_arguments(block_size=7))
    with pytest.raises(ValueError, match="index_query must be"):
        select_top_p(case.index_query, case.index_key, **case.select_arguments(index_heads=(0,)))
    with pytest.raises(ValueError, match="index_key must be"):
        select_top_p(case.index_query, case.index_key[..., :8], **case.select_arguments())


def test_reference_reads_int8_keys_with_their_scales() -> None:
    case = Case(120, int8=True, **PLACE)
    case.fill(step=120)
    plain = case.index_key.float() * case.index_scale.float()[..., None]
    arguments = case.select_arguments()
    with_scales = select_top_p_reference(case.index_query, case.index_key, **arguments)
    expected = select_top_p_reference(case.index_query, plain, **(arguments | {"index_scale": None}))
    assert torch.equal(with_scales.counts, expected.counts)
    assert torch.equal(with_scales.indices, expected.indices)
