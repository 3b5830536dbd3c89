"""What each head loses when it sees sinks and window only, on ordinary text: the second criterion for retrieval heads.

For the sampled rows of a dense forward, with o_h a head's output, o'_h what sinks and window alone give, W_h the head's
part of the layer's output projection, and x the hidden state that the layer adds to:

    damage_h = mean over rows of |W_h (o_h - o'_h)|^2 / |x|^2

A head may look far and change nothing; such heads may as well be local. The needle score cannot tell, because it sees
one kind of looking only. It costs a few rows of attention in a forward that is made anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels.common import soft_cap
from ..modeling.attention_rtpurbo import AttentionInputs
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM

ROWS = 64
_BUDGET = 1 << 24
# what families call the projection of all heads' outputs
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


class WindowDamage:
    """Sums over rows of one document; `add` is called in every converted layer of a dense forward.

    Args:
        model: a wrapped model: its window, sinks and output projections count.
        length: tokens of the document.
        last: rows end here: before the needle's second copy.
        rows: how many rows, evenly spread over those that lie beyond the window.
    """

    def __init__(self, model: RTPurboForCausalLM, length: int, *, last: int, rows: int = ROWS) -> None:
        config = model.config
        self._window, self._sinks, self._length = config.sliding_window, config.num_sink_tokens, length
        first = min(self._window + self._sinks, last)
        self._slots = torch.linspace(first, last - 1, min(rows, last - first)).long()
        attentions = {module.layer_idx: module for module in model.converted()}
        self._projections = {layer: _projection(module) for layer, module in attentions.items()}
        own = {id(module) for module in attentions.values()}
        self._blocks = [m for m in model.modules() if any(id(child) in own for child in m.children())]
        self._stream = torch.zeros(0)
        self._sums: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forwards meanwhile show what the layers add to."""

        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._stream = hidden[0].float().square().sum(-1)

        hooks = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in self._blocks]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def wants(self, first: int, last: int) -> bool:
        """Whether some rows lie in the slots `[first, last)`."""
        return bool(((self._slots >= first) & (self._slots < last)).any())

    def add(self, inputs: AttentionInputs, key: torch.Tensor, value: torch.Tensor) -> None:
        """Rows among the last ones of `key`, `value` `[1, Hkv, N, D]`: those of `inputs.query` `[1, Hq, M, D]`."""
        length, count = key.shape[2], inputs.query.shape[2]
        first = length - count
        slots = self._slots[(self._slots >= first) & (self._slots < length)].to(key.device)
        heads = inputs.query.shape[1]
        step = max(1, _BUDGET // (heads * length))
        for tile in slots.split(step):
            query = inputs.query[0, :, tile - first]
            whole, local = self._outputs(query, key[0], value[0], tile, inputs)
            change = self._projected(inputs.layer_idx, whole - local).square().sum(-1)
            stream = self._stream.to(key.device)[tile - first].clamp_min(torch.finfo(torch.float32).tiny)
            part = (change / stream).sum(1).double().cpu()
            self._sums[inputs.layer_idx] = self._sums.get(inputs.layer_idx, torch.zeros_like(part)) + part

    def _outputs(self, query, key, value, slots, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense and windowed outputs, fp32 `[Hq, R, D]`, of rows `[Hq, R, D]` at `slots` `[R]`."""
        heads, rows, dim = query.shape
        kv_heads, length = key.shape[0], key.shape[1]
        grouped = query.reshape(kv_heads, -1, dim).float() * inputs.scale
        scores = soft_cap(torch.matmul(grouped, key.float().transpose(1, 2)), inputs.softcap)
        scores = scores.view(heads, rows, length)
        columns = torch.arange(length, device=key.device)
        seen = columns <= slots[:, None]
        near = seen & ((slots[:, None] - columns < self._window) | (columns < self._sinks))
        outputs = []
        for mask in (seen, near):
            kept = scores.masked_fill(~mask, float("-inf"))
            total = kept.logsumexp(-1, keepdim=True)
            if inputs.sink_logits is not None:
                total = torch.logaddexp(total, inputs.sink_logits.float()[:, None, None])
            weights = torch.exp(kept - total).view(kv_heads, -1, length)
            outputs.append(torch.matmul(weights, value.float()).view(heads, rows, -1))
        return outputs[0], outputs[1]

    def _projected(self, layer: int, change: torch.Tensor) -> torch.Tensor:
        """What changes `[Hq, R, D]` of heads' outputs do to the layer's, `[Hq, R, hidden]`."""
        weight = self._projections[layer]
        if weight is None:
            return change
        heads, _, dim = change.shape
        # [Hq, D, hidden]
        parts = weight.float().view(-1, heads, dim).permute(1, 2, 0)
        return torch.matmul(change, parts)

    def by_layer(self) -> dict[int, list[float]]:
        """Damage of each head, by layer index; empty if the document is no longer than the window."""
        return {layer: (total / len(self._slots)).tolist() for layer, total in self._sums.items()}


def _projection(attention: nn.Module) -> torch.Tensor | None:
    """Weight `[hidden, Hq * D]` of the output projection; None if it is not one plain matrix (quantised weights)."""
    for name in _PROJECTIONS:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            return module.weight
    return None
