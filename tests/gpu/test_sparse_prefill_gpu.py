"""Sparse prefill at real sizes on a GPU: lists and outputs against the fp32 references on sampled tiles."""

import math

import pytest
import torch

from rtpurbo_hf.kernels import sparse_prefill, tile_blocks
from rtpurbo_hf.kernels.sparse_prefill import piece_lists, sparse_prefill_attention, sparse_prefill_attention_reference
from rtpurbo_hf.kernels.tile_blocks import BLOCK, TILE, tile_blocks_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, KV_HEADS, INDEX_HEADS = (0, 2, 5), (0, 0, 1), (0, 1, 2)


@pytest.fixture(params=["default", "portable"])
def path(request, monkeypatch):
    """The attention kernel that the device gets by default, and the portable one everywhere."""
    if request.param == "portable":
        monkeypatch.setattr(sparse_prefill, "hopper_fits", lambda *args: False)
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)


def inputs(length: int, *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, batch: int = 1, **options) -> dict:
    """Arguments of the operation; index keys are alike within spans of 96, so that blocks differ in mass."""
    spans = random(batch, 3, -(-length // 96), 16, dtype=dtype, seed=3).repeat_interleave(96, 2)[:, :, :length]
    index_query = random(batch, 3, -(-length // 192), 16, dtype=dtype, seed=4).repeat_interleave(192, 2)[:, :, :length]
    return {
        "query": random(batch, length, 6, head_dim, dtype=dtype).transpose(1, 2),
        "key": random(batch, 2, length, head_dim, dtype=dtype, seed=1),
        "value": random(batch, length, 2, head_dim, dtype=dtype, seed=2).transpose(1, 2),
        "index_query": 0.6 * index_query,
        "index_key": spans + 0.3 * random(batch, 3, length, 16, dtype=dtype, seed=5),
        "top_p": 0.9,
        "min_tokens": 0,
        "num_sinks": 4,
        "scale": head_dim**-0.5,
        "out": torch.full((batch, length, 6, head_dim), math.nan, dtype=dtype, device="cuda"),
        "start": None,
        **options,
    }


def run(arguments: dict, **changes) -> torch.Tensor:
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "index_heads": INDEX_HEADS}
    return sparse_prefill_attention(**(arguments | heads | changes), backend="triton")


def tile_error(out: torch.Tensor, arguments: dict, tile: int) -> float:
    """Worst relative error of a head of any batch row in one tile; rows on padding must be 0 in both."""
    rows = slice(tile * TILE, min((tile + 1) * TILE, out.shape[1]))
    part = arguments | {name: arguments[name][:, :, rows] for name in ("query", "index_query")}
    part["out"] = torch.zeros_like(out[:, rows], dtype=torch.float32)
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "index_heads": INDEX_HEADS}
    heads = {name: torch.tensor(values, device="cuda") for name, values in heads.items()}
    expected = sparse_prefill_attention_reference(**part, **heads, q_start=rows.start)
    found = out[:, rows].float()
    assert torch.isfinite(found[:, :, list(HEADS)]).all()
    worst = 0.0
    for row in range(out.shape[0]):
        for head in HEADS:
            difference = (found[row, :, head] - expected[row, :, head]).norm()
            worst = max(worst, float(difference / expected[row, :, head].norm().clamp_min(1e-6)))
    return worst


def test_lists_at_16k():
    length = 16_384 + 111
    arguments = inputs(length)
    names = ("index_query", "index_key", "top_p", "min_tokens", "num_sinks", "start")
    chosen = {name: arguments[name] for name in names} | {"index_heads": torch.tensor(INDEX_HEADS, device="cuda")}
    ((_, indices, counts),) = piece_lists(**chosen, q_start=0, fused=True)
    expected = tile_blocks_reference(**chosen)
    number = torch.arange(indices.shape[-1], device="cuda")
    listed = number < counts[..., None]
    found = torch.zeros_like(expected, dtype=torch.int32)
    found.scatter_add_(-1, (indices * listed).long(), listed.int())
    assert int(found.max()) == 1
    ascending = (indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]
    assert ascending.all()
    # sums in another order may move a block that lies on the level
    assert float((found.bool() != expected).float().sum() / expected.float().sum()) < 1e-3
    causal = counts.shape[0] * counts.shape[1] * sum((t + 1) * TILE // BLOCK for t in range(counts.shape[2]))
    assert 0.02 < float(counts.sum()) / causal < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_at_16k(head_dim, dtype, path):
    arguments = inputs(16_384 + 111, head_dim=head_dim, dtype=dtype)
    out = run(arguments)
    assert out[:, :, list(HEADS)].isfinite().all()
    assert out[:, :, [1, 3, 4]].isnan().all()
    assert max(tile_error(out, arguments, tile) for tile in (0, 1, 2, 64, 127, 128)) < 5e-3


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("with_logits", [False, True])
def test_variants_with_padding(softcap, with_logits, path):
    start = torch.tensor((0, 777, 2999), device="cuda")
    logits = random(6, dtype=torch.float32, seed=7) if with_logits else None
    arguments = inputs(3000, batch=3, start=start, softcap=softcap, sink_logits=logits, min_tokens=512, top_p=0.5)
    out = run(arguments)
    assert max(tile_error(out, arguments, tile) for tile in (0, 6, 7, 20, 23)) < 5e-3
    for row, slot in enumerate(start.tolist()):
        assert (out[row, :slot][:, list(HEADS)] == 0).all()


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block_sizes(block, monkeypatch):
    """Several blocks are copied to one tile of keys; a chunk that starts inside a tile and ends inside a block."""
    for module in (sparse_prefill, tile_blocks):
        monkeypatch.setattr(module, "BLOCK", block)
    start = torch.tensor((0, 1000), device="cuda")
    arguments = inputs(3001, batch=2, start=start, top_p=0.5, q_start=1111)
    for name in ("query", "index_query", "out"):
        length = 1 if name == "out" else 2
        arguments[name] = arguments[name].narrow(length, 1111, 3001 - 1111)
    found = run(arguments).clone()
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "index_heads": INDEX_HEADS}
    expected = sparse_prefill_attention(**(arguments | heads | {"out": torch.zeros_like(found)}), backend="reference")
    for head in HEADS:
        error = (found[:, :, head].float() - expected[:, :, head].float()).norm()
        assert float(error / expected[:, :, head].float().norm()) < 5e-3


def test_everything_is_dense_attention(path):
    arguments = inputs(5000, top_p=1.0)
    out = run(arguments)
    for head, kv_head in zip(HEADS, KV_HEADS, strict=True):
        q, k, v = (arguments[name][:, [row]] for name, row in (("query", head), ("key", kv_head), ("value", kv_head)))
        expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        assert float((out[:, :, head].float() - expected[:, 0]).norm() / expected.norm()) < 5e-3


def test_chunks_and_pieces_equal_one_call(monkeypatch):
    """Two runs, chunks on tile bounds, and a small workspace: the same bits."""
    arguments = inputs(10_000)
    whole = run(arguments)[:, :, list(HEADS)].clone()
    assert torch.equal(run(arguments)[:, :, list(HEADS)], whole)
    cut = 4096
    part = {name: arguments[name][:, :, cut:] for name in ("query", "index_query")}
    tail = run(arguments, out=torch.empty_like(arguments["out"][:, cut:]), q_start=cut, **part)
    assert (
        float((tail[:, :, list(HEADS)].float() - whole[:, cut:].float()).norm() / whole[:, cut:].float().norm()) < 1e-3
    )
    monkeypatch.setattr(sparse_prefill, "WORKSPACE_BYTES", 1 << 22)
    assert torch.equal(run(arguments)[:, :, list(HEADS)], whole)


def test_long_strided_store(path):
    """Keys in a store longer than the prompt, as a cache holds them, with NaN behind the end."""
    arguments = inputs(33_000)
    for name in ("key", "index_key"):
        store = torch.full((*arguments[name].shape[:2], 40_000, arguments[name].shape[3]), math.nan, device="cuda")
        store = store.to(torch.bfloat16)
        store[:, :, :33_000] = arguments[name]
        arguments[name] = store
    value = torch.full((1, 2, 40_000, 128), math.nan, device="cuda", dtype=torch.bfloat16)
    value[:, :, :33_000] = arguments["value"]
    arguments["value"] = value
    out = run(arguments)
    assert max(tile_error(out, arguments, tile) for tile in (0, 100, 257)) < 5e-3
