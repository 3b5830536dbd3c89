"""The figure of what a model's KV cache takes, against a dense one, by context."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from .info import checkpoint_info

if TYPE_CHECKING:
    from .modeling.configuration_rtpurbo import RTPurboConfig

CONTEXTS = tuple(2**power for power in range(12, 21))


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def memory_figure(config: RTPurboConfig) -> bytes:
    """PNG of the cache's bytes (bf16, batch 1, converted layers) by context, as the cache allocates them, and dense.

    Up to what the model reaches, or 32K.

    Raises:
        ValueError: no retrieval heads are chosen.
    """
    from matplotlib.figure import Figure

    if config.retrieval_heads is None:
        raise ValueError("no retrieval heads are chosen yet: there is no cache to predict")
    longest = max(getattr(config, "max_position_embeddings", None) or CONTEXTS[-1], CONTEXTS[3])
    contexts = [context for context in CONTEXTS if context <= longest]
    facts = [checkpoint_info(config, context=context) for context in contexts]
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, values, style in (
        ("dense", [fact.kv_bytes_dense for fact in facts], "--"),
        ("RTPurbo", [fact.kv_bytes["total"] for fact in facts], "-"),
        ("of that: index", [fact.kv_bytes["index"] for fact in facts], ":"),
    ):
        axes.plot(contexts, [value / 2**20 for value in values], style, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts], fontsize=8)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("KV cache, MiB (bf16, batch 1)")
    last = facts[-1]
    share = f"{last.kv_bytes['total'] / last.kv_bytes_dense:.0%} at {last.context // 1024}K"
    axes.set_title(f"{last.freeable_kv_heads} of {last.kv_heads} KV heads keep a window only; {share}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
