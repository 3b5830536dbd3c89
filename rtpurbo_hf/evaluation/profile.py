"""The sparsity profile in the paper's terms, of all heads of all converted layers.

*Compute sparsity*: 1 - the attended part of what a row sees, mean over query heads; local heads count with their
window and sinks. *Memory sparsity*: the same of each KV head, which must load the union of what its query heads attend
to. Both are of decode steps: prefill reads more.
"""

from __future__ import annotations

import torch

from ..modeling.modeling_rtpurbo import RTPurboForCausalLM

Sums = dict[str, tuple[float, float]]


def oracle_tokens(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """How many of the largest weights `[..., N]` it takes to hold as much as `mass` `[...]`; int64 `[...]`."""
    total = weights.sort(-1, descending=True).values.cumsum(-1)
    # the selected set's own sum may round above that of the largest ones
    return ((total < mass[..., None] - 1e-6).sum(-1) + 1).clamp_max(weights.shape[-1])


class SparsityProfile:
    """Sums over the scored rows of one forward; pass `observe` as `on_selection`.

    Args:
        model: in the attention mode, and with the settings, of the forward.
        visible: int64 `[R]`, how many tokens each scored row sees, its own included.
    """

    def __init__(self, model: RTPurboForCausalLM, visible: torch.Tensor) -> None:
        config = model.config
        self._window, self._sinks = config.sliding_window, config.num_sink_tokens
        self._plans = {m.layer_idx: m.rtpurbo.plans[model.attention] for m in model.converted()}
        seen = visible.double().cpu()
        in_window = seen.clamp_max(self._window)
        local = in_window + (seen - in_window).clamp_max(self._sinks)
        self._rows = len(seen)
        self._local = float((local / seen).sum())
        # [heads] each, summed over rows
        self._parts: dict[int, torch.Tensor] = {}
        self._unions: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, torch.Tensor] = {}
        self._kept: dict[int, torch.Tensor] = {}
        self._oracle: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, rows: slice, chosen, valid, weights) -> None:
        """One tile: `chosen`, `weights` `[1, n, R, N]`, `valid` `[1, 1, R, N]`."""
        plan = self._plans[layer]
        seen = valid.sum(-1)
        tokens = chosen.sum(-1)
        kept = (weights * chosen).sum(-1)
        _add(self._tokens, layer, tokens.double().sum((0, 2)))
        _add(self._parts, layer, (tokens / seen).double().sum((0, 2)))
        _add(self._kept, layer, kept.double().sum((0, 2)))
        _add(self._oracle, layer, oracle_tokens(weights, kept).double().sum((0, 2)))
        # slots are positions: evaluated rows have no padding
        slots = torch.arange(valid.shape[-1], device=valid.device)
        local = valid & ((slots >= seen[..., None] - self._window) | (slots < self._sinks))
        unions = []
        for kv_head in plan.full_kv:
            group = [place for place, head in enumerate(plan.retrieval) if plan.kv_head(head) == kv_head]
            union = chosen[:, group].any(1, keepdim=True)
            if any(plan.kv_head(head) == kv_head for head in plan.local):
                union = union | local
            unions.append((union.sum(-1) / seen).double().sum())
        _add(self._unions, layer, torch.stack(unions))

    def sums(self) -> Sums:
        """`{figure: (numerator, denominator)}`; figures of the selection are missing where nothing selects."""
        query_parts, kv_parts, query_heads, kv_heads = 0.0, 0.0, 0, 0
        for layer, plan in self._plans.items():
            query_heads += plan.num_heads
            kv_heads += plan.num_kv_heads
            everything = float(self._rows * len(plan.retrieval))
            query_parts += self._local * len(plan.local)
            query_parts += float(self._parts[layer].sum()) if layer in self._parts else everything
            kv_parts += self._local * len(plan.window_kv)
            union = self._unions.get(layer)
            kv_parts += float(self._rows * len(plan.full_kv)) if union is None else float(union.sum())
        query_rows, kv_rows = float(query_heads * self._rows), float(kv_heads * self._rows)
        sums: Sums = {
            "compute_sparsity": (query_rows - query_parts, query_rows),
            "memory_sparsity": (kv_rows - kv_parts, kv_rows),
        }
        if self._tokens:
            tokens, oracle = _total(self._tokens), _total(self._oracle)
            count = float(self._rows * sum(map(len, self._tokens.values())))
            sums["active_tokens"] = (tokens, count)
            sums["selected_fraction"] = (_total(self._parts), count)
            sums["kept_mass"] = (_total(self._kept), count)
            sums["oracle_tokens"] = (oracle, count)
            sums["tokens_over_oracle"] = (tokens, oracle)
        return sums

    def tokens_per_head(self) -> dict[str, list[float]]:
        """Mean selected tokens of each retrieval head, by layer (a string, as JSON has it)."""
        return {str(layer): [round(t / self._rows, 2) for t in sums.tolist()] for layer, sums in self._tokens.items()}


class PrefillProfile:
    """What retrieval heads read in a sparse prefill; pass `observe` as `on_selection` of a forward of the prompt.

    `prefill_read`: key tokens read / visible ones, summed over rows and heads, which is the part of dense attention
    that is computed. `prefill_kept_mass`: true mass of the tokens read, mean over heads and the rows that leave
    something out; `prefill_kept_low`: its first percentile over the same.
    """

    def __init__(self) -> None:
        self._read = self._seen = 0.0
        self._kept: list[torch.Tensor] = []

    def observe(self, layer: int, rows: slice, chosen, valid, weights) -> None:
        """One tile, as in `SparsityProfile.observe`."""
        read, seen = chosen.sum(-1), valid.sum(-1).expand(chosen.shape[:3])
        self._read += float(read.double().sum())
        self._seen += float(seen.double().sum())
        self._kept.append((weights * chosen).sum(-1)[read < seen].cpu())

    def sums(self) -> Sums:
        """`{figure: (numerator, denominator)}`; no masses where every row read everything, nothing without rows."""
        sums: Sums = {"prefill_read": (self._read, self._seen)} if self._seen else {}
        kept = torch.cat(self._kept).double() if self._kept else torch.empty(0)
        if kept.numel():
            low = kept.kthvalue(max(kept.numel() // 100, 1)).values
            sums |= {
                "prefill_kept_mass": (float(kept.sum()), float(kept.numel())),
                "prefill_kept_low": (float(low), 1.0),
            }
        return sums


def _add(store: dict[int, torch.Tensor], layer: int, value: torch.Tensor) -> None:
    value = value.cpu()
    store[layer] = store[layer] + value if layer in store else value


def _total(store: dict[int, torch.Tensor]) -> float:
    return float(torch.cat(list(store.values())).sum())
