"""`rtpurbo bench model`: whole models with random weights against the same base, dense, in one process.

`ttft_vs_sdpa`: prefill with a cache, to the first token. `tpot_vs_dense_graph`: one token at a time on a context that
was planted, not prefilled (`model_planted.py`). `kv_bytes_vs_predicted`: what `rtpurbo info` says ahead of time.
`max_context_80gb`: caches of all layers, allocated until a card is full.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..info import checkpoint_info, head_plans
from ..modeling.cache_rtpurbo import RTPurboCache
from ..modeling.configuration_rtpurbo import RTPurboConfig
from ..modeling.modeling_rtpurbo import RTPurboForCausalLM
from . import model_dense
from .harness import Row, checked, copy_bandwidth, environment, matmul_rate, measure, relative_error, table, write
from .model_plan import (
    NUM_SINKS,
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
from .model_planted import STEPS, CountSelected, ScaleIndex, TwoLevels, converted_layer, planted_cache

logger = logging.getLogger(__name__)

COLUMNS = ("shape", "batch", "peer", "selected", "kv_bytes", "predicted_bytes", "tokens", "dense_tokens", "check")
CARD_BYTES = 80 * 2**30
CHECK_LENGTH, TOLERANCE = 12_288, 5e-2
GRANULE = 4096


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


def build_base(plan: Plan):
    """The base model with random weights, in bf16 on the GPU, attending with SDPA."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(
            plan.shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for layer in base.model.layers:
        if type(layer.mlp).__name__.endswith("MLP"):
            layer.mlp = model_dense.TiledMLP(layer.mlp)
    return base


def convert(base) -> RTPurboForCausalLM:
    """The same modules, attending the RTPurbo way; index queries have about unit norm."""
    model = RTPurboForCausalLM.from_base(base, **settings(base.config))
    for indexer in model.indexers().values():
        for weight in (indexer.q_proj, indexer.k_proj):
            torch.nn.init.normal_(weight, std=(weight.shape[1] * weight.shape[2]) ** -0.5)
    return model


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(length)
    return torch.randint(0, 150_000, (batch, length), device="cuda", generator=generator)


# --- dense, before the base is converted ---------------------------------------------------------------------------


def dense_prefills(base, plan: Plan) -> dict[int, tuple[float, int] | None]:
    """Milliseconds and peak bytes by length; None where it does not fit."""
    model_dense.prefill_ms(base, prompt(2048))
    results: dict[int, tuple[float, int] | None] = {}
    for length in plan.prefill:
        try:
            results[length] = model_dense.prefill_ms(base, prompt(length))
        except torch.cuda.OutOfMemoryError:
            logger.warning("the dense prefill of %d tokens does not fit on this card", length)
            results[length] = None
        torch.cuda.empty_cache()
    return results


def dense_steps(base, plan: Plan) -> dict[tuple[int, int], tuple[float, str] | None]:
    """Milliseconds a token and the peer's name by (length, batch); None where the cache does not fit."""
    model_dense.register()
    results: dict[tuple[int, int], tuple[float, str] | None] = {}
    for length in plan.decode:
        for batch in plan.batches:
            try:
                results[length, batch] = model_dense.decode_ms(base, length, batch)
            except torch.cuda.OutOfMemoryError:
                logger.warning("a dense cache of %d x %d tokens does not fit on this card", batch, length)
                results[length, batch] = None
            torch.cuda.empty_cache()
    return results


# --- ours ----------------------------------------------------------------------------------------------------------


def is_graphed(cache: RTPurboCache, batch: int) -> bool:
    return getattr(cache.graphs.get(batch), "graph", None) is not None


def check_model(model: RTPurboForCausalLM) -> dict[str, Any]:
    """The graphed step's logits against the reference backend's, on a cache whose selection is unambiguous.

    `control_error` is what the logits would be off by if the selection were ignored.
    """
    config = model.config
    cache = planted_cache(model, CHECK_LENGTH, 1)
    levels = TwoLevels(model, cache)
    ids = prompt(1)
    config.index_min_tokens = levels.count

    def again(**options: Any) -> torch.Tensor:
        if cache.get_seq_length() > CHECK_LENGTH:
            cache.crop(-1)
        return model(input_ids=ids, past_key_values=cache, **options).logits.float()

    try:
        again(observer=levels)
        config.attention_backend = "reference"
        expected = again()
        config.index_top_p = 1.0
        control = again()
        config.index_top_p, config.attention_backend = TOP_P, "auto"
        again()
        out = again()
        graphed = is_graphed(cache, 1)
    finally:
        config.index_top_p, config.attention_backend, config.index_min_tokens = TOP_P, "auto", 0
    return {
        **checked(relative_error(out, expected), TOLERANCE),
        "control_error": relative_error(control, expected),
        "graphed": graphed,
    }


def prefill_rows(model, plan: Plan, dense, verdict: dict[str, Any]) -> list[Row]:
    """Time to the first token, and the bytes that the cache then holds."""
    rows = []
    first_tokens(model, 2 * WINDOW)
    for length in tqdm(plan.prefill, desc="prefill"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ms, cache = first_tokens(model, length)
        peak = torch.cuda.max_memory_allocated()
        allocated = torch.cuda.memory_allocated() - before
        held = cache.nbytes()
        del cache
        predicted = checkpoint_info(model.config, context=length).kv_bytes
        dense_bytes = checkpoint_info(model.config, context=length).kv_bytes_dense
        peer = dense[length]
        extra = {
            "shape": plan.shape.name,
            "layers": plan.shape.layers,
            "batch": 1,
            "peer": "SDPA, whole prompt" if peer else "SDPA does not fit",
            "peak_bytes": peak,
            "peer_peak_bytes": peer[1] if peer else None,
            **verdict,
        }
        rows.append(Row("ttft_vs_sdpa", length, RATIO, ms, peer[0] if peer else None, None, extra))
        off = abs(allocated / predicted["total"] - 1)
        extra = {
            "shape": plan.shape.name,
            "layers": plan.shape.layers,
            "batch": 1,
            "kv_bytes": held["total"],
            "predicted_bytes": predicted["total"],
            "allocated_bytes": allocated,
            "dense_bytes": dense_bytes,
            "by_kind": held,
            **checked(max(off, abs(held["total"] / predicted["total"] - 1)), 0.02),
        }
        rows.append(Row("kv_bytes_vs_predicted", length, RATIO, ms, None, None, extra))
    return rows


def first_tokens(model, length: int) -> tuple[float, RTPurboCache]:
    """Milliseconds of a prefill and its first token, and the cache that it leaves."""
    ids, cache = prompt(length), model.new_cache()

    def run() -> int:
        return int(model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)[0])

    timing = measure(run, warmup=0, repeats=1)
    return timing.median_ms, cache


def decode_row(model, plan: Plan, length: int, batch: int, peer, verdict: dict[str, Any]) -> Row:
    """Time per output token at one length, as `generate(cache_implementation="static")` makes it."""
    cache = planted_cache(model, length, batch)
    ids = prompt(1, batch)
    share = selected_share(length)
    model(input_ids=ids, past_key_values=cache, observer=ScaleIndex(cache, share))

    def step() -> torch.Tensor:
        return model(input_ids=ids, past_key_values=cache).logits

    ours = measure(step, warmup=5, repeats=20).median_ms
    graphed = is_graphed(cache, batch)
    counter = CountSelected(model, cache)
    model(input_ids=ids, past_key_values=cache, observer=counter)
    extra = {
        "shape": plan.shape.name,
        "layers": plan.shape.layers,
        "batch": batch,
        "peer": peer[1] if peer else "dense cache does not fit",
        "selected": counter.mean(),
        "planted": share,
        "graphed": graphed,
        "kv_bytes": cache.nbytes()["total"],
        "index": "planted: normal index keys scaled to the stated share; K and V random",
        **verdict,
    }
    return Row("tpot_vs_dense_graph", length, RATIO, ours, peer[0] if peer else None, None, extra)


def decode_rows(model, plan: Plan, dense, verdict: dict[str, Any]) -> list[Row]:
    rows = []
    for length, batch in tqdm([(n, b) for n in plan.decode for b in plan.batches], desc="decode"):
        try:
            rows.append(decode_row(model, plan, length, batch, dense[length, batch], verdict))
        except torch.cuda.OutOfMemoryError:
            logger.warning("a cache of %d x %d tokens does not fit on this card", batch, length)
        torch.cuda.empty_cache()
    return rows


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
    batches: Sequence[int] = (1,),
    layers: int | None = None,
    name: str = "model",
) -> list[Row]:
    """Run, check and store the model benchmark; needs a CUDA device.

    Args:
        preset: `"quick"` or `"paper"` (lengths up to 256K: some minutes).
        output: folder for `name`.json, .csv and .png.
        shape: `"qwen3-8b"` or `"qwen3-30b-a3b"` (12 of its 48 layers, unless `layers` says otherwise).
        lengths: instead of the preset's. batches: of the decode steps. layers: how many of the model to build.

    Raises:
        ValueError: see `make_plan`.
    """
    plan = make_plan(preset, shape=shape, lengths=lengths, batches=batches, layers=layers)
    ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_matmul_flops_per_s": matmul_rate()}
    torch.cuda.empty_cache()
    rows = [context_row()]
    base = build_base(plan)
    prefills = dense_prefills(base, plan)
    steps = dense_steps(base, plan)
    model = convert(base)
    verdict = check_model(model)
    logger.info("graphed step against the reference: %s", verdict)
    torch.cuda.empty_cache()
    rows += decode_rows(model, plan, steps, verdict)
    rows += prefill_rows(model, plan, prefills, verdict)
    heads = {"retrieval_heads": model.config.retrieval_heads, "step_room": STEPS}
    write(rows, Path(output) / name, meta=environment() | {"preset": preset, "ceilings": ceilings, **heads})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-8b")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int)
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
        name=arguments.name,
    )
    print(table(rows, extra=COLUMNS))
    if any(row.extra.get("check") != "ok" for row in rows):
        raise SystemExit("some results are wrong: see the rows whose check is red")


if __name__ == "__main__":
    main()
