"""What a push to the Hub consists of: every file of a checkpoint and of what belongs to it, gathered and checked.

Files are taken by name: only what belongs to a checkpoint leaves its folder, so that training state, logs or keys that
lie beside it stay where they are.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .auto import RTPurboConfig, RTPurboForCausalLM
from .cards import License, read_report, render_card
from .memory_plot import can_plot, memory_figure
from .modeling.export_rtpurbo import AUTO_MAP, code_files
from .modeling.integrity_rtpurbo import INDEXER_FILE, explain_damage, load_indexer_file, shard_files
from .modeling.push_rtpurbo import is_hub_id, is_weight_file, portable_config

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
REPORT_FILE = "report.json"
MEMORY_FIGURE = "figures/memory.png"
WEIGHTS = ("saved", "adapter", "full")
_SOURCE_RECORD = "rtpurbo_source.json"
_BESIDE = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt"
    r"|(?:tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(?:jinja|json)|generation_config\.json"
    r"|(?:LICENSE|NOTICE)(?:[-_.][\w.-]*)?"
)
_TERMS = re.compile(r"(?:LICENSE|NOTICE|\w+_TERMS)(?:[-_.][\w.-]*)?")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class PackageFile:
    """One file of a push: its path in the repository, where its bytes come from, and how many there are.

    `content` is None in a dry run of weights that only a real push would compute.
    """

    path: str
    content: Path | bytes | None
    size: int


@dataclass(frozen=True)
class Package:
    """Everything that one push commits.

    Attributes:
        files: by path, sorted.
        shape: `"adapter"` or `"full"`.
        problems: why the Hub's users could not load it; a push refuses while there are any.
        notes: what a careful publisher may want to know.
    """

    files: tuple[PackageFile, ...]
    shape: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    def write(self, folder: str | Path) -> None:
        """Write the files into `folder`, as they would lie in the repository."""
        for file in self.files:
            target = Path(folder) / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_bytes(file))


def _bytes(file: PackageFile) -> bytes:
    if file.content is None:
        raise ValueError(f"{file.path} is not there: this package is a dry run")
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint lie: its folder, and beside it what `rtpurbo adapt` wrote."""

    folder: Path
    report: Path | None
    calibration: Path | None
    figures: tuple[Path, ...]


def find_checkpoint(source: str | Path) -> Checkpoint:
    """Find the checkpoint in `source`: a checkpoint folder, or the output folder of `rtpurbo adapt`.

    Raises:
        ValueError: there is no RTPurbo checkpoint.
    """
    root = Path(source)
    folder = root / "adapter" if (root / "adapter" / "config.json").is_file() else root
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{root} holds no checkpoint ({error}); give what `rtpurbo adapt` wrote") from error
    if kind != RTPurboConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, not an RTPurbo checkpoint; `rtpurbo adapt` makes one"
        )
    above = root if folder != root else folder.parent
    places = [root, root / "report", *([above / "report"] if folder.name == "adapter" else [])]
    report = next((place / REPORT_FILE for place in places if (place / REPORT_FILE).is_file()), None)
    calibrations = [folder / CALIBRATION_FILE, root / CALIBRATION_FILE]
    pictures = {} if report is None else {path.name: path for path in sorted(report.parent.glob("*.png"))}
    pictures |= {path.name: path for path in sorted((folder / "figures").glob("*.png"))}
    return Checkpoint(
        folder,
        report,
        next((path for path in calibrations if path.is_file()), None),
        tuple(pictures[name] for name in sorted(pictures)),
    )


def _record_of_base(config: RTPurboConfig) -> dict[str, Any]:
    """What the cache of converted base models tells of a local base: licence and upstream id."""
    base = config.base_model_name_or_path
    if not base or is_hub_id(base) or not (Path(base) / _SOURCE_RECORD).is_file():
        return {}
    return json.loads((Path(base) / _SOURCE_RECORD).read_text(encoding="utf-8"))


def _unreachable(error: Exception) -> bool:
    """Whether a Hub call failed on the network; the client's transport errors belong to its HTTP library (httpx)."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith("httpx")


def _license_on_hub(base: str, token) -> License | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = HfApi(token=token).model_info(base).card_data
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not _unreachable(error):
            raise
        logger.warning("the licence of %s is unknown (%s); give it with license=", base, type(error).__name__)
        return None
    if data is None or not data.license:
        return None
    return License(str(data.license), data.get("license_name"), data.get("license_link"))


def _pinned(base: str, token) -> str | None:
    """The commit that the base's main branch is at; None where the Hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi(token=token).model_info(base).sha
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not _unreachable(error):
            raise
        logger.warning("%s cannot be pinned to a commit (%s)", base, type(error).__name__)
        return None


def _saved_weights(folder: Path, config: RTPurboConfig) -> tuple[str, list[Path]]:
    """Shape and files of the weights in `folder`, checked against the config.

    Raises:
        ValueError: no weights, or damaged ones.
    """
    with torch.device("meta"):
        model = RTPurboForCausalLM(config)
    if (folder / INDEXER_FILE).is_file():
        load_indexer_file(folder / INDEXER_FILE, model.indexer_state_dict())
        return "adapter", [folder / INDEXER_FILE]
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = shard_files(index) if index.is_file() else [single] if single.is_file() else []
    if not files:
        raise ValueError(f"{folder} holds no weights: neither {INDEXER_FILE} nor model*.safetensors")
    explain_damage(files, {key: value.shape for key, value in model.state_dict().items()})
    return "full", [*files, index] if index.is_file() else files


def _converted_weights(folder: Path, config: RTPurboConfig, shape: str, target: Path, max_shard_size) -> list[Path]:
    """Load the checkpoint, save it in the other shape, and list its weight files."""
    model = RTPurboForCausalLM.from_pretrained(folder, config=config, dtype="auto")
    model.save_pretrained(target, adapter_only=shape == "adapter", max_shard_size=max_shard_size)
    return [path for path in target.iterdir() if is_weight_file(path.name)]


def _predicted(config: RTPurboConfig, shape: str) -> PackageFile:
    """Name and bytes of weights that a dry run does not compute (headers left out)."""
    with torch.device("meta"):
        model = RTPurboForCausalLM(config)
    if shape == "adapter":
        return PackageFile(INDEXER_FILE, None, sum(4 * value.numel() for value in model.indexer_state_dict().values()))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    size = sum(p.numel() * (4 if ".indexer." in name else dtype.itemsize) for name, p in model.named_parameters())
    return PackageFile("model.safetensors", None, size)


def build_package(
    source: str | Path,
    *,
    repo_id: str | None = None,
    weights: str = "saved",
    base: str | None = None,
    base_revision: str | None = None,
    report: str | Path | None = None,
    figures: Sequence[str | Path] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    token: bool | str | None = None,
    scratch: str | Path | None = None,
) -> Package:
    """Gather everything that a push of `source` commits. See `push` for the arguments.

    `scratch` takes weights that must be converted; without it, they are only predicted (a dry run).

    Raises:
        ValueError: no checkpoint, damaged weights, a malformed report or calibration, or an unknown choice.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if base is not None and not is_hub_id(base):
        raise ValueError(f"base must be a Hub id 'owner/name', got {base!r}")
    if base_revision is not None and base is None:
        raise ValueError("base_revision needs base: which model is it a revision of?")
    found = find_checkpoint(source)
    config = RTPurboConfig.from_pretrained(found.folder)
    record = _record_of_base(config)
    base_folder = config.base_model_name_or_path or ""
    saved, paths = _saved_weights(found.folder, config)
    shape = saved if weights == "saved" else weights
    contents: dict[str, PackageFile] = {}

    def add(path: str, content: Path | bytes) -> None:
        contents[path] = PackageFile(
            path, content, len(content) if isinstance(content, bytes) else content.stat().st_size
        )

    if shape == saved:
        for path in paths:
            add(path.name, path)
    elif scratch is None:
        contents[INDEXER_FILE if shape == "adapter" else "model.safetensors"] = _predicted(config, shape)
    else:
        for path in _converted_weights(found.folder, config, shape, Path(scratch) / "weights", max_shard_size):
            add(path.name, path)

    problems, notes = _name_base(config, record, shape, base=base, revision=base_revision, token=token)
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [RTPurboForCausalLM.__name__]
    add("config.json", portable_config(config.to_json_string()))
    for name, text in code_files().items():
        add(name, text.encode())
    for path in sorted(found.folder.iterdir()):
        if path.is_file() and _BESIDE.fullmatch(path.name):
            add(path.name, path)
    if shape == "full" and record:
        # weights of a local base travel with the terms that lie beside them
        for path in sorted(Path(base_folder).iterdir()):
            if path.is_file() and _TERMS.fullmatch(path.name):
                contents.setdefault(path.name, PackageFile(path.name, path, path.stat().st_size))
    if not any(name in contents for name in _TOKENIZER):
        notes.append("no tokenizer lies with this checkpoint: users have to load the base model's")
    if found.calibration is not None:
        _check_calibration(found.calibration)
        add(CALIBRATION_FILE, found.calibration)
    else:
        notes.append("no calibration.json lies with this checkpoint")
    report_path = found.report if report is None else Path(report)
    pictures = [*found.figures, *map(Path, figures)]
    for picture in pictures:
        if not picture.is_file() or picture.suffix.lower() not in (".png", ".svg", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"figure {picture} is not a picture file (.png, .svg, .jpg, .webp)")
        add(f"figures/{picture.name}", picture)
    family = config.get_text_config(decoder=True).model_type
    facts = {"model": config.base_model_name_or_path or record.get("upstream") or family}
    if report_path is None:
        notes.append("no report.json: the card has no measurements")
    else:
        facts = read_report(report_path)
        add(REPORT_FILE, report_path)
    if MEMORY_FIGURE not in contents and config.retrieval_heads is not None and can_plot():
        add(MEMORY_FIGURE, memory_figure(config))
    terms = _license(license, config, record, token=token)
    if terms is None and facts.get("license") is None:
        notes.append("the base model's licence is unknown: give it with license=")
    listed = [path for path in sorted(contents) if path.startswith("figures/")]
    if record.get("upstream"):
        facts = {"upstream": record["upstream"], **facts}
    if record.get("file"):
        facts = {"base_file": record["file"], **facts}
        if shape == "adapter" and base is not None:
            notes.append(f"trained and measured on {record['file']}, dequantised: users will run it on {base}")
    card = render_card(
        facts, repo_id=repo_id, config=config, figures=listed, license=terms, datasets=datasets, shape=shape
    )
    add("README.md", str(card).encode())
    files = tuple(contents[name] for name in sorted(contents))
    return Package(files, shape, tuple(problems), tuple(notes))


def _name_base(config, record: dict, shape: str, *, base, revision, token) -> tuple[list[str], list[str]]:
    """Let the config name a base that others can load; returns what stands in the way, and notes."""
    problems: list[str] = []
    notes: list[str] = []
    if base is not None:
        config.base_model_name_or_path, config.base_model_revision = base, revision
    named = config.base_model_name_or_path
    if is_hub_id(named) and not Path(str(named)).is_dir():
        if config.base_model_revision is None:
            config.base_model_revision = _pinned(str(named), token)
            if config.base_model_revision is None:
                notes.append(f"base {named} is not pinned to a commit: give base_revision=")
            else:
                notes.append(f"base {named} is pinned to {config.base_model_revision}")
    elif shape == "adapter":
        hint = f" (it was made from {record['upstream']})" if record.get("upstream") else ""
        problems.append(
            f"the adapter names its base as {named!r}, which nobody else can load{hint}: give base='owner/name', or "
            "weights='full'"
        )
    return problems, notes


def _license(stated: str | None, config, record: dict, *, token) -> License | None:
    if stated is not None:
        return License(stated)
    if record.get("license"):
        return License(record["license"])
    base = config.base_model_name_or_path
    return _license_on_hub(base, token) if is_hub_id(base) and not Path(base).is_dir() else None


def _check_calibration(path: Path) -> None:
    from .training.calibration import Calibration

    Calibration.load(path)
