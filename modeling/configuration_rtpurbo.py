"""The configuration of an RTPurbo model: a base model's own config, plus which heads retrieve and how they select."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .versions_rtpurbo import FORMAT_VERSION, check_base_values, migrate

INDEX_BLOCK_SIZES = (1, 16, 32, 64)
INDEX_KEY_SHARING = ("head", "kv_head")
RETRIEVAL_PREFILL = ("dense", "sparse", "sparse_tiled")
ATTENTION_BACKENDS = ("auto", "triton", "reference")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
MAX_POSITIONS = 1 << 30

# Attributes that must be looked up here and never in the base config.
_NOT_DELEGATED = frozenset(
    {
        "text_config",
        "decoder",
        "generator",
        "text_encoder",
        "auto_map",
        "quantization_config",
        "per_layer_config",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_post_init_done",
    }
)
_COPIED = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"RTPurboConfig: {message}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class RTPurboConfig(PreTrainedConfig):
    """Configuration of `RTPurboForCausalLM`. Attributes that are not listed here are read from `base_config`.

    Args:
        base_config: config of the wrapped base model (a dict with `model_type`, or a config object, which is copied).
        base_model_name_or_path: where the base weights are (adapter checkpoints load them from there).
        base_model_revision: revision of the base weights; pin it when you publish an adapter.
        retrieval_heads: per layer, the sorted query heads that keep the whole context. None: none chosen yet.
        index_dim: dimensions of an index query or key (PAPER section 3: 16).
        index_rotary_dim: how many of them are rotated with their position; even; 0 is the paper's index.
        index_rotary_wavelengths: shortest and longest wavelength of these, in tokens.
        index_top_p: attention mass that a row's selected set must reach, in (0, 1]; 1 selects everything.
        index_min_tokens: floor on the size of the selected set; 0 is the paper's selection.
        index_block_size: tokens per selected block: 1, 16, 32 or 64.
        index_key_sharing: `"head"`, an index key for each retrieval query head; `"kv_head"`, one for each KV group.
        sliding_window: tokens that a local head sees, its own included.
        num_sink_tokens: first real tokens of the sequence that every local head sees.
        retrieval_prefill: `"dense"`, retrieval heads attend to everything at prefill (the paper); `"sparse"`, each
            prefill row attends to its own top-p set, as decode does (exact, and slow); `"sparse_tiled"`, each tile of
            128 rows attends to one list of key blocks, chosen by the index (fast; see `kernels/tile_blocks.py`).
        decode_max_queries: a forward on a non-empty cache with at most this many tokens is a decode step.
        dense_below: a forward whose cached and new tokens are fewer than this attends as the base model does (of a
            decode step of several tokens the first one is counted); the cache keeps everything until then, and is not
            made whole again by a crop. 0: never.
        attention_backend: `"auto"`, `"triton"` or `"reference"`.
        kv_cache_dtype: of the cached keys and values that retrieval heads read: `"auto"`, the model's; `"int8"` or
            `"fp8"` (e4m3), with a scale for each token and KV head. What local heads keep is never quantised.
        format_version: version of this format.

    Raises:
        ValueError: a value out of its range; the message names the field, the value and the range.
    """

    model_type = "rtpurbo"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012

    base_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    retrieval_heads: list | None = None
    index_dim: int = 16
    index_rotary_dim: int = 0
    index_rotary_wavelengths: list | tuple = (64.0, 131072.0)
    index_top_p: float = 0.9
    index_min_tokens: int = 0
    index_block_size: int = 1
    index_key_sharing: str = "head"
    sliding_window: int = 8192
    num_sink_tokens: int = 4
    retrieval_prefill: str = "dense"
    decode_max_queries: int = 16
    dense_below: int = 0
    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if isinstance(self.base_config, dict):
            values = dict(self.base_config)
            model_type = values.pop("model_type", None)
            _require(isinstance(model_type, str), "base_config needs its own 'model_type'")
            check_base_values(values)
            self.base_config = AutoConfig.for_model(model_type, **values)
        elif self.base_config is not None:
            # setting an attention implementation recurses into sub-configs: never alias a live model's config
            self.base_config = copy.deepcopy(self.base_config)
        super().__post_init__(**kwargs)
        if self.base_config is not None:
            for name in _COPIED:
                if hasattr(self.base_config, name):
                    setattr(self, name, getattr(self.base_config, name))
        self.check()

    def convert_rope_params_to_dict(self, **kwargs):
        """Nothing to do: the base's config has settled its rotation, and what is read from there must not change."""
        return kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, from a stored config of this or an older format.

        Raises:
            ValueError: whatever makes the values unusable, also where the base family's own config refuses them.
        """
        check_base_values(config_dict)
        try:
            made = super().from_dict(migrate(config_dict), **kwargs)
            # keyword arguments replace values after the object has checked its own
            (made[0] if isinstance(made, tuple) else made).check()
            return made
        except (ValueError, MemoryError):
            raise
        except Exception as error:
            # the base family's config class may fail in any way on values that it does not expect
            raise ValueError(f"RTPurboConfig: unusable values ({type(error).__name__}: {error})") from error

    @classmethod
    def own_fields(cls) -> tuple[str, ...]:
        """Fields of this config, beyond those of every config, that a caller may set while loading."""
        return tuple(name for name in cls.__annotations__ if name not in ("base_config", "format_version"))

    def check(self) -> None:
        """Raise a `ValueError` that names the first field whose value is out of range."""
        _require(
            _is_int(self.format_version) and self.format_version >= 1,
            f"format_version must be a positive integer, got {self.format_version!r}",
        )
        _require(
            self.format_version <= FORMAT_VERSION,
            f"this checkpoint has format_version {self.format_version}, this code reads up to {FORMAT_VERSION}: "
            "upgrade rtpurbo_hf, or load it with trust_remote_code=True",
        )
        for name, low, high in (
            ("index_dim", 1, 256),
            ("index_rotary_dim", 0, 256),
            ("index_min_tokens", 0, MAX_POSITIONS),
            ("sliding_window", 1, MAX_POSITIONS),
            ("num_sink_tokens", 0, 1024),
            ("decode_max_queries", 1, 1024),
            ("dense_below", 0, MAX_POSITIONS),
        ):
            value = getattr(self, name)
            _require(
                _is_int(value) and low <= value <= high,
                f"{name} must be an integer in [{low}, {high}], got {value!r}",
            )
        _require(
            self.index_rotary_dim % 2 == 0 and self.index_rotary_dim <= self.index_dim,
            f"index_rotary_dim must be even and at most index_dim = {self.index_dim}, got {self.index_rotary_dim}",
        )
        _require(
            isinstance(self.index_top_p, (int, float))
            and not isinstance(self.index_top_p, bool)
            and 0 < self.index_top_p <= 1,
            f"index_top_p must be in (0, 1], got {self.index_top_p!r}",
        )
        waves = self.index_rotary_wavelengths
        _require(
            isinstance(waves, (list, tuple))
            and len(waves) == 2
            and all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in waves)
            and 1 < waves[0] <= waves[1] <= 1 << 40,
            f"index_rotary_wavelengths must be [shortest, longest] with 1 < shortest <= longest, got {waves!r}",
        )
        self.index_rotary_wavelengths = [float(w) for w in waves]
        for name, allowed in (
            ("index_block_size", INDEX_BLOCK_SIZES),
            ("index_key_sharing", INDEX_KEY_SHARING),
            ("retrieval_prefill", RETRIEVAL_PREFILL),
            ("attention_backend", ATTENTION_BACKENDS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
        ):
            value = getattr(self, name)
            _require(
                not isinstance(value, bool) and value in allowed,
                f"{name} must be one of {allowed}, got {value!r}",
            )
        if self.retrieval_heads is not None:
            self._check_heads()

    def _check_heads(self) -> None:
        heads: Any = self.retrieval_heads
        _require(isinstance(heads, (list, tuple)), f"retrieval_heads must be a list per layer, got {heads!r}")
        # a dict has become a config by now
        base: Any = self.base_config
        if base is not None:
            text = base.get_text_config(decoder=True)
            _require(
                len(heads) == text.num_hidden_layers,
                f"retrieval_heads has {len(heads)} layers, the base model has {text.num_hidden_layers}",
            )
        checked = []
        for layer, listed in enumerate(heads):
            _require(
                isinstance(listed, (list, tuple)) and all(_is_int(h) for h in listed),
                f"retrieval_heads[{layer}] must be a list of integers, got {listed!r}",
            )
            _require(
                len(set(listed)) == len(listed),
                f"retrieval_heads[{layer}] lists a head twice: {list(listed)}",
            )
            top = 4096 if text is None else text.num_attention_heads
            bad = [h for h in listed if not 0 <= h < top]
            _require(not bad, f"retrieval_heads[{layer}]: head {bad[:1]} is not in [0, {top})")
            checked.append(sorted(listed))
        self.retrieval_heads = checked

    def get_text_config(self, decoder=None, encoder=None):
        """The base model's text config: what generation and caches of transformers need to know."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder)

    def __getattr__(self, name: str):
        if name.startswith("__") or name in _NOT_DELEGATED or name in type(self).__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        base = self.__dict__.get("base_config")
        if base is None or isinstance(base, dict):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)
