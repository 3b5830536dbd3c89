"""The command `eval`: fidelity of a checkpoint, side by side with its dense self and with baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Data, Device, Output, Precision, checkpoint_named, device_named, dtype_named


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    example = "Example: rtpurbo eval build/demo/adapter --suite ppl,sparsity --lengths 4096 -o out/"
    app.command("eval", epilog=example)(evaluate)
    app.command("corpus", epilog="Example: rtpurbo corpus --chars 80000 -o build/texts")(corpus)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in _words(text)))
    except ValueError:
        raise ValueError(f"{option}: expected integers separated by commas, got {text!r}") from None


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="RTPurbo checkpoint: a folder or a Hub id. With --ablate a base model, as in adapt.")
    ],
    output: Output,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suites, by comma: ruler, ppl, kl, passkey, sparsity.",
            show_default="ruler,ppl,sparsity; with --ablate ppl,passkey,sparsity; with --lm-eval none",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a sample, by comma.")] = "4096",
    variants: Annotated[
        str,
        typer.Option(
            help="Variants in all suites, by comma: dense, streaming, headwise, sparse, sparse_prefill (sparse with "
            "tiled sparse prefill), with settings as sparse:p=0.95+floor=128 (p, floor, block, window, sinks, prefill, "
            "kv: sparse:kv=int8)."
        ),
    ] = "dense,streaming,headwise,sparse",
    emulated: Annotated[
        str | None,
        typer.Option(
            help="Variants in all suites but ruler. Other selectors than the index cannot generate, only be emulated: "
            "topk:256, topk:equal, oracle, oracle:0.95, quest:0.9, quest:256, quest:equal, int8."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="'base': measure against the dense base model; or another checkpoint, side by side."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The variant that the others are measured against.", show_default="dense, or the base"),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            help="Adapt a base model with one setting changed at a time, by comma: heads, ratio, index_dim, rotary, "
            "split, sharing, init, learning_rate, steps (trained anew), p, floor, block, window, selector. Trains at "
            "the longest of --lengths."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="With --ablate, settings to start from: default, paper or demo.")] = (
        "default"
    ),
    window: Annotated[
        int | None, typer.Option(help="With --ablate, sliding window.", show_default="a quarter of the length")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="With --ablate, stage-1 steps of each setting.")] = None,
    train_blocks: Annotated[int | None, typer.Option(help="With --ablate, blocks in the training set.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="With --ablate, stage-1 learning rate.")] = None,
    ratio: Annotated[float | None, typer.Option(help="With --ablate, part of the query heads that retrieve.")] = None,
    head_rule: Annotated[
        str | None, typer.Option(help="With --ablate, score or even: how retrieval heads are chosen.")
    ] = None,
    index_dim: Annotated[int | None, typer.Option(help="With --ablate, index dimensions.")] = None,
    index_rotary_dim: Annotated[int | None, typer.Option(help="With --ablate, rotated ones of them.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="With --ablate, floor on the selected tokens.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model of an adapter: folder, GGUF or short name.", show_default="what it names"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of suite ruler, by comma.", show_default="all; qa with --qa-data")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts of each ruler task, and passkey documents.")] = 10,
    blocks: Annotated[int, typer.Option(help="Text blocks.")] = 8,
    rows: Annotated[int, typer.Option(help="Scored rows of a text block: its last ones.")] = 512,
    data: Data = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of lm-eval (pip install lm-eval), by comma, e.g. arc_easy,hellaswag, for --variants and with "
            "--compare base the base model. Prompts are cut at the longest of --lengths.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --lm-eval, documents of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="With --lm-eval, examples before a question.", show_default="the task's")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="With --lm-eval, a folder with further task files (YAML).")
    ] = None,
    qa_data: Annotated[
        Path | None, typer.Option(help="SQuAD .json, or .jsonl of question, answers and context.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of samples and of the bootstrap; with --ablate of training too.")
    ] = 0,
    split_seed: Annotated[
        int, typer.Option(min=0, help="Seed of the adaptation: its held-out documents are scored.")
    ] = 0,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="No adaptation saw any of --data: score all of its documents.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of the prompts that ruler answers together.")] = 131072,
    device: Device = "auto",
    dtype: Precision = None,
) -> None:
    """Measure fidelity: tasks, perplexity, divergence and sparsity, with 95 % intervals; goes on if interrupted.

    Writes fidelity.json, .md and .png, or with --ablate ablation.*. Decode emulation: every scored token attends as a
    decode step would.
    """
    from .evaluation.harness_tasks import HarnessPlan
    from .evaluation.results import markdown
    from .evaluation.suites import HARNESS, Plan
    from .evaluation.tasks import TASKS
    from .evaluation.variants import parse_variants

    asked = _words(tasks) if tasks else tuple(name for name in TASKS if name != "qa" or qa_data is not None)
    suites = _words(suite or ("ruler,ppl,sparsity" if ablate is None else "ppl,passkey,sparsity"))
    harness = None
    if lm_eval is not None:
        if ablate is not None:
            raise ValueError("--lm-eval asks a checkpoint: it does not go with --ablate")
        harness = HarnessPlan(_words(lm_eval), limit=limit, shots=shots, include=lm_eval_include)
        suites = (*(suites if suite else ()), HARNESS)
    plan = Plan(
        suites=suites,
        lengths=_integers(lengths, "--lengths"),
        tasks=asked,
        samples=samples,
        blocks=blocks,
        rows=rows,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    device = device_named(device)
    where: dict[str, Any] = {"data": data or "system", "device": device, "dtype": dtype_named(dtype, device)}
    if ablate is not None:
        from .ablation import ablate as run_ablation
        from .presets import preset as named

        context = max(plan.lengths)
        settings = named(
            preset,
            context=context,
            sliding_window=window or context // 4,
            steps=steps,
            train_blocks=train_blocks,
            learning_rate=learning_rate,
            ratio=ratio,
            head_rule=head_rule,
            index_dim=index_dim,
            index_rotary_dim=index_rotary_dim,
            index_min_tokens=min_tokens,
        )
        outcome = run_ablation(checkpoint, output, plan, names=_words(ablate), settings=settings, **where)
    else:
        from .evaluation.run import evaluate as run

        outcome = run(
            checkpoint_named(checkpoint),
            output,
            plan,
            variants=parse_variants(variants),
            emulated=parse_variants(emulated) if emulated else [],
            compare=compare,
            reference=reference,
            base=base,
            qa_data=qa_data,
            harness=harness,
            split_seed=split_seed,
            unseen=unseen,
            **where,
        )
    typer.echo(markdown(outcome.rows, outcome.meta))
    typer.echo("\n".join(f"wrote {path}" for path in outcome.files))


def corpus(
    output: Output,
    chars: Annotated[int, typer.Option(help="Characters of a document, about; four make a token or more.")] = 100_000,
    sources: Annotated[
        str | None, typer.Option(help="By comma: bible, anarchism, jargon, python-topics, python.", show_default="all")
    ] = None,
) -> None:
    """Write this machine's free texts as SOURCE.jsonl, for --data: each joined, and cut into documents of one size."""
    from .corpus import write_corpus

    for path, count in write_corpus(output, chars=chars, sources=_words(sources) if sources else None).items():
        typer.echo(f"{path}: {count} documents")
