"""The stage-1 loss on a GPU, at real sizes, against the fp32 reference."""

import pytest
import torch

from rtpurbo_hf.kernels.indexer_kl import indexer_kl, indexer_kl_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(rows, keys, *, batch=1, head_dim=128, dtype=torch.bfloat16, group=4, heads=(0, 1, 6), index_dim=16):
    generator = torch.Generator("cuda").manual_seed(rows + keys)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    listed = torch.tensor(heads, device="cuda")
    return {
        "query": random(batch, rows, 2 * group, head_dim).to(dtype).transpose(1, 2),
        "key": random(batch, keys, 2, head_dim).to(dtype).transpose(1, 2),
        "index_query": random(batch, len(heads), rows, index_dim),
        "index_key": random(batch, len(heads), keys, index_dim),
        "heads": listed,
        "kv_heads": listed // group,
        "index_heads": torch.arange(len(heads), device="cuda"),
        "q_slots": torch.arange(keys - rows, keys, device="cuda").expand(batch, rows).contiguous(),
        "scale": 1.5 * head_dim**-0.5,
    }


def run(function, arguments, **options):
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("index_query", "index_key")}
    loss = function(**(arguments | leaves), **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))]


def check(arguments, tolerance=1e-3, **options):
    expected, found = run(indexer_kl_reference, arguments), run(indexer_kl, arguments, **options)
    for ours, reference in zip(found, expected, strict=True):
        assert bool(torch.isfinite(ours).all())
        assert float((ours - reference).norm() / reference.norm()) < tolerance
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_all_rows_of_8k(dtype):
    arguments = layer(8192, 8192, dtype=dtype)
    found = check(arguments)
    assert all(map(torch.equal, found, run(indexer_kl, arguments)))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
@pytest.mark.parametrize("index_dim", [6, 16, 64])
def test_sizes(head_dim, index_dim):
    check(layer(1000, 1111, head_dim=head_dim, index_dim=index_dim))


def test_padding_softcap_shared_keys_and_unsorted_rows():
    arguments = layer(511, 2000, batch=3)
    arguments |= {
        "start": torch.tensor([0, 777, 1999], device="cuda"),
        "softcap": 2.0,
        "index_key": arguments["index_key"][:, :2],
        "index_heads": torch.tensor([0, 0, 1], device="cuda"),
        "q_slots": torch.randint(-1, 2000, (3, 511), device="cuda"),
    }
    found = check(arguments)
    assert all(map(torch.equal, found, run(indexer_kl, arguments)))


def test_fp32_when_forced():
    check(layer(300, 333, dtype=torch.float32), tolerance=1e-5, backend="triton")


def test_memory_does_not_grow_with_rows_times_keys():
    def peak(length):
        arguments = layer(length, length)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(indexer_kl, arguments)
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(32_768) < 9 * peak(4096)


def test_nothing_waits_for_the_host():
    arguments = layer(1000, 1000)
    run(indexer_kl, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(indexer_kl, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
