"""One decode step as a CUDA graph: the whole model's launches replayed without the host.

The graph belongs to a static cache, whose tensors it reads and writes in place; the cache's length lives on the device
and is advanced by the graph itself. What cannot be captured runs as before, and says so once.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .families_rtpurbo import CACHE_ARGUMENT

logger = logging.get_logger(__name__)


class DecodeGraph:
    """A step of `[B, 1]` tokens on one static cache, captured once and replayed."""

    def __init__(self, model, cache, batch: int):
        self.cache = cache
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None

    def capture(self, model) -> bool:
        """Record the launches of a step; False, after a warning, if something in the model cannot be captured."""
        length = self.cache.get_seq_length()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits = model.attend(self.ids, position_ids=self.positions, cache=self.cache).logits
        except RuntimeError as error:
            logger.warning_once(
                f"this model's decode step cannot be captured as a CUDA graph, it runs eagerly: {error}"
            )
            return False
        finally:
            self.cache.set_length(length)  # recording counted a token that nothing has written yet
        self.graph = graph
        return True

    def step(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> CausalLMOutputWithPast:
        """Replay: the next token's logits `[B, 1, vocabulary]`.

        Raises:
            RuntimeError: nothing was captured.
        """
        if self.graph is None or self.logits is None:
            raise RuntimeError("this graph was not captured: call capture() first, and step() only if it returns True")
        self.ids.copy_(input_ids)
        if position_ids is None:
            self.positions.fill_(self.cache.get_seq_length())
        else:
            self.positions.copy_(position_ids.expand_as(self.positions))
        self.cache.before_replay(1)
        self.graph.replay()
        return CausalLMOutputWithPast(logits=self.logits.clone(), **{CACHE_ARGUMENT: self.cache})


def graph_for(model, cache, input_ids: torch.Tensor | None) -> DecodeGraph | None:
    """The graph for this step, or None when the step has to run as it is."""
    if input_ids is None or not input_ids.is_cuda or input_ids.shape[1] != 1 or torch.is_grad_enabled():
        return None
    length = cache.get_seq_length()
    if length == 0 or cache.in_prefill or cache.right_padded or length + 1 > cache.max_length:
        return None
    if length + 1 < model.config.dense_below:
        return None
    if model.config.index_top_p >= 1.0 or model.config.attention_backend == "reference":
        return None
    batch = input_ids.shape[0]
    if batch not in cache.graphs:
        # this step runs eagerly, which builds every kernel; the next one is captured
        cache.graphs[batch] = DecodeGraph(model, cache, batch)
        return None
    held = cache.graphs[batch]
    if held is not None and held.graph is None and not held.capture(model):
        cache.graphs[batch] = held = None
    return held
