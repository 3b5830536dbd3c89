"""Stage-1 checkpoints: the indexers' weights in one safetensors file, and which heads they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..modeling.checkpoint_rtpurbo import INDEXER_FILE, load_indexer_file
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM


def save_indexers(model: RTPurboForCausalLM, folder: str | Path, *, step: int) -> Path:
    """Write the indexers of `model` to a folder; the file appears whole or not at all."""
    target = Path(folder) / INDEXER_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.indexer_state_dict().items()}
    heads = json.dumps(model.config.retrieval_heads)
    temporary = target.with_name(f".{target.name}.tmp")
    save_file(weights, temporary, metadata={"format": "pt", "retrieval_heads": heads, "step": str(step)})
    temporary.replace(target)
    return target


def load_indexers(model: RTPurboForCausalLM, folder: str | Path) -> None:
    """Fill the indexers of `model` from what `save_indexers` wrote.

    Raises:
        ValueError: no file, a missing or unexpected key, another shape, or other retrieval heads; names key or head.
    """
    path = Path(folder) / INDEXER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {INDEXER_FILE}: it is not a stage-1 checkpoint")
    load_indexer_file(path, model.indexer_state_dict())
    with safe_open(str(path), framework="pt") as file:
        heads = (file.metadata() or {}).get("retrieval_heads")
    if heads is not None and json.loads(heads) != model.config.retrieval_heads:
        pairs = zip(json.loads(heads), model.config.retrieval_heads, strict=True)
        layer, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(f"{path} was trained for heads {theirs} of layer {layer}, the model has {ours} there")
    model.load_indexers(path)
