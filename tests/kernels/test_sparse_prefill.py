"""Block lists and sparse prefill against their fp32 references, in Triton's interpreter where there is no GPU."""

from dataclasses import dataclass

import pytest
import torch

from rtpurbo_hf.kernels import sparse_prefill, sparse_prefill_triton, tile_blocks
from rtpurbo_hf.kernels.common import HAS_TRITON, masked_softmax, soft_cap
from rtpurbo_hf.kernels.dense import dense_attention_reference
from rtpurbo_hf.kernels.sparse_prefill import piece_lists, sparse_prefill_attention
from rtpurbo_hf.kernels.tile_blocks import (
    BLOCK,
    CELLS,
    GROUP,
    MISSED,
    RECENT_BLOCKS,
    TILE,
    tile_blocks_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@dataclass(frozen=True)
class Case:
    """One call: `length` keys, of which the rows from slot `q_start` on are queries."""

    length: int
    group: int = 1
    head_dim: int = 64
    q_start: int = 0
    start: tuple[int, ...] | None = None
    top_p: float = 0.6
    min_tokens: int = 0
    num_sinks: int = 4
    softcap: float | None = None
    logits: bool = False
    shared: bool = False
    index_dim: int = 16
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = [f"n{self.length}", f"g{self.group}", f"d{self.head_dim}", f"p{self.top_p}"]
        parts += [f"from{self.q_start}"] if self.q_start else []
        parts += ["padded"] if self.start else []
        parts += [f"floor{self.min_tokens}"] if self.min_tokens else []
        parts += [f"sinks{self.num_sinks}"] if self.num_sinks != 4 else []
        parts += ["cap"] if self.softcap else []
        parts += ["logits"] if self.logits else []
        parts += ["shared"] if self.shared else []
        parts += [f"r{self.index_dim}"] if self.index_dim != 16 else []
        parts += ["fp16"] if self.dtype == torch.float16 else []
        return "-".join(parts)


CASES = [
    Case(1),
    Case(63, group=3),
    Case(111, group=4, head_dim=80),
    Case(300, group=3),
    Case(900, top_p=0.5),
    Case(900, min_tokens=400),
    Case(900, num_sinks=0, shared=True, group=4),
    Case(650, start=(0, 437), softcap=5.0),
    Case(650, start=(100, 649), num_sinks=70, group=3, top_p=0.3),
    Case(700, q_start=384, logits=True),
    Case(700, q_start=333, start=(0, 290), index_dim=12),
    Case(520, top_p=1.0, start=(0, 70)),
    Case(700, dtype=torch.float16),
]


def inputs(case: Case, seed: int = 0) -> dict:
    """Keyword arguments of the operation; every second head is listed, and `out` is NaN everywhere."""
    torch.manual_seed(seed)
    batch, heads = len(case.start or (0,)), 2 * case.group
    q_len = case.length - case.q_start
    listed = tuple(range(0, heads, 2))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(case.dtype)

    rows = 1 if case.shared else len(listed)
    # spans of alike keys, so that blocks differ in mass
    index_key = random(batch, rows, -(-case.length // BLOCK), case.index_dim).repeat_interleave(BLOCK, 2)
    index_key = index_key[:, :, : case.length] + 0.3 * random(batch, rows, case.length, case.index_dim)
    query = random(batch, q_len, heads, case.head_dim).transpose(1, 2)
    return {
        "query": query,
        "key": random(batch, 2, case.length, case.head_dim),
        "value": random(batch, case.length, 2, case.head_dim).transpose(1, 2),
        "index_query": 0.4 * random(batch, q_len, len(listed), case.index_dim).transpose(1, 2) + 0.4,
        "index_key": index_key,
        "heads": listed,
        "kv_heads": tuple(head // case.group for head in listed),
        "index_heads": (0,) * len(listed) if case.shared else tuple(reversed(range(rows))),
        "top_p": case.top_p,
        "min_tokens": case.min_tokens,
        "num_sinks": case.num_sinks,
        "scale": 1.3 * case.head_dim**-0.5,
        "out": torch.full_like(query.transpose(1, 2).contiguous(), float("nan")),
        "q_start": case.q_start,
        "start": None if case.start is None else torch.tensor(case.start, device=DEVICE),
        "softcap": case.softcap,
        "sink_logits": torch.randn(heads, device=DEVICE) if case.logits else None,
    }


SELECTION = ("index_query", "index_key", "top_p", "min_tokens", "num_sinks", "q_start", "start")


def blocks(arguments: dict) -> torch.Tensor:
    chosen = {name: arguments[name] for name in SELECTION}
    return tile_blocks_reference(index_heads=torch.tensor(arguments["index_heads"], device=DEVICE), **chosen)


def run(arguments: dict, backend: str) -> torch.Tensor:
    """The listed heads of a fresh output; the others must still be NaN."""
    arguments = arguments | {"out": arguments["out"].clone()}
    out = sparse_prefill_attention(**arguments, backend=backend)
    assert out is arguments["out"]
    others = [head for head in range(out.shape[2]) if head not in arguments["heads"]]
    assert torch.isnan(out[:, :, others]).all()
    return out[:, :, list(arguments["heads"])]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_match_reference(case):
    arguments = inputs(case)
    chosen = {name: arguments[name] for name in SELECTION}
    heads = torch.tensor(arguments["index_heads"], device=DEVICE)
    ((_, indices, counts),) = piece_lists(index_heads=heads, fused=True, **chosen)
    expected = blocks(arguments)
    assert torch.equal(counts.long(), expected.sum(-1))
    for place in expected.any(-1).nonzero().tolist():
        count = int(counts[tuple(place)])
        assert indices[tuple(place)][:count].tolist() == expected[tuple(place)].nonzero().flatten().tolist()


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_reference(case):
    arguments = inputs(case)
    tolerance = 1e-5 if case.dtype == torch.float32 and DEVICE == "cpu" else 5e-3
    out, expected = run(arguments, "triton"), run(arguments, "reference")
    assert torch.isfinite(out).all()
    assert relative_error(out, expected) < tolerance
    for row, first in enumerate(case.start or ()):
        assert (out[row, : max(first - case.q_start, 0)] == 0).all()


@pytest.mark.parametrize("length", [700, 768])
def test_the_last_row_keeps_its_own_mass(length):
    """What the last row alone asks for is read, however little its neighbours care."""
    arguments = inputs(Case(length, top_p=0.9))
    wanted = 3 * BLOCK
    arguments["index_key"][..., wanted : wanted + BLOCK, :] = 8.0
    arguments["index_query"][:, :, :-1] = -1.0
    arguments["index_query"][:, :, -1] = 1.0
    assert blocks(arguments)[..., -1, 3].all()
    arguments["index_query"][:, :, -1] = -1.0
    assert not blocks(arguments)[..., -1, 3].any()


def test_lists_hold_the_written_sets():
    """One tile by hand: what is forced, and the smallest set by the mean over some rows of the blocks' shares."""
    case = Case(1500, group=3, top_p=0.55)
    arguments = inputs(case)
    listed = blocks(arguments)
    head, tile = 1, 8
    own = tile * TILE // BLOCK
    expected = {0, *range(own - RECENT_BLOCKS, own + TILE // BLOCK)}
    share = torch.zeros(own + TILE // BLOCK)
    key = arguments["index_key"][0, arguments["index_heads"][head]]
    groups = TILE // GROUP
    for group in range(groups):
        stop = tile * TILE + (group + 1) * GROUP
        size = torch.exp(key[:stop] @ arguments["index_query"][0, head, stop - 1])
        cells = [
            [float(size[j * BLOCK + c : (j + 1) * BLOCK : CELLS].max()) for c in range(CELLS) if j * BLOCK + c < stop]
            for j in range(-(-stop // BLOCK))
        ]
        whole, weight = sum(map(sum, cells)), 2 if group == groups - 1 else 1
        for j, block in enumerate(cells):
            share[j] += weight * sum(block) / whole / (groups + 1)
    assert float(share.sum()) == pytest.approx(1, abs=1e-5)
    held = float(share[list(expected)].sum())
    for j in share.argsort(descending=True).tolist():
        if held >= 1 - MISSED * (1 - case.top_p):
            break
        if j not in expected:
            expected.add(j)
            held += float(share[j])
    assert set(listed[0, head, tile].nonzero().flatten().tolist()) == expected
    assert len(expected) < own


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_everything_is_dense_attention(backend):
    arguments = inputs(Case(333, group=4, top_p=1.0, start=(0, 45)))
    out = run(arguments, backend)
    dense = {
        name: arguments[name] for name in ("query", "key", "value", "scale", "start", "softcap", "sink_logits", "out")
    }
    for name in ("heads", "kv_heads"):
        dense[name] = torch.tensor(arguments[name], device=DEVICE)
    expected = dense_attention_reference(**dense)[:, :, list(arguments["heads"])]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_chunks_on_tile_bounds_equal_one_call(backend):
    arguments = inputs(Case(600, start=(0, 200)))
    whole = run(arguments, backend)
    begin = 0
    for end in (128, 384, 600):
        part = arguments | {"out": arguments["out"][:, begin:end].clone(), "q_start": begin}
        part |= {name: arguments[name][:, :, begin:end] for name in ("query", "index_query")}
        torch.testing.assert_close(run(part, backend), whole[:, begin:end], rtol=1e-5, atol=1e-5)
        begin = end


@needs_triton
def test_small_workspace_changes_nothing(monkeypatch):
    arguments = inputs(Case(700, q_start=70))
    whole = run(arguments, "triton")
    monkeypatch.setattr(sparse_prefill, "WORKSPACE_BYTES", 1)
    assert torch.equal(run(arguments, "triton"), whole)


@needs_triton
@pytest.mark.parametrize("case", [Case(900, top_p=0.3), Case(700, q_start=333, start=(0, 290), head_dim=80)], ids=str)
def test_several_blocks_a_step(monkeypatch, case):
    """One, two and four blocks at a time."""
    arguments = inputs(case)
    expected = run(arguments, "reference")
    for per_step in (1, 2, 4):
        monkeypatch.setattr(sparse_prefill_triton, "STEP_KEYS", per_step * BLOCK)
        assert relative_error(run(arguments, "triton"), expected) < (1e-5 if DEVICE == "cpu" else 5e-3)


@needs_triton
@pytest.mark.parametrize("q_start", [0, 200, 512])
def test_fewer_rows_represent_far_tiles(monkeypatch, q_start):
    """Tiles on either side of the slot, in one call and in several pieces, against calls that see one side only."""
    case = Case(900, top_p=0.5, q_start=q_start, start=(0, 70))
    arguments = inputs(case)
    near, cut = blocks(arguments), 512 // TILE - q_start // TILE
    monkeypatch.setattr(tile_blocks, "GROUP", tile_blocks.FAR_GROUP)
    far = blocks(arguments)
    monkeypatch.undo()
    for module in (tile_blocks, sparse_prefill):
        monkeypatch.setattr(module, "FAR", 512)
    found = blocks(arguments)
    assert torch.equal(found[:, :, :cut], near[:, :, :cut])
    assert torch.equal(found[:, :, cut:], far[:, :, cut:])
    assert not torch.equal(far[:, :, cut:], near[:, :, cut:])
    expected = run(arguments, "reference")
    for size in (1 << 28, 1):
        monkeypatch.setattr(sparse_prefill, "WORKSPACE_BYTES", size)
        assert relative_error(run(arguments, "triton"), expected) < (1e-5 if DEVICE == "cpu" else 5e-3)


@needs_triton
def test_lists_in_chunks_change_nothing(monkeypatch):
    arguments = inputs(Case(900, top_p=0.5))
    whole = run(arguments, "triton")
    monkeypatch.setattr(tile_blocks, "CHUNK", 4)
    assert torch.equal(run(arguments, "triton"), whole)


@needs_triton
def test_keys_after_the_last_query_are_not_read():
    """A preallocated cache holds garbage there; NaN in it must not reach the output."""
    arguments = inputs(Case(500))
    cut = arguments | {name: arguments[name][:, :, :333] for name in ("query", "index_query")}
    cut["out"] = arguments["out"][:, :333]
    expected = run(cut, "triton")
    for name in ("key", "value", "index_key"):
        cut[name] = cut[name].clone()
        cut[name][:, :, 333:] = float("nan")
    assert torch.equal(run(cut, "triton"), expected)


GRADIENT_CASES = [
    Case(63, group=3),
    Case(450, group=3, softcap=3.0, top_p=0.3),
    Case(450, start=(0, 300), logits=True, shared=True, group=4, top_p=0.3),
    Case(600, q_start=333, start=(100, 400), logits=True, softcap=5.0, top_p=0.3),
]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_match_explicit_masks(case, backend):
    """Against autograd through dense attention under the mask that the lists spell out."""
    arguments = inputs(case)
    heads, end = list(arguments["heads"]), case.length
    names = ["query", "key", "value"] + (["sink_logits"] if case.logits else [])
    grad = torch.randn_like(arguments["out"][:, :, heads])
    found = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    base = torch.randn_like(arguments["out"]).requires_grad_()
    out = sparse_prefill_attention(**(arguments | found | {"out": base * 1.0}), backend=backend)
    others = [head for head in range(out.shape[2]) if head not in heads]
    assert torch.equal(out[:, :, others], base[:, :, others])
    (out[:, :, heads] * grad).sum().backward(retain_graph=True)
    assert float(base.grad.abs().sum()) == 0
    out[:, :, others].sum().backward()
    assert (base.grad[:, :, others] == 1).all()
    assert (base.grad[:, :, heads] == 0).all()

    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    q_slots = torch.arange(case.q_start, end, device=DEVICE)
    slots, first = torch.arange(end, device=DEVICE), arguments["start"]
    mask = slots <= q_slots[:, None]
    if first is not None:
        mask = (mask & (slots >= first[:, None, None]))[:, None]
    tiles = q_slots // TILE - case.q_start // TILE
    mask = mask & blocks(arguments)[:, :, tiles].repeat_interleave(BLOCK, -1)[..., :end]
    scores = leaves["query"][:, heads] @ leaves["key"][:, arguments["kv_heads"]].transpose(-1, -2) * arguments["scale"]
    scores = soft_cap(scores, case.softcap)
    weights = masked_softmax(scores, mask, sink_logits=leaves["sink_logits"][heads] if case.logits else None)
    expected = (weights @ leaves["value"][:, arguments["kv_heads"]]).transpose(1, 2)
    torch.testing.assert_close(out[:, :, heads], expected, rtol=1e-4, atol=1e-5)
    (expected * grad).sum().backward()
    for name in names:
        assert float(leaves[name].grad.abs().sum()) > 0
        assert relative_error(found[name].grad, leaves[name].grad) < 1e-5, name


def test_gradients_keep_no_scores():
    """What autograd holds between forward and backward are the inputs, nothing of rows x keys."""
    case = Case(1000, top_p=0.3)
    arguments = inputs(case)
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("query", "key", "value")}
    held = {}

    def pack(tensor):
        held[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = sparse_prefill_attention(**(arguments | leaves | {"out": arguments["out"].clone()}), backend="reference")
    assert max(held.values()) <= max(leaf.numel() for leaf in leaves.values())
    out[:, :, list(arguments["heads"])].sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


@needs_triton
def test_compile_does_not_break_the_graph():
    arguments = inputs(Case(200))
    expected = run(arguments, "triton")
    compiled = torch.compile(lambda **kw: sparse_prefill_attention(**kw) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(**(arguments | {"out": arguments["out"].clone()}), backend="triton")
    torch.testing.assert_close(out[:, :, list(arguments["heads"])], expected * 2)


def test_observer_sees_what_is_kept():
    arguments = inputs(Case(400, top_p=0.3))
    kept = []
    sparse_prefill_attention(
        **arguments,
        on_selection=lambda rows, chosen, valid, weights: kept.append(
            ((weights * chosen).sum(-1), (chosen & ~valid).any())
        ),
    )
    share = torch.cat([entry[0] for entry in kept], -1)
    assert share.shape[-1] == 400
    assert not any(bool(entry[1]) for entry in kept)
    assert float(share.max()) <= 1 + 1e-5
    assert 0 < float(share.min()) < 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"scale": 0.0}, "scale > 0"),
        ({"q_start": 1}, "index_key must hold"),
        ({"index_heads": (0, 1)}, "1 index_heads"),
        ({"index_query": torch.zeros(1, 1, 19, 16)}, r"index_query \[B, n, M, r\]"),
        ({"index_key": torch.zeros(1, 1, 20, 8)}, "index_key must hold"),
        ({"heads": (7,)}, r"heads must be in \[0, 2\)"),
        ({"backend": "cuda"}, "attention_backend must be one of"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_prefill_attention(**(inputs(Case(20)) | change))
