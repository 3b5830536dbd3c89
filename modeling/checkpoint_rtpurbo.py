"""Saving and loading: full checkpoints, and adapters that hold only the indexers and name their base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .export_rtpurbo import AUTO_MAP, export_code

INDEXER_FILE = "rtpurbo_indexer.safetensors"
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)


def is_indexer_key(key: str) -> bool:
    return ".indexer." in key


def load_indexer_file(path: str | Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read an indexer file and compare it with the parameters that it must fill.

    Raises:
        ValueError: unreadable file, a missing or unexpected key, a wrong shape, or a value that is not finite; the
            message names file and key.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): download or save it again") from error
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit this config's retrieval_heads: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, the config asks for {tuple(expected[key].shape)}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} holds values that are not finite floating-point numbers")
    return tensors


class CheckpointMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of `RTPurboForCausalLM`."""

    _adapter_only = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a full checkpoint, an adapter (with its base from `config.base_model_name_or_path`), or a base model.

        A base model's own checkpoint is wrapped when `config` is an `RTPurboConfig`; its indexers then start fresh.

        Raises:
            ValueError: indexer weights are missing, unexpected, unreadable or of another shape.
            NotImplementedError: tensor parallelism was asked for.
        """
        if kwargs.get("tp_plan") is not None or kwargs.get("tp_size") is not None:
            raise NotImplementedError(
                "RTPurbo models do not run tensor-parallel: head lists are global. Use device_map instead"
            )
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        if config is None:
            config = cls.config_class.from_pretrained(name, **hub)
        own, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if own.get("model_type") != cls.config_class.model_type:
            with cls._indexers_may_be_missing():
                return super().from_pretrained(name, *args, config=config, **kwargs)
        file = cached_file(
            name,
            INDEXER_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if file is not None:
            return cls._from_adapter(name, file, *args, config=config, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        missing = sorted(filter(is_indexer_key, info["missing_keys"]))
        unexpected = sorted(filter(is_indexer_key, info["unexpected_keys"]))
        if missing or unexpected:
            raise ValueError(
                f"{name}: its weights do not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        return (model, info) if wants_info else model

    @classmethod
    def _from_adapter(cls, name, file, *args, config, **kwargs):
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(f"{name} holds an adapter, but its config names no base_model_name_or_path")
        # these name the adapter's repository, not the base's; adapter_kwargs stay, they belong to a LoRA on top
        for key in ("revision", "subfolder", "_commit_hash"):
            kwargs.pop(key, None)
        config._commit_hash = None
        wants_info = kwargs.pop("output_loading_info", False)
        with cls._indexers_may_be_missing():
            model, info = super().from_pretrained(
                base,
                *args,
                config=config,
                revision=config.base_model_revision or "main",
                output_loading_info=True,
                **kwargs,
            )
        model.load_indexers(file)
        model.config._name_or_path = model.name_or_path = str(name)
        return (model, info) if wants_info else model

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
                module, _, leaf = key.rpartition(".")
                getattr(self.get_submodule(module), leaf).copy_(tensor)

    def save_pretrained(
        self, save_directory, *args, adapter_only: bool | None = None, push_to_hub: bool = False, **kwargs
    ):
        """As in transformers, with the code that loads the model; `adapter_only=True` leaves out the base weights.

        Raises:
            ValueError: an adapter without a base to name, or into a folder that holds full weights.
        """
        adapter_only = self._adapter_only if adapter_only is None else adapter_only
        if push_to_hub:
            # the stock path uploads only what super().save_pretrained wrote; push_to_hub commits the code as well
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            keep = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size", "tags")
            pushed = {key: kwargs[key] for key in keep if key in kwargs}
            for key in keep[:5] + keep[6:]:
                kwargs.pop(key, None)
            self.save_pretrained(save_directory, *args, adapter_only=adapter_only, **kwargs)
            return self.push_to_hub(repo_id, adapter_only=adapter_only, **pushed)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, and {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.auto_map = dict(AUTO_MAP)
        classes = (type(self), type(self.config))
        registered = [cls._auto_class for cls in classes]
        # the stock copier of custom code knows flat folders only
        for cls in classes:
            cls._auto_class = None
        try:
            if adapter_only:
                result = self._save_adapter(folder, is_main_process=kwargs.get("is_main_process", True))
            else:
                (folder / INDEXER_FILE).unlink(missing_ok=True)
                result = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            for cls, value in zip(classes, registered, strict=True):
                cls._auto_class = value
        if kwargs.get("is_main_process", True):
            export_code(folder)
        return result

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
        save_file(weights, temporary, metadata={"format": "pt"})
        temporary.replace(folder / INDEXER_FILE)

    def push_to_hub(self, repo_id: str, *args, adapter_only: bool | None = None, **kwargs):
        """As in transformers; `adapter_only=True` pushes the indexers, the config and the code only."""
        previous = self._adapter_only
        # transformers hands save_pretrained few arguments from here: the choice has to travel on the instance
        self._adapter_only = previous if adapter_only is None else adapter_only
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            self._adapter_only = previous
