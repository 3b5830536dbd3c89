"""`rtpurbo bench model`: whole models with random weights against the same base, dense, in one process.

`ttft_vs_sdpa`: prefill with a cache, to the first token; `ttft_vs_sdpa_sparse`: with `retrieval_prefill="sparse_tiled"`
and a planted index. `tpot_vs_dense_graph`: one token at a time on a context that
was planted, not prefilled (`model_planted.py`). `kv_bytes_vs_predicted`: what `rtpurbo info` says ahead of time.
`max_context_80gb`: caches of all layers, allocated until a card is full.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..info import checkpoint_info, head_plans
from ..modeling.cache_rtpurbo import RTPurboCache
from ..modeling.configuration_rtpurbo import RTPurboConfig
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from . import model_check, model_dense
from .harness import Row, checked, copy_bandwidth, environment, matmul_rate, measure, table
from .model_dense import Budget, Peers
from .model_plan import (
    NUM_SINKS,
    PARTS,
    PRESETS,
    RATIO,
    SHAPES,
    TOP_P,
    WINDOW,
    Plan,
    draw_retrieval_heads,
    make_plan,
    selected_share,
)
from .model_planted import STEPS, CountSelected, PlantedIndex, ScaleIndex, converted_layer, planted_cache
from .part_results import Results

logger = logging.getLogger(__name__)

COLUMNS = ("shape", "batch", "peer", "selected", "kv_bytes", "predicted_bytes", "tokens", "dense_tokens", "check")
CARD_BYTES = 80 * 2**30
GRANULE = 4096
# case and `retrieval_prefill` of each prefill
PREFILLS = {"ttft_vs_sdpa": "dense", "ttft_vs_sdpa_sparse": "sparse_tiled"}
COMPILE_SECONDS, COMPILED_LENGTH = 150.0, 131_072


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The `RTPurboConfig` fields of every case: the paper's, with unevenly drawn retrieval heads."""
    heads = draw_retrieval_heads(
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, ratio=RATIO
    )
    return {
        "retrieval_heads": heads,
        "sliding_window": WINDOW,
        "num_sink_tokens": NUM_SINKS,
        "index_top_p": TOP_P,
        "index_min_tokens": 0,
    }


def build_base(config: PreTrainedConfig):
    """The base model with random weights, in bf16 on the GPU, attending with SDPA."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    for layer in base.model.layers:
        if type(layer.mlp).__name__.endswith("MLP"):
            layer.mlp = model_dense.TiledMLP(layer.mlp)
    return base


def convert(base) -> RTPurboForCausalLM:
    """A twin of the base that attends the RTPurbo way, on the same weights; index queries have about unit norm."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = RTPurboForCausalLM.from_base(copy.deepcopy(base, shared), **settings(base.config))
    for indexer in model.indexers().values():
        for weight in (indexer.q_proj, indexer.k_proj):
            torch.nn.init.normal_(weight, std=(weight.shape[1] * weight.shape[2]) ** -0.5)
    return model


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(length)
    return torch.randint(0, 150_000, (batch, length), device="cuda", generator=generator)


def free() -> None:
    """Give memory back between cases: cycles hold caches and models for a while."""
    gc.collect()
    torch.cuda.empty_cache()


def check(plan: Plan) -> dict[str, dict[str, Any]]:
    """The verdicts on decode steps and on both prefills, from a model of two layers that is gone afterwards."""
    model = convert(build_base(plan.shape.check_config(model_check.LAYERS)))
    verdicts = {}
    if "decode" in plan.parts:
        verdicts["decode"] = model_check.check_decode(model)
    if "prefill" in plan.parts:
        verdicts |= {mode: model_check.check_prefill(model, mode) for mode in PREFILLS.values()}
    for name, entries in verdicts.items():
        logger.info("check of %s: %s", name, entries)
    return verdicts


# --- prefill -------------------------------------------------------------------------------------------------------


def prefill_rows(base, model, plan: Plan, verdicts: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Time to the first token in both prefill modes, and the bytes that the cache then holds; shortest first."""
    model_dense.prefill_ms(base, prompt(2048))
    first_tokens(model, 2 * WINDOW)
    for length in tqdm(sorted(plan.prefill), desc="prefill"):
        peers = model_dense.prefill_peers(base, prompt(length))
        for case, mode in PREFILLS.items():
            yield from prefill_case(model, plan, length, case, mode, peers, verdicts[mode])


def prefill_case(
    model, plan: Plan, length: int, case: str, mode: str, peers: Peers, verdict: dict[str, Any]
) -> Iterator[Row]:
    """One prefill: its time and, for the default mode, what its cache holds."""
    free()
    planted: dict[str, Any] = {}
    common = {"shape": plan.shape.name, "layers": plan.shape.layers, "batch": 1}
    model.config.retrieval_prefill = mode
    try:
        before = torch.cuda.memory_allocated()
        if mode == "dense":
            ms, peak, cache = first_tokens(model, length)
        else:
            with PlantedIndex(model, length, selected_share(length)) as index:
                ms, peak, cache = first_tokens(model, length)
                del cache
                planted = {
                    "selected_blocks": index.selected_blocks(model.config),
                    "index": "planted; q, k and v random: what the lists keep of the attention is measured elsewhere",
                }
    except torch.cuda.OutOfMemoryError:
        logger.warning("the %s prefill of %d tokens does not fit on this card", mode, length)
        return
    finally:
        model.config.retrieval_prefill = "dense"
    best = peers.best()
    extra = {
        **common,
        **peers.entries(),
        "sdpa_default": peers.default,
        "retrieval_prefill": mode,
        "peak_bytes": peak,
        "peer_peak_bytes": peers.bytes,
        **planted,
        **verdict,
    }
    yield Row(case, length, RATIO, ms, best[0] if best else None, None, extra)
    if mode == "dense":
        yield bytes_row(model, length, ms, cache, torch.cuda.memory_allocated() - before, common)


def bytes_row(model, length: int, ms: float, cache: RTPurboCache, allocated: int, common: dict[str, Any]) -> Row:
    """What the cache holds after a prefill against what `rtpurbo info` says ahead of time."""
    held, info = cache.nbytes(), checkpoint_info(model.config, context=length)
    predicted = info.kv_bytes["total"]
    off = max(abs(allocated / predicted - 1), abs(held["total"] / predicted - 1))
    extra = {
        **common,
        "kv_bytes": held["total"],
        "predicted_bytes": predicted,
        "allocated_bytes": allocated,
        "dense_bytes": info.kv_bytes_dense,
        "by_kind": held,
        **checked(off, 0.02),
    }
    return Row("kv_bytes_vs_predicted", length, RATIO, ms, None, None, extra)


def first_tokens(model, length: int) -> tuple[float, int, RTPurboCache]:
    """Milliseconds of a prefill and its first token, the peak of the allocated bytes, and the cache that it leaves."""
    ids = prompt(length)
    held: list[RTPurboCache] = []
    torch.cuda.reset_peak_memory_stats()

    def run() -> int:
        held.clear()
        held.append(model.new_cache())
        return int(model(input_ids=ids, past_key_values=held[0], logits_to_keep=1).logits[:, -1].argmax(-1)[0])

    timing = measure(run, warmup=model_dense.warm_runs(length), repeats=1)
    return timing.median_ms, torch.cuda.max_memory_allocated(), held[0]


# --- decode --------------------------------------------------------------------------------------------------------


def decode_row(model, plan: Plan, length: int, batch: int, peers: Peers, verdict: dict[str, Any]) -> Row:
    """Time per output token at one length, as `generate(cache_implementation="static")` makes it."""
    cache = planted_cache(model, length, batch)
    ids = prompt(1, batch)
    share = selected_share(length)
    model(input_ids=ids, past_key_values=cache, observer=ScaleIndex(cache, share))

    def step() -> torch.Tensor:
        return model(input_ids=ids, past_key_values=cache).logits

    ours = measure(step, warmup=5, repeats=20).median_ms
    graphed = model_check.is_graphed(cache, batch)
    counter = CountSelected(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=counter)
    best = peers.best()
    extra = {
        "shape": plan.shape.name,
        "layers": plan.shape.layers,
        "batch": batch,
        **peers.entries(),
        "selected": counter.mean(),
        "planted": share,
        "kv_bytes": cache.nbytes()["total"],
        "index": "planted: normal index keys scaled to the stated share; K and V random",
        **verdict,
        "graphed": graphed,
    }
    return Row("tpot_vs_dense_graph", length, RATIO, ours, best[0] if best else None, None, extra)


def decode_rows(base, model, plan: Plan, verdict: dict[str, Any], compile_seconds: float) -> Iterator[Row]:
    """A row for each length and batch whose cache fits, and again once its compiled peers were timed."""
    cases = [(length, batch) for length in sorted(plan.decode) for batch in plan.batches]
    measured: dict[tuple[int, int], tuple[Peers, Row]] = {}
    for length, batch in tqdm(cases, desc="decode"):
        peers = model_dense.graphed_peers(base, length, batch)
        try:
            row = decode_row(model, plan, length, batch, peers, verdict)
        except torch.cuda.OutOfMemoryError:
            logger.warning("a cache of %d x %d tokens does not fit on this card", batch, length)
        else:
            measured[length, batch] = peers, row
            yield row
        free()
    budget = Budget(compile_seconds)
    for case in tqdm(compile_order(list(measured)), desc="compiled dense steps"):
        peers, row = measured[case]
        model_dense.add_compiled(peers, base, case[0], case[1], budget)
        best = peers.best()
        yield replace(row, peer_ms=best[0] if best else None, extra={**row.extra, **peers.entries()})
        free()


def compile_order(cases: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cases by importance, for a budget that may not last: the shortest and `COMPILED_LENGTH` at the smallest batch."""
    smallest = min((batch for _, batch in cases), default=1)
    shortest = min((length for length, _ in cases), default=0)
    return sorted(cases, key=lambda case: (case[0] not in (shortest, COMPILED_LENGTH), case[1] != smallest, case))


# --- the longest context -------------------------------------------------------------------------------------------


def longest(allocate, upper: int) -> int:
    """The largest multiple of `GRANULE` tokens, up to `upper`, whose caches `allocate` can really hold."""
    low, high = 0, upper // GRANULE
    while low < high:
        middle = (low + high + 1) // 2
        try:
            held = allocate(middle * GRANULE)
            del held
            low = middle
        except torch.cuda.OutOfMemoryError:
            high = middle - 1
        torch.cuda.empty_cache()
    return low * GRANULE


def context_row() -> Row:
    """Tokens whose caches fit on one 80 GB card, for all 48 layers of the 30B-A3B geometry; weights not counted."""
    shape = SHAPES["qwen3-30b-a3b"]
    base = shape.config(shape.whole)
    config = RTPurboConfig(base_config=base, dtype=torch.bfloat16, **settings(base))
    plans = head_plans(config)
    kv_heads, dim = base.num_key_value_heads, base.head_dim
    token = torch.zeros(1, kv_heads, 1, dim, dtype=torch.bfloat16, device="cuda")

    def ours(length: int) -> RTPurboCache:
        cache = RTPurboCache(config, plans, max_length=length)
        for layer, plan in plans.items():
            index = token.new_zeros(1, len(plan.index_key_kv), 1, config.index_dim) if plan.index_key_kv else None
            converted_layer(cache, layer).update(token, token, index_key=index)
        return cache

    def dense(length: int) -> list[torch.Tensor]:
        return [token.new_empty(1, kv_heads, length, dim) for _ in range(2 * shape.whole)]

    total = torch.cuda.get_device_properties(0).total_memory
    limit = min(total, CARD_BYTES)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        facts = checkpoint_info(config, context=1024)
        dense_tokens = longest(dense, 1024 * limit // facts.kv_bytes_per_1k_tokens_dense)
        tokens = longest(ours, 1024 * limit // facts.kv_bytes_per_1k_tokens)
        made: list[RTPurboCache] = []
        ms = measure(lambda: made.append(ours(tokens)), warmup=0, repeats=1).median_ms
        held = made.pop().nbytes()["total"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    predicted = checkpoint_info(config, context=tokens).kv_bytes["total"]
    extra = {
        "shape": "qwen3-30b-a3b",
        "layers": shape.whole,
        "batch": 1,
        "tokens": tokens,
        "dense_tokens": dense_tokens,
        "factor": tokens / max(dense_tokens, 1),
        "card_bytes": limit,
        "kv_bytes": held,
        "predicted_bytes": predicted,
        "weights": "not counted: the caches of all layers alone",
        **checked(abs(held / predicted - 1), 0.02),
    }
    return Row("max_context_80gb", tokens, RATIO, ms, None, None, extra)


# --- the run -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_model_benchmark(
    preset: str,
    output: str | Path,
    *,
    shape: str = "qwen3-8b",
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    layers: int | None = None,
    only: Sequence[str] | None = None,
    compile_seconds: float = COMPILE_SECONDS,
    name: str = "model",
) -> list[Row]:
    """Run, check and store the model benchmark; needs a CUDA device.

    Every row is stored as soon as it is measured. Parts may run in several calls with one `name`: rows of earlier
    calls stay, if they are of the same device, versions and preset; each names its commit.

    Args:
        preset: `"quick"` or `"paper"` (lengths up to 256K, batches 1 and 4: some minutes).
        output: folder for `name`.json, .csv and .png.
        shape: `"qwen3-8b"` or `"qwen3-30b-a3b"` (12 of its 48 layers, unless `layers` says otherwise).
        lengths, batches: instead of the preset's; batches are of the decode steps. layers: of the model to build.
        only: parts, of `"context"`, `"decode"` and `"prefill"`; None: all.
        compile_seconds: no dense peer is compiled any more once compiling took so long.

    Returns:
        All rows of the file.

    Raises:
        ValueError: see `make_plan` and `Results`.
    """
    plan = make_plan(preset, shape=shape, lengths=lengths, batches=batches, layers=layers, only=only)
    ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_matmul_flops_per_s": matmul_rate()}
    heads = settings(plan.shape.config())["retrieval_heads"]
    facts = {"preset": preset, "ceilings": ceilings, "retrieval_heads": heads, "step_room": STEPS}
    results = Results(Path(output) / name, environment() | facts)
    free()
    if "context" in plan.parts:
        results.add(context_row())
    if plan.parts != ("context",):
        verdicts = check(plan)
        free()
        base = build_base(plan.shape.config())
        model = convert(base)
        if "decode" in plan.parts:
            for row in decode_rows(base, model, plan, verdicts["decode"], compile_seconds):
                results.add(row)
        if "prefill" in plan.parts:
            for row in prefill_rows(base, model, plan, verdicts):
                results.add(row)
    return results.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-8b")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", choices=PARTS, nargs="+")
    parser.add_argument("--compile-seconds", type=float, default=COMPILE_SECONDS)
    parser.add_argument("--name", default="model", help="basename of the result files")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rows = run_model_benchmark(
        arguments.preset,
        arguments.output,
        shape=arguments.shape,
        lengths=arguments.lengths,
        batches=arguments.batch,
        layers=arguments.layers,
        only=arguments.only,
        compile_seconds=arguments.compile_seconds,
        name=arguments.name,
    )
    print(table(rows, extra=COLUMNS))
    if any(row.extra.get("check") != "ok" for row in rows):
        raise SystemExit("some results are wrong: see the rows whose check is red")


if __name__ == "__main__":
    main()
