"""Saving and loading: full checkpoints, and adapters that hold only the indexers and name their base model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from .export_rtpurbo import AUTO_MAP, code_files, export_code
from .integrity_rtpurbo import (
    INDEXER_FILE,
    check_indexers,
    digests,
    explain_damage,
    is_indexer_key,
    load_indexer_file,
    shard_files,
)
from .offload_rtpurbo import bring_back, execution_device
from .push_rtpurbo import commit_to_hub, is_hub_id, is_weight_file, portable_config, require_hub_base

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    _Model = PreTrainedModel
else:
    _Model = object


class CheckpointMixin(_Model):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of `RTPurboForCausalLM`."""

    _adapter_only = False

    @property
    def device(self) -> torch.device:
        """Where inputs belong; with offloaded weights, where accelerate runs the first module."""
        # not super(): torch.compile cannot follow a property through it
        device = next(self.parameters()).device
        if device.type == "meta":
            return execution_device(self) or device
        return device

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a full checkpoint, an adapter (with its base from `config.base_model_name_or_path`), or a base model.

        A base model's own checkpoint is wrapped when `config` is an `RTPurboConfig`; its indexers then start fresh.
        Without `config`, fields of the stored one can be set here: `from_pretrained(name, kv_cache_dtype="int8")`.
        Weights are read from safetensors only, unless `use_safetensors=False` is passed.

        Raises:
            ValueError: weights are missing, unexpected, unreadable or of another shape; the message names file and
                key. Or an adapter from the Hub names a path on this machine as its base.
            NotImplementedError: tensor parallelism was asked for.
        """
        if kwargs.get("tp_plan") is not None or kwargs.get("tp_size") is not None:
            raise NotImplementedError(
                "RTPurbo models do not run tensor-parallel: head lists are global. Use device_map instead"
            )
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        if config is None:
            fields = {key: kwargs.pop(key) for key in cls.config_class.own_fields() if key in kwargs}
            config = cls.config_class.from_pretrained(name, **hub, **fields)
        if "gguf_file" not in kwargs:
            kwargs.setdefault("use_safetensors", True)
        own, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if own.get("model_type") != cls.config_class.model_type:
            with cls._indexers_may_be_missing():
                return super().from_pretrained(name, *args, config=config, **kwargs)
        quiet = {
            f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")
        }
        file = cached_file(name, INDEXER_FILE, **quiet, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        if file is not None:
            cls._check_base(name, own, config)
            model, info = cls._from_adapter(name, file, *args, config=config, hub=hub, **kwargs)
        else:
            model, info = cls._load_checked(name, *args, config=config, **kwargs)
            for module in model.indexers().values():
                bring_back(module)
            check_indexers(model.indexer_state_dict(), name)
        return (model, info) if wants_info else model

    @classmethod
    def _check_base(cls, name, own: dict, config) -> None:
        base = config.base_model_name_or_path
        if not isinstance(base, str) or not base:
            raise ValueError(f"{name} holds an adapter, but its config names no base_model_name_or_path")
        # a name that the caller set on the config is the caller's own; one from the Hub is a stranger's
        from_hub = not Path(name).is_dir() and own.get("base_model_name_or_path") == base
        if from_hub and (not is_hub_id(base) or Path(base).exists()):
            raise ValueError(
                f"the Hub repository {name} names {base!r} as its base model, which is a path on this machine: if that "
                "is the base you want, load the config first, set config.base_model_name_or_path, and pass config="
            )

    @classmethod
    def _from_adapter(cls, name, file, *args, config, hub, **kwargs):
        # these name the adapter's repository, not the base's
        for key in ("revision", "subfolder", "_commit_hash"):
            kwargs.pop(key, None)
        if lora := kwargs.get("adapter_kwargs"):
            own = "_adapter_model_path" not in lora  # else they belong to a LoRA on top
            kwargs["adapter_kwargs"] = {
                key: value for key, value in lora.items() if not (own and key in ("revision", "_commit_hash"))
            }
        config._commit_hash = None
        base, revision = config.base_model_name_or_path, config.base_model_revision or "main"
        with cls._indexers_may_be_missing():
            model, info = cls._load_checked(base, *args, config=config, revision=revision, **kwargs)
        model.load_indexers(file)
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        model.config._name_or_path = model.name_or_path = str(name)
        return model, info

    @classmethod
    def _load_checked(cls, name, *args, config, **kwargs):
        """`(model, loading info)` of the stock loader; what does not fit is an error that names file and key."""
        index = Path(name) / "model.safetensors.index.json"
        if index.is_file():
            shard_files(index)
        try:
            model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
            with torch.device("meta"):
                shapes = {key: value.shape for key, value in cls(config).state_dict().items()}
            try:
                explain_damage(cls._weight_files(name, hub), shapes)
            except ValueError as damage:
                raise damage from error
            raise
        missing, unexpected = sorted(info["missing_keys"]), sorted(filter(is_indexer_key, info["unexpected_keys"]))
        if missing or unexpected:
            raise ValueError(
                f"{name}: its weights do not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        return model, info

    @classmethod
    def _weight_files(cls, name, hub: dict) -> list[Path]:
        """The weight files of a full checkpoint or base, as far as they are on this machine."""
        local = {**hub, "local_files_only": True}
        for entry in ("model.safetensors", "model.safetensors.index.json"):
            try:
                found = cached_file(name, entry, **local)
            except OSError:
                continue
            if found is not None:
                return [path for path in shard_files(Path(found)) if path.is_file()]
        return []

    @classmethod
    @contextlib.contextmanager
    def _indexers_may_be_missing(cls) -> Iterator[None]:
        previous = cls._keys_to_ignore_on_load_missing
        cls._keys_to_ignore_on_load_missing = [*(previous or []), r"\.indexer\."]
        try:
            yield
        finally:
            cls._keys_to_ignore_on_load_missing = previous

    def indexer_state_dict(self) -> dict[str, torch.Tensor]:
        """The indexers' weights by their full names."""
        return {key: value for key, value in self.state_dict().items() if is_indexer_key(key)}

    def load_indexers(self, path: str | Path) -> None:
        """Fill the indexers from a file that `save_pretrained(adapter_only=True)` wrote.

        Raises:
            ValueError: see `load_indexer_file`.
        """
        tensors = load_indexer_file(path, self.indexer_state_dict())
        with torch.no_grad():
            for key, tensor in tensors.items():
                name, _, leaf = key.rpartition(".")
                module = self.get_submodule(name)
                bring_back(module, empty=True)
                getattr(module, leaf).copy_(tensor)

    def save_pretrained(
        self, save_directory, *args, adapter_only: bool | None = None, push_to_hub: bool = False, **kwargs
    ):
        """As in transformers, with the code that loads the model; `adapter_only=True` leaves out the base weights.

        Raises:
            ValueError: an adapter without a base to name, or into a folder that holds full weights.
        """
        adapter_only = self._adapter_only if adapter_only is None else adapter_only
        if push_to_hub:
            pushed = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
            self.save_pretrained(save_directory, *args, adapter_only=adapter_only, **kwargs)
            # the stock path would upload what super() wrote, without the code
            if kwargs.get("is_main_process", True):
                self._push_folder(Path(save_directory), repo_id, adapter_only=adapter_only, **pushed)
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, and {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.auto_map = dict(AUTO_MAP)
        classes: tuple[Any, ...] = (type(self), type(self.config))
        registered = [cls._auto_class for cls in classes]
        # the stock copier of custom code knows flat folders only
        for cls in classes:
            cls._auto_class = None
        try:
            if adapter_only:
                self._save_adapter(folder, is_main_process=kwargs.get("is_main_process", True))
            else:
                (folder / INDEXER_FILE).unlink(missing_ok=True)
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            for cls, value in zip(classes, registered, strict=True):
                cls._auto_class = value
        if kwargs.get("is_main_process", True):
            export_code(folder)

    def _save_adapter(self, folder: Path, *, is_main_process: bool) -> None:
        if not self.config.base_model_name_or_path:
            raise ValueError("an adapter must name its base: set config.base_model_name_or_path, or save full weights")
        if any(folder.glob("model*.safetensors")):
            raise ValueError(f"{folder} holds full weights: save the adapter into a folder of its own")
        if not is_main_process:
            return
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.indexer_state_dict().items()}
        temporary = folder / f".{INDEXER_FILE}.tmp"
        save_file(weights, temporary, metadata={"format": "pt", **digests(weights)})
        temporary.replace(folder / INDEXER_FILE)

    def push_to_hub(  # type: ignore[override]  # the parent's keywords are taken as **kwargs
        self,
        repo_id: str,
        *,
        adapter_only: bool | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> CommitInfo:
        """Push config, code and weights in one commit; `adapter_only=True` leaves out the base's weights.

        Takes `private`, `revision`, `token`, `create_pr`, `commit_message`, `commit_description`, `max_shard_size`
        and `tags` as every model of transformers. A repository without a card gets a short one;
        `rtpurbo_hf.hub.push` makes a full one, with tokenizer, calibration and figures.

        Raises:
            ValueError: an adapter whose base is not a Hub id.
        """
        adapter_only = self._adapter_only if adapter_only is None else adapter_only
        if adapter_only:
            require_hub_base(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_only=adapter_only, max_shard_size=max_shard_size)
            return self._push_folder(Path(folder), repo_id, adapter_only=adapter_only, **kwargs)

    def _push_folder(self, folder: Path, repo_id: str, *, adapter_only: bool, **kwargs) -> CommitInfo:
        """Commit what `save_pretrained` wrote into `folder`, and nothing else that lies there."""
        if adapter_only:
            require_hub_base(self.config)
        written = {*code_files(), "config.json", "generation_config.json"}
        files: dict[str, Path | bytes] = {
            p.name: p for p in folder.iterdir() if p.name in written or is_weight_file(p.name)
        }
        files["config.json"] = portable_config((folder / "config.json").read_text(encoding="utf-8"))
        base = self.config.base_model_name_or_path
        card_data = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rtpurbo"]}
        if is_hub_id(base):
            card_data["base_model"] = base
        return commit_to_hub(repo_id, files, card_data=card_data, **kwargs)
