"""Index projections of a decode step and of many tokens: the kernels against the indexer's products."""

import pytest
import torch

from rtpurbo_hf.kernels.index_project import TOKENS, index_project, index_project_reference, index_rows
from rtpurbo_hf.modeling.indexer_rtpurbo import RTPurboIndexer
from rtpurbo_hf.modeling.plan_rtpurbo import HeadPlan


def case(*, rotary_dim: int, sharing: str = "head", index_dim: int = 16, head_dim: int = 24):
    torch.manual_seed(0)
    plan = HeadPlan(8, 4, (1, 2, 5, 7), True, sharing)
    indexer = RTPurboIndexer(plan, head_dim, index_dim, rotary_dim, (8.0, 1024.0))
    for weight in (indexer.q_proj, indexer.k_proj):
        torch.nn.init.normal_(weight)
    query, key = torch.randn(2, 3, 8, head_dim).transpose(1, 2), torch.randn(2, 4, 3, head_dim)
    positions = torch.tensor([[5, 6, 7], [100, 101, 102]])
    return indexer, query, key, positions


# the interpreter cuts bf16 off instead of rounding it: one unit in the last place
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"rotary_dim": 0},
        {"rotary_dim": 4},
        {"rotary_dim": 12, "index_dim": 12},
        {"rotary_dim": 8, "sharing": "kv_head"},
    ],
    ids=["content", "rotated", "all rotated", "shared keys"],
)
@torch.no_grad()
def test_same_as_the_indexer(options, backend, dtype, tolerance):
    indexer, query, key, positions = case(**options)
    queries, keys = index_project(
        query, key, indexer.q_proj, indexer.k_proj, heads=indexer.plan.retrieval, kv_heads=indexer.plan.index_key_kv,
        rotation=indexer.rotation(positions), dtype=dtype, backend=backend,
    )  # fmt: skip
    assert queries.dtype == keys.dtype == dtype
    for got, expected in (
        (queries, indexer.queries(query, positions)),
        (keys, indexer.keys(key, positions)),
    ):
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=1e-5)


# the interpreter takes the bits of bf16 operands of a dot for integers: fp16 stands for half precision
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("index_dim", [7, 16, 20])
@pytest.mark.parametrize("rotary_dim", [0, 6])
@pytest.mark.parametrize("q_len", [1, 63, TOKENS, 2 * TOKENS + 3])
@torch.no_grad()
def test_many_rows_are_the_products(dtype, tolerance, index_dim, rotary_dim, q_len):
    torch.manual_seed(q_len)
    vectors = torch.randn(2, q_len, 5, 24, dtype=dtype).transpose(1, 2)
    weight, heads = torch.randn(3, index_dim, 24), (4, 0, 2)
    rotation = None
    if rotary_dim:
        angle = torch.randn(2, 1, q_len, rotary_dim // 2)
        rotation = angle.cos(), angle.sin()
    got = index_rows(vectors, weight, heads=heads, rotation=rotation, dtype=dtype, backend="triton")
    expected = index_project_reference(vectors, weight, heads=heads, rotation=rotation)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=1e-5)


def test_many_rows_have_gradients():
    vectors, weight = torch.randn(1, 2, 5, 8), torch.randn(1, 4, 8, requires_grad=True)
    index_rows(vectors, weight, heads=(1,), rotation=None, dtype=torch.float32, backend="triton").sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, 0], vectors[0, 1].sum(0))


def test_many_rows_check_the_weight():
    with pytest.raises(ValueError, match=r"weight must be \[2, r, 8\]"):
        index_rows(torch.zeros(1, 2, 5, 8), torch.zeros(1, 4, 8), heads=(0, 1), rotation=None, dtype=torch.float16)


def test_weights_must_fit():
    indexer, query, key, _ = case(rotary_dim=0)
    with pytest.raises(ValueError, match=r"query_weight must be \[2, r, 24\]"):
        index_project(
            query, key, indexer.q_proj, indexer.k_proj, heads=(1, 2), kv_heads=indexer.plan.index_key_kv, rotation=None,
            dtype=torch.bfloat16,
        )  # fmt: skip
