"""The check that a saved model stands on its own: what it accepts is in test_cli.py, here is what it must not."""

import pytest
import torch
from families import everything_retrieves, tiny_base

from rtpurbo_hf.clean_process import CleanProcess
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.indexer_init import initialise_indexers

PROMPT = list(range(5, 30))


@pytest.fixture(scope="module")
def model():
    base = tiny_base("llama")
    wrapped = RTPurboForCausalLM.from_base(base, retrieval_heads=everything_retrieves(base))
    initialise_indexers(wrapped, method="random")
    return wrapped.eval()


def test_another_models_tokens_are_noticed(tmp_path, model):
    model.save_pretrained(tmp_path / "model", adapter_only=False)
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(kept.roll(1, 0))
    with CleanProcess() as clean, pytest.raises(RuntimeError, match=r"\(transformers_modules\) generates other tokens"):
        clean.check(tmp_path / "model", model, PROMPT)
    with torch.no_grad():
        weight.copy_(kept)


def test_a_folder_that_does_not_load_is_told(tmp_path, model):
    with CleanProcess() as clean, pytest.raises(RuntimeError, match=r"does not load in a clean process:\n(.|\n)*Error"):
        clean.check(tmp_path, model, PROMPT)


def test_an_unused_process_ends(model):
    with CleanProcess() as clean:
        process = clean._process
    assert process.returncode is not None
