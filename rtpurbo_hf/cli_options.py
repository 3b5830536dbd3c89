"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Base = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or a short name: smollm2-135m, gemma3-270m.")]
Checkpoint = Annotated[str, typer.Argument(help="RTPurbo checkpoint: a folder or a Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a file, folder, Hub data set, or 'system'; SOURCE@FIELD names the text's field. May be repeated.",
        show_default="system",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of data order, needles, initialisation and sampling.")
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, or auto.")]
Precision = Annotated[
    DType | None, typer.Option(help="Dtype of the model.", show_default="float32 on CPU, else bfloat16")
]


def device_named(name: str) -> str:
    """The device that `name` means here; ValueError if it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; use cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
    # torchrun: each process has a GPU of its own
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


def dtype_named(choice: DType | None, device: str):
    """The torch dtype of a choice; None: float32 on the CPU, else bfloat16."""
    import torch

    if choice is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, choice.value)


def checkpoint_named(name: str) -> str:
    """`name`, if it can be a checkpoint; ValueError otherwise."""
    from .interop import parse_json

    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1:
            raise ValueError(f"checkpoint {name!r} is neither a folder nor a Hub id 'owner/name'")
        return name
    config = folder / "config.json"
    if not config.is_file():
        inside = [str(folder / part) for part in ("model", "adapter") if (folder / part / "config.json").is_file()]
        advice = f"; give {' or '.join(inside)}" if inside else ""
        raise ValueError(f"checkpoint {name!r}: the folder has no config.json{advice}")
    found = parse_json(config.read_text(encoding="utf-8"), config)
    if isinstance(found, dict) and found.get("model_type") != "rtpurbo":
        raise ValueError(
            f"checkpoint {name!r} is a {found.get('model_type')!r} model, not an RTPurbo one: `rtpurbo adapt` makes one"
        )
    return name


def text_of(path: Path, option: str) -> str:
    """The UTF-8 text of the file that an option names; ValueError where it is none."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 text: {error}") from error
