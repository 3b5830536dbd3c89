"""The `rtpurbo` command. Every command has `--help` with an example, and exits non-zero with one line on bad input."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_eval, cli_hub
from .cli_options import (
    Base,
    Checkpoint,
    Data,
    Device,
    DType,
    Output,
    Precision,
    Seed,
    checkpoint_named,
    device_named,
    dtype_named,
    text_of,
)

if TYPE_CHECKING:
    from .benchmarks.harness import Row

app = typer.Typer(
    name="rtpurbo",
    help="Turn a full-attention Hugging Face LLM into a sparse one (RTPurbo), and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")

_READABLE = (ValueError, OSError, RuntimeError, NotImplementedError)


class Granularity(StrEnum):
    head = "head"
    kv_head = "kv_head"


class HeadRule(StrEnum):
    score = "score"
    even = "even"


class KeySharing(StrEnum):
    head = "head"
    kv_head = "kv_head"


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"


Stage2Rate = Annotated[
    float | None, typer.Option(help="Stage-2 learning rate.", show_default="3e-6, or 1e-4 for a LoRA")
]
Stage2Schedule = Annotated[
    Schedule | None, typer.Option(help="Stage-2 learning rate after its warm-up.", show_default="constant")
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing",
        help="Stage 2 takes activations again in the backward: less memory, about half as fast.",
        show_default="where memory is short",
    ),
]
Accumulation = Annotated[int, typer.Option(help="Stage-2 blocks of a step, on each GPU.")]
RefreshSteps = Annotated[
    int | None,
    typer.Option(help="Steps that train the indexers once more, after stage 2.", show_default="0"),
]
RefreshRate = Annotated[float | None, typer.Option(help="Learning rate of these steps.", show_default="stage 1's")]
LoraRank = Annotated[int, typer.Option(help="Stage 2 trains a LoRA of this rank; 0: all weights.")]
LabelRows = Annotated[int, typer.Option(help="Stage 2 learns from so many last rows of a block of plain text.")]
Blocks = Annotated[int, typer.Option(min=1, help="Blocks in the distillation set.")]
NeedleShare = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Part of the plain-text blocks with key-value needles.")
]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, as 8192,131072; got {text!r}") from None


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,  # read by main()
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("rtpurbo_hf").setLevel(logging.INFO)


@app.command(epilog="Example: rtpurbo adapt smollm2-135m --preset demo --output build/demo")
def adapt(
    base: Base,
    output: Output,
    preset: Annotated[str, typer.Option(help="Settings to start from: default, paper or demo.")] = "default",
    context: Annotated[int | None, typer.Option(help="Tokens in a block, and the length to serve.")] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window of local heads.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Part of the query heads that retrieve.")] = None,
    head_rule: Annotated[
        HeadRule | None, typer.Option(help="How heads are chosen, see calibrate.", show_default="the preset's")
    ] = None,
    index_dim: Annotated[int | None, typer.Option(help="Index dimensions.")] = None,
    index_rotary_dim: Annotated[int | None, typer.Option(help="How many of them are rotated.")] = None,
    index_key_sharing: Annotated[
        KeySharing | None,
        typer.Option(help="An index key for each retrieval head, or for each KV head.", show_default="the preset's"),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Attention mass to select.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Floor on the selected tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stage-1 steps.")] = None,
    train_blocks: Annotated[int | None, typer.Option(help="Blocks in the training set.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Stage-1 learning rate.")] = None,
    stages: Annotated[str, typer.Option(help="1: train the indexers; 1,2: then the backbone as well.")] = "1",
    stage2_steps: Annotated[int | None, typer.Option(help="Stage-2 steps.")] = None,
    stage2_learning_rate: Stage2Rate = None,
    stage2_schedule: Stage2Schedule = None,
    stage2_context: Annotated[
        int | None, typer.Option(help="Tokens in a stage-2 block.", show_default="stage 1's")
    ] = None,
    stage2_blocks: Annotated[
        int | None, typer.Option(help="Blocks in the stage-2 set.", show_default="stage 1's set")
    ] = None,
    accumulation: Annotated[int | None, typer.Option(help="Stage-2 blocks of a step, on each GPU.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Stage 2 trains a LoRA of this rank; 0: all weights.")] = None,
    label_rows: Annotated[
        int | None, typer.Option(help="Stage 2 learns from so many last rows of a block of plain text.")
    ] = None,
    checkpointing: Checkpointing = None,
    refresh_steps: RefreshSteps = None,
    refresh_learning_rate: RefreshRate = None,
    data: Data = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
    report_to: Annotated[str, typer.Option(help="As in transformers: none, tensorboard, wandb, ...")] = "none",
) -> None:
    """Calibrate, train the indexer, save an adapter, load it again, and report what was gained and lost.

    What is not given is the preset's.
    """
    from .adaptation import adapt as run
    from .presets import preset as named
    from .presets import stage2_preset
    from .report import markdown

    if stages not in ("1", "1,2"):
        raise ValueError(f"--stages must be 1 or 1,2, got {stages!r}")
    if refresh_steps and stages == "1":
        raise ValueError("--refresh-steps come after stage 2: give --stages 1,2 as well, or more --steps")
    stage2 = stage2_preset(
        preset,
        steps=stage2_steps,
        learning_rate=stage2_learning_rate,
        accumulation=accumulation,
        lora_rank=lora_rank,
        label_rows=label_rows,
        schedule=None if stage2_schedule is None else stage2_schedule.value,
        gradient_checkpointing=checkpointing,
        refresh_steps=refresh_steps,
        refresh_learning_rate=refresh_learning_rate,
    )
    settings = named(
        preset,
        context=context,
        sliding_window=window,
        ratio=ratio,
        head_rule=None if head_rule is None else head_rule.value,
        index_dim=index_dim,
        index_rotary_dim=index_rotary_dim,
        index_key_sharing=None if index_key_sharing is None else index_key_sharing.value,
        index_top_p=top_p,
        index_min_tokens=min_tokens,
        steps=steps,
        train_blocks=train_blocks,
        learning_rate=learning_rate,
        distill_context=stage2_context,
        distill_blocks=stage2_blocks,
    )
    device = device_named(device)
    done = run(
        base,
        output,
        settings=settings,
        data=data or "system",
        seed=seed,
        device=device,
        dtype=dtype_named(dtype, device),
        report_to=report_to,
        stage2=stage2 if stages == "1,2" else None,
    )
    typer.echo(markdown(done.report))
    typer.echo(f"adapter: {done.adapter}\nreport:  {output / 'report'}")
    if done.checkpoint != done.adapter:
        typer.echo(f"model:   {done.checkpoint}")


@app.command(epilog="Example: rtpurbo calibrate smollm2-135m --context 4096 --ratio 0.15 --output heads/")
def calibrate(
    base: Base,
    output: Output,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a document.")] = 32768,
    documents: Annotated[int, typer.Option(min=1, help="Documents to average over.")] = 4,
    ratio: Annotated[
        float | None, typer.Option(help="Part of the query heads that retrieve.", show_default="0.15, or all if few")
    ] = None,
    granularity: Annotated[Granularity, typer.Option(help="Take single heads, or whole KV groups.")] = Granularity.head,
    rule: Annotated[
        HeadRule,
        typer.Option(
            help="score: by needle score alone, as in the paper. even: without heads that score no more than even "
            "attention would, so maybe fewer than asked."
        ),
    ] = HeadRule.even,
    data: Data = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
) -> None:
    """Rank the heads of a base model and write calibration.json and heads.png."""
    from .auto import RTPurboForCausalLM
    from .sources import load_base
    from .training.calibration import calibrate as run
    from .training.data import load_texts, pack_documents
    from .training.plots import plot_heads

    target = output / "calibration.json"
    if target.exists():
        raise ValueError(f"{target} exists: choose another --output, or remove it")
    device = device_named(device)
    source = load_base(base, dtype=dtype_named(dtype, device), device=device)
    texts = load_texts(data or "system", min_chars=2 * context, seed=seed, limit=50 * documents)
    blocks = pack_documents(texts, source.tokenizer, context, blocks_per_document=1, limit=documents, seed=seed)
    model = RTPurboForCausalLM.from_base(source.model, base_model_revision=source.revision)
    found = run(model, list(blocks.input_ids), ratio=ratio, granularity=granularity.value, rule=rule.value, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    found.save(target)
    plot_heads(found, output / "heads.png")
    count = sum(map(len, found.retrieval_heads))
    typer.echo(f"{count} retrieval heads; wrote {target} and {output / 'heads.png'}")


@app.command(
    "train-indexer", epilog="Example: rtpurbo train-indexer smollm2-135m --heads heads/calibration.json -o out/"
)
def train_indexer(
    base: Base,
    output: Output,
    heads: Annotated[Path, typer.Option(help="JSON of `rtpurbo calibrate` or `rtpurbo import-heads`.")],
    preset: Annotated[str, typer.Option(help="Settings to start from: default, paper or demo.")] = "default",
    context: Annotated[int | None, typer.Option(help="Tokens in a block.")] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window of local heads.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.")] = None,
    train_blocks: Annotated[int | None, typer.Option(help="Blocks in the training set.")] = None,
    data: Data = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
    report_to: Annotated[str, typer.Option(help="As in transformers: none, tensorboard, wandb, ...")] = "none",
) -> None:
    """Train the indexers of given retrieval heads (stage 1) and save an adapter; goes on after an interruption."""
    from .adaptation import train_adapter
    from .interop import parse_json
    from .presets import preset as named
    from .training.calibration import Calibration

    record = parse_json(text_of(heads, "--heads"), heads)
    plain = isinstance(record, dict) and "scores" not in record
    settings = named(preset, context=context, sliding_window=window, steps=steps, train_blocks=train_blocks)
    device = device_named(device)
    adapter, metrics = train_adapter(
        base,
        output,
        record.get("retrieval_heads", []) if plain else Calibration.load(heads),
        settings=settings,
        data=data or "system",
        seed=seed,
        device=device,
        dtype=dtype_named(dtype, device),
        report_to=report_to,
    )
    typer.echo(json.dumps(metrics, indent=2))
    typer.echo(f"adapter: {adapter}")


@app.command(
    "cache-teacher", epilog="Example: rtpurbo cache-teacher build/demo/adapter --context 4096 -o build/teacher"
)
def cache_teacher(
    checkpoint: Checkpoint,
    output: Output,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 32768,
    blocks: Blocks = 256,
    label_rows: LabelRows = 300,
    needle_share: NeedleShare = 1 / 3,
    data: Data = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
) -> None:
    """Keep the dense model's top logits at the label rows, for `rtpurbo distill`; goes on after an interruption."""
    from transformers import AutoTokenizer

    from .auto import RTPurboForCausalLM
    from .distill import distillation_blocks
    from .training.teacher_cache import cache_teacher as run
    from .training.teacher_cache import label_rows as rows_of

    checkpoint, device = checkpoint_named(checkpoint), device_named(device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = RTPurboForCausalLM.from_pretrained(checkpoint, dtype=dtype_named(dtype, device)).to(device)
    chosen = distillation_blocks(
        data or "system", tokenizer, context=context, limit=blocks, needle_share=needle_share, seed=seed
    )
    rows = rows_of(chosen, last=label_rows)
    run(model, chosen, output, tokenizer=tokenizer, rows=rows)
    typer.echo(f"teacher: {output} ({len(chosen)} blocks, {int((rows >= 0).sum())} label rows)")


@app.command(epilog="Example: rtpurbo distill build/demo/adapter --context 4096 --steps 100 -o build/distilled")
def distill(
    checkpoint: Checkpoint,
    output: Output,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of `rtpurbo cache-teacher` with the same data.", show_default="made first"),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 32768,
    blocks: Blocks = 256,
    steps: Annotated[int, typer.Option(help="Steps.")] = 600,
    learning_rate: Stage2Rate = None,
    schedule: Stage2Schedule = None,
    accumulation: Accumulation = 8,
    lora_rank: LoraRank = 0,
    label_rows: LabelRows = 300,
    checkpointing: Checkpointing = None,
    refresh_steps: RefreshSteps = None,
    refresh_learning_rate: RefreshRate = None,
    needle_share: NeedleShare = 1 / 3,
    data: Data = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
    report_to: Annotated[str, typer.Option(help="As in transformers: none, tensorboard, wandb, ...")] = "none",
) -> None:
    """Stage 2: train the backbone in sparse mode on its dense self, and save full weights; goes on when interrupted."""
    from .distill import Stage2
    from .distill import distill as run

    checkpoint, device = checkpoint_named(checkpoint), device_named(device)
    done = run(
        checkpoint,
        output,
        settings=Stage2(
            steps=steps,
            learning_rate=learning_rate,
            accumulation=accumulation,
            lora_rank=lora_rank,
            label_rows=label_rows,
            schedule=Stage2.schedule if schedule is None else schedule.value,
            gradient_checkpointing=checkpointing,
            refresh_steps=refresh_steps or 0,
            refresh_learning_rate=refresh_learning_rate,
        ),
        data=data or "system",
        context=context,
        blocks=blocks,
        needle_share=needle_share,
        teacher=teacher,
        seed=seed,
        device=device,
        dtype=dtype_named(dtype, device),
        report_to=report_to,
    )
    typer.echo(f"model: {done}")


@app.command(epilog="Example: rtpurbo generate build/demo/adapter --prompt 'Once upon a time' --max-new-tokens 40")
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Prompt; '-' reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the text to a file as well.")] = None,
) -> None:
    """Generate from an RTPurbo checkpoint, streaming to standard output."""
    from transformers import AutoTokenizer, TextStreamer, set_seed

    from .auto import RTPurboForCausalLM

    if (prompt is None) == (prompt_file is None):
        raise ValueError("give exactly one of --prompt and --prompt-file")
    text = text_of(prompt_file, "--prompt-file") if prompt_file else str(prompt)
    if prompt == "-":
        text = sys.stdin.read()
    if output is not None and output.exists():
        raise ValueError(f"{output} exists: choose another --output, or remove it")
    checkpoint, device = checkpoint_named(checkpoint), device_named(device)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = RTPurboForCausalLM.from_pretrained(checkpoint, dtype=dtype_named(dtype, device)).to(device).eval()
    if chat:
        message = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(device)
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty: give at least one token to go on from")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    if output is not None:
        new = tokens[0, inputs["input_ids"].shape[1] :]
        output.write_text(f"{tokenizer.decode(new, skip_special_tokens=True)}\n", encoding="utf-8")


@app.command(epilog="Example: rtpurbo info build/demo/adapter --context 131072")
def info(
    checkpoint: Checkpoint,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache, for the byte counts.")] = 131072,
    dtype: Annotated[DType, typer.Option(help="Dtype of keys and values.")] = DType.bfloat16,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the keys and values that retrieval heads read, in place of the config's: auto, int8 or fp8."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON to a file.")] = None,
) -> None:
    """Tell what a checkpoint holds: heads, index size, freeable KV heads, cache bytes against a dense cache."""
    import torch

    from .auto import RTPurboConfig
    from .info import checkpoint_info

    config = RTPurboConfig.from_pretrained(checkpoint_named(checkpoint))
    if kv_cache_dtype is not None:
        config.kv_cache_dtype = kv_cache_dtype
        config.check()
    facts = checkpoint_info(config, context=context, dtype=getattr(torch, dtype.value)).to_dict()
    if output is not None:
        output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    share = facts["kv_bytes"]["total"] / facts["kv_bytes_dense"]
    growth = facts["kv_bytes_per_1k_tokens"] / facts["kv_bytes_per_1k_tokens_dense"]
    for name, value in (
        ("base model", f"{facts['base_model']} ({facts['base_family']})"),
        ("converted layers", f"{facts['converted_layers']} of {facts['layers']}"),
        ("retrieval heads", f"{facts['retrieval_heads']} of {facts['query_heads']} query heads"),
        ("freeable KV heads", f"{facts['freeable_kv_heads']} of {facts['kv_heads']}"),
        ("index weights", f"{facts['index_parameters']:,}"),
        ("K/V of the full part", dtype.value if facts["kv_cache_dtype"] == "auto" else facts["kv_cache_dtype"]),
        (f"KV bytes at {context:,}", f"{facts['kv_bytes']['total']:,} ({share:.1%} of {facts['kv_bytes_dense']:,})"),
        ("KV bytes per 1K tokens", f"{facts['kv_bytes_per_1k_tokens']:,} ({growth:.1%} of dense)"),
    ):
        typer.echo(f"{name + ':':26}{value}")


def _print_checked(rows: Sequence[Row], text: str) -> None:
    """Print a benchmark's table; ValueError where a check of it is red."""
    typer.echo(text)
    if any(row.extra.get("check") != "ok" for row in rows):
        raise ValueError("some results are wrong: see the rows whose check is red")


@bench.command("kernels", epilog="Example: rtpurbo bench kernels --preset paper --output results/")
def bench_kernels(
    output: Output = Path("build/bench"),
    preset: Annotated[str, typer.Option(help="paper, quick or full.")] = "quick",
    only: Annotated[str | None, typer.Option(help="prefill, sparse (sparse prefill) or decode.")] = None,
    name: Annotated[str, typer.Option(help="Basename of the result files; parts with one name add up.")] = "kernels",
    sweep: Annotated[bool, typer.Option("--sweep", help="With --only sparse: find its best launches instead.")] = False,
) -> None:
    """Time our kernels and their peers in one process (CUDA only); each figure is checked against a reference."""
    from .benchmarks.harness import table
    from .benchmarks.kernels import COLUMNS, SWEEP_COLUMNS, run_kernel_benchmarks

    device_named("cuda")
    rows = run_kernel_benchmarks(preset, output, only=only, name=name, sweep=sweep)
    _print_checked(rows, table(rows, extra=SWEEP_COLUMNS if sweep else COLUMNS))


@bench.command("training", epilog="Example: rtpurbo bench training --preset paper --output results/")
def bench_training(
    output: Output = Path("build/bench"),
    preset: Annotated[str, typer.Option(help="paper or quick.")] = "quick",
    only: Annotated[str | None, typer.Option(help="One case: stage1.")] = None,
    name: Annotated[str, typer.Option(help="Basename of the result files.")] = "training",
) -> None:
    """Time training steps of an 8B model against its dense forward (CUDA, 80 GB); each figure is checked."""
    from .benchmarks.training import run_training_benchmarks, summary

    device_named("cuda")
    rows = run_training_benchmarks(preset, output, only=only, name=name)
    _print_checked(rows, summary(rows))


@bench.command("model", epilog="Example: rtpurbo bench model --preset paper --shape qwen3-8b --output results/")
def bench_model(
    output: Output = Path("build/bench"),
    preset: Annotated[str, typer.Option(help="quick or paper.")] = "quick",
    shape: Annotated[str, typer.Option(help="qwen3-8b, or qwen3-30b-a3b (12 of its 48 layers).")] = "qwen3-8b",
    lengths: Annotated[str | None, typer.Option(help="Tokens instead of the preset's, as 8192,131072.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batches of the decode steps, as 1,4.", show_default="the preset's")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to build.", show_default="the shape's")] = None,
    only: Annotated[str | None, typer.Option(help="Parts, as decode,prefill; of context, decode and prefill.")] = None,
    compile_seconds: Annotated[float, typer.Option(help="Spend this long on compiling dense peers.")] = 150.0,
    name: Annotated[str, typer.Option(help="Basename of the result files; parts with one name add up.")] = "model",
) -> None:
    """Time a whole model with random weights against its dense base (CUDA only): prefill, decode, cache bytes."""
    from .benchmarks.harness import table
    from .benchmarks.model import COLUMNS, run_model_benchmark

    tokens = _numbers("--lengths", lengths) if lengths else None
    batches = _numbers("--batch", batch) if batch else None
    parts = only.split(",") if only else None
    device_named("cuda")
    rows = run_model_benchmark(
        preset, output, shape=shape, lengths=tokens, batches=batches, layers=layers, only=parts,
        compile_seconds=compile_seconds, name=name,
    )  # fmt: skip
    _print_checked(rows, table(rows, extra=COLUMNS))


cli_hub.register(app)
cli_eval.register(app)


def main() -> None:
    """Run the command line; errors of input end in one line and exit code 1."""
    try:
        app()
    except _READABLE as error:
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split())
        typer.echo(f"rtpurbo: {type(error).__name__}: {message}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
