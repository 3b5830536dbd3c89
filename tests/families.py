"""Tiny random base models of every supported family."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILY_OPTIONS: dict[str, dict] = {
    "arcee": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "ernie4_5": {},
    "exaone4": _SLIDING,
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
    "granite": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    "ministral": {"head_dim": 16, **_SLIDING},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": {"head_dim": 16, **_LINEAR},
    "qwen3_moe": {**_MOE, "head_dim": 16},
    "qwen3_next": {
        **_MOE,
        "head_dim": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
        **_LINEAR,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}


def tiny_base(family: str = "llama", *, seed: int = 0, **options) -> PreTrainedModel:
    """A tiny random model in eval mode, eager attention; norm weights, sinks and biases are random too."""
    settings = {**_SMALL, **FAMILY_OPTIONS.get(family, {}), **options}
    config = AutoConfig.for_model(family, **settings)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.uniform_(0.3, 1.7, generator=generator)
    base.generation_config.pad_token_id = 0
    return base


def everything_retrieves(base: PreTrainedModel) -> list[list[int]]:
    """All query heads of all full-attention layers."""
    from rtpurbo_hf.modeling.families_rtpurbo import full_attention_modules

    layers = {m.layer_idx for m in full_attention_modules(base)}
    text = base.config.get_text_config(decoder=True)
    heads = list(range(text.num_attention_heads))
    return [heads if i in layers else [] for i in range(text.num_hidden_layers)]


def padded_batch(lengths: tuple[int, ...] = (7, 11), *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded random ids `[B, max]` and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return ids, mask


def allocated_bytes(cache) -> int:
    """Bytes of the memory behind a cache's tensors, each allocation counted once."""
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(held.values())
