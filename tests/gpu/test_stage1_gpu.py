"""A whole stage-1 step over every row on a GPU: right, repeatable, and without a rows x keys matrix."""

import pytest
import torch

from rtpurbo_hf.benchmarks.training import TOLERANCE, Shape, Stage1Step, loss_error
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.indexer_init import initialise_indexers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = Shape(layers=4, hidden=256, intermediate=512, query_heads=8, kv_heads=2, head_dim=128, vocabulary=997)


def wrapped(**options):
    heads = SHAPE.retrieval_heads(0.4)
    model = RTPurboForCausalLM.from_base(SHAPE.base(), retrieval_heads=heads, **options)
    initialise_indexers(model, method="random")
    return model


def document(length):
    return torch.randint(997, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("sharing", ["head", "kv_head"])
@pytest.mark.parametrize("length", [8192, 5001])
def test_loss_and_gradients_on_real_activations(sharing, length):
    assert loss_error(wrapped(index_key_sharing=sharing), document(length)) < TOLERANCE


def test_steps_lower_the_loss_and_repeat(tmp_path):
    runs = []
    for _ in range(2):
        step = Stage1Step(wrapped(), str(tmp_path))
        runs.append([step(document(4096)).item() for _ in range(4)])
    assert runs[0][-1] < runs[0][0]
    assert runs[0] == runs[1]


def test_a_step_holds_no_matrix_of_rows_by_keys(tmp_path):
    step, length = Stage1Step(wrapped(), str(tmp_path)), 32_768
    step(document(1024))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(document(length))
    # a byte for each pair of one head would be more
    assert torch.cuda.max_memory_allocated() - before < length * length
