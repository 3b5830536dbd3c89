"""`RTPurboForCausalLM`: an untouched base model whose full-attention layers attend the RTPurbo way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.common import starts
from ..kernels.indexed import Selector
from .attention_rtpurbo import (
    ATTENTION_NAME,
    QUANTISED_MODES,
    DecodeRows,
    ForwardState,
    RTPurboLayer,
    attention_forward,
    attention_pre_hook,
    rtpurbo_attention,
    rtpurbo_mask,
)
from .cache_rtpurbo import RTPurboCache
from .checkpoint_rtpurbo import CheckpointMixin
from .configuration_rtpurbo import RTPurboConfig
from .families_rtpurbo import (
    CACHE_ARGUMENT,
    attention_modules,
    family_of,
    full_attention_modules,
    head_counts,
    head_dim,
    rope_switches,
)
from .fused_rtpurbo import fuse
from .graph_rtpurbo import graph_for
from .indexer_rtpurbo import RTPurboIndexer, index_rotation
from .padding_rtpurbo import check_continued, check_positions, left_padding
from .plan_rtpurbo import HeadPlan

AttentionInterface.register(ATTENTION_NAME, rtpurbo_attention)
AttentionMaskInterface.register(ATTENTION_NAME, rtpurbo_mask)

MODES = ("sparse", "headwise", "streaming", "dense")
CACHES = (None, "dynamic", "offloaded", "static")


class RTPurboPreTrainedModel(PreTrainedModel):
    config_class = RTPurboConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["indexer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RTPurboIndexer):
            init.normal_(module.q_proj, std=0.02)
            init.normal_(module.k_proj, std=0.02)

    def initialize_weights(self) -> None:
        # modules inside the base are initialised by the base's own rules, which do not know the indexer
        for module in self.modules():
            if isinstance(module, RTPurboIndexer):
                self._initialize_weights(module)
        super().initialize_weights()


class RTPurboForCausalLM(CheckpointMixin, RTPurboPreTrainedModel, GenerationMixin):
    """A causal language model with head-wise and token-wise sparse attention (arXiv 2605.16928).

    `model.model` is the base model. Four attention modes (see `attention_mode`): `"sparse"` is RTPurbo;
    `"headwise"` keeps retrieval heads dense; `"streaming"` has no retrieval heads; `"dense"` is the base model.

    Raises:
        ValueError: the base family is not supported, or the base has no full-attention layer.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: RTPurboConfig):
        if config.base_config is None:
            raise ValueError(
                "RTPurboConfig.base_config is missing: this is no RTPurbo checkpoint; wrap a base model with "
                "RTPurboForCausalLM.from_base, or adapt it with `rtpurbo adapt`"
            )
        self._family = family_of(config.base_config)
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.base_config, attn_implementation=ATTENTION_NAME)
        self.attention = "sparse"
        self._attach()
        self.post_init()

    @classmethod
    def from_base(cls, base: PreTrainedModel, **options) -> RTPurboForCausalLM:
        """Wrap a base model that is already in memory; its weights are shared, not copied.

        Args:
            base: a causal LM of a supported family.
            **options: fields of `RTPurboConfig`.

        Raises:
            ValueError: an option that is no such field.
        """
        unknown = sorted(set(options) - set(RTPurboConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"RTPurboConfig has no field {unknown[0]!r}; see its docstring for the fields")
        options.setdefault("base_model_name_or_path", base.config.name_or_path or None)
        config = RTPurboConfig(base_config=base.config, dtype=base.dtype, **options)
        with torch.device("meta"):
            model = cls(config)
        indexers = {m.layer_idx: m.indexer for m in model.converted() if m.indexer is not None}
        base.set_attn_implementation(ATTENTION_NAME)
        model.model = base
        model.config.base_config = base.config
        model.generation_config = base.generation_config
        model._attach()
        for module in model.converted():
            if module.layer_idx in indexers:
                module.indexer.to_empty(device=base.device)
                module.indexer.float()
                model._init_weights(module.indexer)
        return model.eval() if not base.training else model

    def _attach(self) -> None:
        """Give every converted attention module its plans, its indexer and its hook."""
        config, text = self.config, self.config.get_text_config(decoder=True)
        heads = config.retrieval_heads or [[] for _ in range(text.num_hidden_layers)]
        converted = full_attention_modules(self.model)
        layers = {module.layer_idx for module in converted}
        for layer, listed in enumerate(heads):
            if listed and layer not in layers:
                raise ValueError(
                    f"retrieval_heads names layer {layer}, which is not a full-attention layer of the base model "
                    f"({config.base_config.model_type}); full-attention layers are {sorted(layers)}"
                )
        for module in attention_modules(self.model):
            module.rtpurbo_backend = config.attention_backend
        fuse(self.model, config)
        for module in converted:
            plans = self._plans(tuple(heads[module.layer_idx]))
            module.indexer = None
            if plans["sparse"].retrieval:
                module.indexer = RTPurboIndexer(
                    plans["sparse"],
                    head_dim(module),
                    config.index_dim,
                    config.index_rotary_dim,
                    config.index_rotary_wavelengths,
                )
            first_time = not hasattr(module, "rtpurbo")
            module.rtpurbo = RTPurboLayer(module, self._family, config, plans)
            if not self._family.partial_rotary:
                module.forward = partial(attention_forward, module)
            if first_time:
                module.register_forward_pre_hook(attention_pre_hook, with_kwargs=True)

    def _plans(self, retrieval: tuple[int, ...]) -> dict[str, HeadPlan]:
        size = head_counts(self.config)
        everything = tuple(range(size[0]))
        return {
            "sparse": HeadPlan(*size, retrieval, True, self.config.index_key_sharing),
            "headwise": HeadPlan(*size, retrieval, False),
            "streaming": HeadPlan(*size, (), False),
            "dense": HeadPlan(*size, everything, False),
        }

    def converted(self) -> list[Any]:
        """The base's full-attention modules, in layer order; each has `rtpurbo` (`RTPurboLayer`) and `indexer`."""
        return [m for m in attention_modules(self.model) if hasattr(m, "rtpurbo")]

    def set_retrieval_heads(self, retrieval_heads: list[list[int]]) -> None:
        """Choose the retrieval heads (a list of query heads per layer) and start with fresh indexers."""
        self.config.retrieval_heads = retrieval_heads
        self.config.check()
        device = self.device
        self._attach()
        for module in self.converted():
            if module.indexer is not None:
                module.indexer.to(device)
                self._init_weights(module.indexer)

    def indexers(self) -> dict[int, RTPurboIndexer]:
        """The indexer of each layer that has retrieval heads."""
        return {m.layer_idx: m.indexer for m in self.converted() if m.indexer is not None}

    @contextlib.contextmanager
    def attention_mode(self, mode: str) -> Iterator[None]:
        """Attend in another mode for a while: `"sparse"`, `"headwise"`, `"streaming"` or `"dense"`."""
        if mode not in MODES:
            raise ValueError(f"attention mode must be one of {MODES}, got {mode!r}")
        previous, self.attention = self.attention, mode
        try:
            yield
        finally:
            self.attention = previous

    def new_cache(self, *, offloading: bool = False, max_length: int | None = None) -> RTPurboCache:
        """An empty cache for the present attention mode; with `max_length` slots it is static.

        `config.kv_cache_dtype` holds in the modes that have both kinds of heads: `"dense"` stays the base model.

        Raises:
            ValueError: offloading on a machine without an accelerator.
        """
        if offloading and not torch.accelerator.is_available():
            raise ValueError(
                "an offloaded cache keeps layers on the CPU that are not in use, and this machine has no GPU: leave "
                "cache_implementation out"
            )
        plans = {m.layer_idx: m.rtpurbo.plans[self.attention] for m in self.converted()}
        quantise = self.attention in QUANTISED_MODES
        return RTPurboCache(self.config, plans, offloading=offloading, max_length=max_length, quantise=quantise)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.model.set_output_embeddings(value)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        if attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"an RTPurbo model has its own attention; {attn_implementation!r} cannot be set. Choose how it is "
                "computed with config.attention_backend ('auto', 'triton' or 'reference')"
            )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RTPurboCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        decode_rows: torch.Tensor | int | None = None,
        observer: Callable | None = None,
        on_selection: Callable | None = None,
        selector: Selector | None = None,
        layer_loss: Callable | None = None,
        cache: RTPurboCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As any causal LM's forward, and:

        Args:
            attention_mask: `[B, L]`, zeros on the left (or, without continuing, on the right) only.
            decode_rows: rows of an uncached forward that attend as decode steps would: a bool mask `[B, M]`, or the
                number of last rows.
            observer: called with `AttentionInputs` in each converted layer.
            on_selection: called with (layer index, rows, selected, visible, dense weights) per tile of sparse rows;
                with `decode_rows` and tiled prefill, of those rows only; for the heads of one KV head at a time where
                a piece of a prompt attends to a quantised cache.
            selector: chooses what sparse rows attend to in place of the index, see `SelectionTile`; for measurements,
                on forwards without a cache.
            layer_loss: like `observer`, returns a scalar: the backbone runs dense and without gradients, and the
                output's `loss` is the sum over layers (stage 1; it keeps the gradients inside `layer_loss`).
            cache: `past_key_values`, as newer versions of transformers call it.

        Raises:
            ValueError: a 4-D mask, a mask with holes, packed sequences, a cache of another kind, or a cache together
                with a selector.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if layer_loss is not None:
            return self._layer_losses(shape, input_ids, attention_mask, position_ids, inputs_embeds, layer_loss, kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if selector is not None and (use_cache or past_key_values is not None):
            raise ValueError("a selector works without a cache only: pass use_cache=False, and decode_rows to emulate")
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if past_key_values is not None and not isinstance(past_key_values, RTPurboCache):
            raise ValueError(
                f"an RTPurbo model needs its own cache, got {type(past_key_values).__name__}: leave past_key_values "
                "out, or pass model.new_cache()"
            )
        if past_key_values is not None and past_key_values.max_length is not None:
            plain = set(kwargs) <= {"return_dict"} and kwargs.get("return_dict") is not False
            asked = (labels, observer, on_selection, decode_rows)
            if plain and self.attention == "sparse" and all(value is None for value in asked):
                graph = graph_for(self, past_key_values, input_ids)
                if graph is not None:
                    return graph.step(input_ids, position_ids)
        # assisted generation asks for the logits of its drafts and of the token before them
        drafts = logits_to_keep - 1 if isinstance(logits_to_keep, int) else 0
        if drafts > 0 and decode_rows is None and past_key_values is not None and past_key_values.is_recording:
            if past_key_values.get_seq_length() == 0:
                # its first drafts come with the prompt: they decode, as they would one by one
                decode_rows = drafts
            elif observer is None and on_selection is None and labels is None:
                return self._verify(
                    drafts, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values,
                    use_cache=use_cache, **kwargs,
                )  # fmt: skip
        return self.attend(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values,
            inputs_embeds=inputs_embeds,
            decode_rows=decode_rows,
            observer=observer,
            on_selection=on_selection,
            selector=selector,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _verify(
        self, drafts: int, input_ids, inputs_embeds, attention_mask, position_ids, cache: RTPurboCache, **kwargs
    ) -> CausalLMOutputWithPast:
        """Logits `[B, drafts + 1, V]` of drafts on a cache, which decode however many they are; a longer turn of a chat
        that comes before them attends as it would without them."""
        past, tokens = cache.get_seq_length(), input_ids if inputs_embeds is None else inputs_embeds
        length = tokens.shape[1]
        cut = length - drafts if length > drafts + 1 else 0

        def attend(first: int, last: int, logits_to_keep: int) -> CausalLMOutputWithPast:
            return self.attend(
                None if input_ids is None else input_ids[:, first:last],
                attention_mask=None if attention_mask is None else attention_mask[:, : past + last],
                position_ids=None if position_ids is None else position_ids[..., first:last],
                cache=cache,
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, first:last],
                logits_to_keep=logits_to_keep,
                **kwargs,
            )

        before = attend(0, cut, 1).logits if cut else None
        cache.in_drafts = True
        try:
            out = attend(cut, length, 0)
        finally:
            cache.in_drafts = False
        if before is not None and out.logits is not None:
            out.logits = torch.cat([before, out.logits], 1)
        return out

    def attend(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: RTPurboCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decode_rows: torch.Tensor | int | None = None,
        observer: Callable | None = None,
        on_selection: Callable | None = None,
        selector: Selector | None = None,
        use_cache: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`forward` after its arguments were looked at: hand the state down and run the base model."""
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        state = self._state(shape, attention_mask, position_ids, cache)
        state.observer, state.on_selection, state.selector = observer, on_selection, selector
        if decode_rows is not None:
            state.decode_rows = self._decode_rows(decode_rows, shape, attention_mask, state)
        with self._handed_down(state) as handed:
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask if self._family.needs_padding_mask else None,
                position_ids=self._position_ids(position_ids, shape, state),
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE_ARGUMENT: cache},
                **handed,
                **kwargs,
            )

    @contextlib.contextmanager
    def _handed_down(self, state: ForwardState) -> Iterator[dict]:
        """How the state reaches the attention layers: as a keyword argument, or left at the layers for the call."""
        if self._family.forwards_kwargs:
            yield {"rtpurbo_state": state}
            return
        if self.is_gradient_checkpointing and self.training:
            raise ValueError(
                f"gradient checkpointing is not supported for the family {self.config.base_config.model_type!r}"
            )
        layers = [module.rtpurbo for module in self.converted()]
        for layer in layers:
            layer.state = state
        try:
            yield {}
        finally:
            for layer in layers:
                layer.state = None

    def _position_ids(self, position_ids, shape, state: ForwardState):
        if position_ids is not None:
            return position_ids
        slots = torch.arange(state.q_start, state.q_start + shape[1], device=self.device)
        return slots[None].expand(shape[0], -1)

    def _state(self, shape, attention_mask, position_ids, cache: RTPurboCache | None) -> ForwardState:
        q_start = 0 if cache is None else cache.get_seq_length()
        is_decode = (
            cache is not None
            and q_start > 0
            and (shape[1] <= self.config.decode_max_queries or cache.in_drafts)
            and not cache.in_prefill
        )
        if cache is not None and cache.right_padded:
            raise ValueError(
                "this cache holds a right-padded batch, which cannot be continued: pad on the left "
                "(tokenizer.padding_side = 'left')"
            )
        if is_decode or (q_start > 0 and attention_mask is None):
            start = cache.start
        else:
            start, right_padded = left_padding(attention_mask, shape[0], q_start + shape[1])
            if q_start == 0:
                check_positions(position_ids, attention_mask)
            else:
                check_continued(cache.start, start, q_start)
            if cache is not None:
                cache.set_padding(start, right_padded)
                start = cache.start
        length = cache.step_length(shape[1], self.device) if is_decode else None
        if cache is not None:
            cache.begin(start, length)
        first = q_start if length is None else length.long() - shape[1]
        slots = torch.arange(shape[1], device=self.device) + first
        positions = slots - starts(start, shape[0], self.device)[:, None]
        rotation = None
        if self.attention == "sparse" and self.config.index_rotary_dim:
            waves = tuple(self.config.index_rotary_wavelengths)
            rotation = index_rotation(positions, waves, self.config.index_rotary_dim)
        # drafts of assisted generation are forgotten again: whether the store is split depends on their first one
        counted = q_start + (1 if is_decode else shape[1])
        is_dense = self.attention == "sparse" and counted < self.config.dense_below
        is_dense = is_dense and not (cache is not None and cache.is_split)
        return ForwardState(
            self.attention, q_start, start, is_decode, is_dense, positions, rotation, length, cache=cache
        )

    @staticmethod
    def _decode_rows(decode_rows, shape, attention_mask, state: ForwardState) -> DecodeRows | None:
        if state.q_start > 0:
            raise ValueError("decode_rows is for uncached forwards; on a cache, short steps decode by themselves")
        before = None
        if isinstance(decode_rows, int):
            before = max(shape[1] - max(decode_rows, 0), 0)
            mask = torch.zeros(shape[1], dtype=torch.bool)
            mask[before:] = True
            decode_rows = mask.expand(shape)
        if decode_rows.shape != shape or decode_rows.dtype != torch.bool:
            raise ValueError(
                f"decode_rows must be a bool mask of shape {tuple(shape)}, got {decode_rows.dtype} "
                f"{tuple(decode_rows.shape)}"
            )
        if attention_mask is not None:
            decode_rows = decode_rows.to(attention_mask.device) & attention_mask.bool()
        return DecodeRows.from_mask(decode_rows.to(state.positions.device), before=before)

    def _layer_losses(self, shape, input_ids, attention_mask, position_ids, inputs_embeds, layer_loss, kwargs):
        with torch.no_grad(), self.attention_mode("dense"):
            state = self._state(shape, attention_mask, position_ids, None)
            state.observer = layer_loss
            with self._handed_down(state) as handed:
                self.model.base_model(
                    input_ids=input_ids,
                    attention_mask=attention_mask if self._family.needs_padding_mask else None,
                    position_ids=self._position_ids(position_ids, shape, state),
                    inputs_embeds=inputs_embeds,
                    use_cache=False,
                    **handed,
                    **kwargs,
                )
        if not state.losses:
            raise ValueError("no layer has retrieval heads: there is no indexer to train")
        device = state.losses[0].device
        return CausalLMOutputWithPast(loss=torch.stack([loss.to(device) for loss in state.losses]).sum())

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, **kwargs
    ):
        if model_kwargs.get(CACHE_ARGUMENT) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, **kwargs
            )
        implementation = generation_config.cache_implementation
        if implementation == "quantized":
            raise ValueError(
                "cache_implementation='quantized' is not supported by RTPurbo models, which quantise their own cache: "
                "leave it out and load the model with kv_cache_dtype='int8' or 'fp8' (or set it in model.config)"
            )
        if implementation not in CACHES:
            raise ValueError(
                f"cache_implementation={implementation!r} is not supported by RTPurbo models; use one of {CACHES}"
            )
        cache = self.new_cache(
            offloading=implementation == "offloaded",
            max_length=max_cache_length if implementation == "static" else None,
        )
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = cache

    # transformers asks this method's signature what the model can be called with
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        cache = kwargs.get(CACHE_ARGUMENT)
        past = cache.get_seq_length() if isinstance(cache, RTPurboCache) else 0
        first = kwargs.get("is_first_iteration") and kwargs.get("inputs_embeds") is None
        if past and rope_switches(self.config, past, input_ids.shape[1]):
            # cached keys were rotated for short contexts: as the base does, compute them again
            cache.reset()
            next_sequence_length = None
        elif next_sequence_length is None and first and 0 < past < input_ids.shape[1]:
            # assisted generation in transformers (5.24) hands over what is cached once more
            next_sequence_length = input_ids.shape[1] - past
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching keeps keys and values in a paged cache of its own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') needs a paged cache, which an RTPurbo "
            "model does not have: call generate() with a left-padded batch"
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get(CACHE_ARGUMENT)
        if generation_config.prefill_chunk_size is None or not isinstance(cache, RTPurboCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # the last piece of a chunked prompt may be as short as a decode step, and is none
        past = cache.get_seq_length()
        fresh = input_ids.shape[1] - past if input_ids.shape[1] > past else input_ids.shape[1]
        cache.in_prefill = past == 0 or fresh > self.config.decode_max_queries
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            cache.in_prefill = False
