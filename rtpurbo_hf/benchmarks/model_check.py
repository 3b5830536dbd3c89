"""Whether what `rtpurbo bench model` times is right: a model of two layers of the same shape, against the reference.

Through all layers of a random model rounding grows until it looks like a wrong selection. In two layers it does not:
each check also measures what the logits would be off by if the selection were ignored (`control_error`), and is red
unless that is `CONTRAST` times the error or more.
"""

from __future__ import annotations

from typing import Any

import torch

from ..modeling.cache_rtpurbo import RTPurboCache
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from .harness import checked, relative_error
from .model_plan import selected_share
from .model_planted import PlantedIndex, TwoLevels, planted_cache

LAYERS, LENGTH, ROWS = 2, 12_288, 128
TOLERANCE, CONTRAST = 2e-2, 4.0


def verdict(out: torch.Tensor, expected: torch.Tensor, control: torch.Tensor) -> dict[str, Any]:
    """The entries of a row: green if `out` is near `expected`, and the control at least `CONTRAST` times as far off."""
    error, control_error = relative_error(out, expected), relative_error(control, expected)
    entries = {**checked(error, TOLERANCE), "control_error": control_error}
    if not control_error >= CONTRAST * error:
        entries["check"] = "red"
    return entries


def is_graphed(cache: RTPurboCache, batch: int) -> bool:
    """Whether decode steps of this batch run as a captured CUDA graph."""
    return getattr(cache.graphs.get(batch), "graph", None) is not None


def _ids(model: RTPurboForCausalLM, length: int) -> torch.Tensor:
    generator = torch.Generator(model.device).manual_seed(length)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (1, length), device=model.device, generator=generator)


@torch.no_grad()
def check_decode(model: RTPurboForCausalLM, *, length: int = LENGTH, backend: str = "auto") -> dict[str, Any]:
    """A step's logits against the reference backend's, on a cache whose selection is unambiguous.

    On a GPU the step must have been captured as a graph, or the check is red.
    """
    config = model.config
    cache = planted_cache(model, length, 1)
    levels = TwoLevels(model, cache)
    ids, top_p, before = _ids(model, 1), config.index_top_p, config.attention_backend
    config.index_min_tokens = levels.count

    def again(chosen: str, **options: Any) -> torch.Tensor:
        config.attention_backend = chosen
        if cache.get_seq_length() > length:
            cache.crop(-1)
        return model(input_ids=ids, past_key_values=cache, **options).logits.float()

    try:
        again("reference", observer=levels)
        expected = again("reference")
        config.index_top_p = 1.0
        control = again("reference")
        config.index_top_p = top_p
        again(backend)  # builds the kernels; the next step is captured
        out = again(backend)
        graphed = is_graphed(cache, 1)
    finally:
        config.index_top_p, config.attention_backend, config.index_min_tokens = top_p, before, 0
    entries = {**verdict(out, expected, control), "graphed": graphed, "check_layers": len(model.converted())}
    if model.device.type == "cuda" and not graphed:
        entries["check"] = "red"
    return entries


@torch.no_grad()
def check_prefill(
    model: RTPurboForCausalLM, mode: str, *, length: int = LENGTH, backend: str = "auto"
) -> dict[str, Any]:
    """The last rows' logits of a prefill in a `retrieval_prefill` mode against the reference backend's.

    The control is the other extreme: dense retrieval heads for a sparse mode, no retrieval heads for the dense one.
    """
    config, ids = model.config, _ids(model, length)
    before = config.retrieval_prefill, config.attention_backend

    def run(chosen_mode: str, chosen: str) -> torch.Tensor:
        config.retrieval_prefill, config.attention_backend = chosen_mode, chosen
        cache = model.new_cache()
        return model(input_ids=ids, past_key_values=cache, logits_to_keep=ROWS).logits.float()

    try:
        with PlantedIndex(model, length, selected_share(max(length, 8192))):
            expected = run(mode, "reference")
            out = run(mode, backend)
            if mode == "dense":
                with model.attention_mode("streaming"):
                    control = run(mode, "reference")
            else:
                control = run("dense", "reference")
    finally:
        config.retrieval_prefill, config.attention_backend = before
    return {**verdict(out, expected, control), "check_layers": len(model.converted())}
