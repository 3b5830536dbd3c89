"""Stage 2 on a GPU: gradients of the library paths in bf16, memory linear in the length, a step that learns."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtpurbo_hf.kernels.dense import dense_attention
from rtpurbo_hf.kernels.sink_window import sink_window_attention
from rtpurbo_hf.modeling.modeling_rtpurbo import RTPurboForCausalLM
from rtpurbo_hf.training.distillation import SelfDistillationArguments, SelfDistillationTrainer
from rtpurbo_hf.training.indexer_init import initialise_indexers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("what", ["sink_window", "dense"])
def test_gradients_in_bf16_equal_the_reference(what):
    generator = torch.Generator("cuda").manual_seed(0)
    length, heads, kv_heads = 1500, (0, 2, 3, 5), (0, 0, 1, 1)
    query = torch.randn(2, 6, length, 64, device="cuda", generator=generator)
    key, value = (torch.randn(2, 2, length, 64, device="cuda", generator=generator) for _ in range(2))
    weight = torch.randn(2, length, 6, 64, device="cuda", generator=generator)
    results = []
    for dtype, backend in ((torch.bfloat16, "auto"), (torch.float32, "reference")):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (query, key, value)]
        options = {"heads": heads, "kv_heads": kv_heads, "scale": 0.125, "backend": backend}
        out = torch.zeros(2, length, 6, 64, device="cuda", dtype=dtype)
        if what == "dense":
            out = dense_attention(*inputs, out=out, **options)
        else:
            out = sink_window_attention(*inputs, out=out, window=300, num_sinks=4, **options)
        (out.float() * weight).sum().backward()
        results.append([out.detach().float(), *(x.grad.float() for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).norm() / reference.norm() < 0.02


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 20,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda").eval()
    heads = [[0, 5], [], [4, 5], [7]]
    model = RTPurboForCausalLM.from_base(base, retrieval_heads=heads, sliding_window=512, index_top_p=0.5)
    initialise_indexers(model, method="random")
    return model


def items(count, length, rows=300):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 512, (length,), generator=generator),
            "label_rows": torch.arange(length - 1 - rows, length - 1),
            "teacher_ids": torch.randint(0, 512, (rows, 10), generator=generator),
            "teacher_logits": torch.randn(rows, 10, generator=generator),
            "block": torch.tensor(i),
        }
        for i in range(count)
    ]


def peak_gib(length, folder):
    model = small_model()
    args = SelfDistillationArguments(output_dir=str(folder), max_steps=2, bf16=True, save_strategy="no")
    args.gradient_accumulation_steps = 1
    trainer = SelfDistillationTrainer(model, args, items(2, length))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return torch.cuda.max_memory_allocated() / 2**30


def test_memory_is_linear_in_the_length(tmp_path):
    """At 32K the score matrix of one head alone is 2 GiB in bf16."""
    short, long = peak_gib(8192, tmp_path), peak_gib(32768, tmp_path)
    assert long < 5 * short
    assert long < 6


def test_training_lowers_the_loss(tmp_path):
    args = SelfDistillationArguments(
        output_dir=str(tmp_path), max_steps=20, learning_rate=1e-3, bf16=True, save_strategy="no", logging_steps=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = SelfDistillationTrainer(small_model(), args, items(2, 2048))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
