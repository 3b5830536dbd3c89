"""The commands `push`, `card`, `export-headwise` and `import-heads`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Weights(StrEnum):
    saved = "saved"
    adapter = "adapter"
    full = "full"


class HeadFormat(StrEnum):
    auto = "auto"
    headwise = "headwise"
    duo = "duo"
    json = "json"


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
License = Annotated[str | None, typer.Option(help="Licence of the base model, as the Hub names it: apache-2.0, ...")]
Figures = Annotated[list[Path] | None, typer.Option("--figure", help="A picture for the card; may be repeated.")]
Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", help="Hub id of training data, for the card; may be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: rtpurbo push build/demo me/SmolLM2-135M-RTPurbo --dry-run")(push)
    app.command(epilog="Example: rtpurbo card build/demo/report --output README.md")(card)
    app.command("export-headwise", epilog="Example: rtpurbo export-headwise build/demo/adapter --output headwise.json")(
        export_headwise
    )
    app.command(
        "import-heads",
        epilog="Example: rtpurbo import-heads full_attention_heads.tsv --base Qwen/Qwen3-8B -o heads.json",
    )(import_heads)


def _claim(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: choose another --output, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)


def push(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder, or the output folder of `rtpurbo adapt`.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository: owner/name, or a name in your own namespace.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.", show_default="your default")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", show_default="the one you are logged in with")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    weights: Annotated[Weights, typer.Option(help="Index only, all weights, or as saved.")] = Weights.saved,
    base: Annotated[str | None, typer.Option(help="Hub id of the base, in place of what the config names.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the base.")] = None,
    report: Annotated[Path | None, typer.Option(help="report.json in place of the one beside the checkpoint.")] = None,
    figure: Figures = None,
    license: License = None,
    dataset: Datasets = None,
    max_shard_size: Annotated[str, typer.Option(help="Of full weights that are converted.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, with sizes; push nothing.")] = False,
) -> None:
    """Push code, config, weights, tokenizer, calibration, figures and card to the Hub, in one commit."""
    from .hub import push as run

    done = run(
        source,
        repo_id,
        private=private,
        revision=revision,
        token=token,
        create_pr=create_pr,
        commit_message=message,
        weights=weights.value,
        base=base,
        base_revision=base_revision,
        report=report,
        figures=figure or [],
        license=license,
        datasets=dataset or [],
        max_shard_size=max_shard_size,
        dry_run=dry_run,
    )
    package = done.package
    if done.commit is None:
        for file in package.files:
            typer.echo(f"{file.size:>14,}  {file.path}{'' if file.content is not None else '  (predicted)'}")
        typer.echo(f"{package.size:>14,}  bytes in {len(package.files)} files ({package.shape} checkpoint)")
    for note in package.notes:
        typer.echo(f"note: {note}")
    for problem in package.problems:
        typer.echo(f"a push would be refused: {problem}")
    if done.commit is not None:
        typer.echo(done.commit.pr_url or done.commit.commit_url)


def card(
    report: Annotated[Path, typer.Argument(help="report.json, or the folder that holds it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Card to write.")] = Path("README.md"),
    repo_id: Annotated[str | None, typer.Option(help="Hub repository that the card is for.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder, for base model and settings.")] = None,
    figure: Figures = None,
    license: License = None,
    dataset: Datasets = None,
    overwrite: Overwrite = False,
) -> None:
    """Render a model card from a report; pictures beside the report are shown, and copied beside the card."""
    from .auto import RTPurboConfig
    from .cards import License as Terms
    from .cards import read_report, render_card
    from .memory_plot import can_plot, memory_figure

    path = report / "report.json" if report.is_dir() else report
    facts = read_report(path)
    config = None if checkpoint is None else RTPurboConfig.from_pretrained(checkpoint)
    pictures = {picture.name: picture for picture in [*sorted(path.parent.glob("*.png")), *(figure or [])]}
    for picture in pictures.values():
        if not picture.is_file():
            raise ValueError(f"figure {picture} is not there")
    _claim(output, overwrite)
    figures = {name: picture.read_bytes() for name, picture in pictures.items()}
    if config is not None and config.retrieval_heads is not None and "memory.png" not in figures and can_plot():
        figures["memory.png"] = memory_figure(config)
    text = render_card(
        facts,
        repo_id=repo_id,
        config=config,
        figures=[f"figures/{name}" for name in sorted(figures)],
        license=None if license is None else Terms(license),
        datasets=dataset or [],
    )
    for name, content in figures.items():
        target = output.parent / "figures" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    output.write_text(str(text), encoding="utf-8")
    typer.echo(f"wrote {output} with {len(figures)} figures")


def export_headwise(
    checkpoint: Annotated[str, typer.Argument(help="RTPurbo checkpoint: a folder or a Hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default="print")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the retrieval heads as RTP-LLM's headwise_config (an entry for the base model's config.json)."""
    from .auto import RTPurboConfig
    from .interop import export_headwise as run

    record = {"headwise_config": run(RTPurboConfig.from_pretrained(checkpoint))}
    if output is None:
        typer.echo(json.dumps(record))
        return
    _claim(output, overwrite)
    output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    typer.echo(f"wrote {output}")


def import_heads(
    file: Annotated[
        Path, typer.Argument(help="headwise_config, DuoAttention pattern (.tsv or folder), or heads JSON.")
    ],
    base: Annotated[str, typer.Option(help="The model it is for: Hub id, folder, or short name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON of heads to write.")],
    format: Annotated[HeadFormat, typer.Option(help="Format of the file.")] = HeadFormat.auto,
    threshold: Annotated[float | None, typer.Option(help="DuoAttention: gates from here on retrieve.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="DuoAttention: part of the KV heads that is local.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read the retrieval heads of another project and write them as a plain JSON, checked against the model."""
    from transformers import AutoConfig

    from .auto import RTPurboConfig
    from .interop import load_heads
    from .modeling.families_rtpurbo import full_attention_layers, head_counts
    from .sources import base_path

    config = AutoConfig.from_pretrained(base_path(base))
    if not isinstance(config, RTPurboConfig):
        config = RTPurboConfig(base_config=config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    pattern = load_heads(
        file,
        num_layers=layers,
        num_heads=head_counts(config)[0],
        format=format.value,
        threshold=threshold,
        sparsity=sparsity,
    ).only(full_attention_layers(config.base_config))
    _claim(output, overwrite)
    output.write_text(json.dumps(pattern.options()) + "\n", encoding="utf-8")
    typer.echo(f"{sum(map(len, pattern.retrieval_heads))} retrieval heads in {layers} layers; wrote {output}")
