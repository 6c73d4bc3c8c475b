"""DenseRetNet: a retention network whose layers see the keys and values of earlier layers.

One gated retention block a layer (DenseSSM, arXiv 2403.00818, section 3; RetNet,
arXiv 2307.08621), optionally followed by a gated MLP for students cut from a transformer
[ours]. Shapes: B rows, T tokens, H heads; a packed pass is ``[1, total]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from retort.cache.recurrent import Feed
from retort.cache.retention import RetentionRowCache, RetentionShape
from retort.errors import ConfigurationError
from retort.models.carried import CarriedRetention, RetentionState
from retort.models.dense import FeatureWindow, RMSNorm
from retort.models.recurrent import (
    RecurrentGeneration,
    RecurrentModel,
    sequence_starts,
    with_logits,
)
from retort.models.retnet_config import DenseRetNetConfig
from retort.models.retnet_layer import DenseRetNetLayer, RetentionPass
from retort.models.retnet_native import native_layers, run_layers, whole_call
from retort.ops.clock import Clock
from retort.ops.elementwise import core_arithmetic
from retort.ops.native.activation import rotate_pairs
from retort.ops.retention import (
    log_decay,
    normaliser,
    position_tables,
    retention,
    rotary_phase,
    rotate,
)


class DenseRetNetPreTrainedModel(RecurrentModel, PreTrainedModel):
    """Weights, caches and transformers' switches shared by the models below."""

    config: DenseRetNetConfig
    config_class = DenseRetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseRetNetLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True
    _can_record_outputs = {"hidden_states": DenseRetNetLayer}  # noqa: RUF012

    row_cache = RetentionRowCache
    carried_state = RetentionState

    @property
    def cache_shape(self) -> RetentionShape:
        """Sizes of the states that a cache of this model holds."""
        c = self.config
        heads = c.num_attention_heads
        return RetentionShape(c.num_hidden_layers, heads, c.key_dim // heads, c.value_dim // heads)

    def runs_as_one_call(self) -> bool:
        """See `RecurrentModel.runs_as_one_call`."""
        backbone: Any = self.base_model
        return whole_call(backbone) is not None


class DenseRetNetModel(DenseRetNetPreTrainedModel):
    """Embedding, layers and final norm.

    The embedding has no padding index [ours]: where pad and eos are one token, it would zero the
    embedding of eos and cut its gradient.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: DenseRetNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DenseRetNetLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RetentionRowCache | RetentionState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        states_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: ``[B, T]``, or ``[1, total]`` inside begin/end of a cache.
            attention_mask: ``[B, T]``, with a cache also ``[B, past + T]``; 0 at padding, which
                may stand anywhere.
            position_ids: without a cache, a real token at position 0 starts a packed sequence;
                else unused, since a position is the number of real tokens before.
            past_key_values: from `new_row_cache`, `new_state` or an earlier output.
            inputs_embeds: ``[B, T, hidden]`` instead of ids.
            use_cache: by default the configuration's, but never while training.
            states_to_keep: the last n positions (0: all) or their indices; hidden states
                elsewhere may be 0, where leaving them out saves work.
            **kwargs: ``cu_seq_lens_q`` marks packed sequences too; others are ignored.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigurationError("give input_ids or inputs_embeds, one of the two")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        starts = sequence_starts(position_ids, kwargs.get("cu_seq_lens_q"), hidden.shape[1])
        cache = self._pass_input(hidden, attention_mask, starts, past_key_values, use_cache)
        if isinstance(cache, RetentionRowCache):
            native = cache.on_core and not torch.is_grad_enabled()
            with cache.feed(hidden.shape[:2], attention_mask) as feed, core_arithmetic(native):
                hidden = self._cached(feed, hidden, cache, native, states_to_keep)
        else:
            step = self._uncached(hidden, attention_mask, None if cache else starts, cache)
            hidden = self.norm(self._run_layers(hidden, step))
            cache = None if cache is None else step.mix.after()  # type: ignore[attr-defined]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,  # type: ignore[arg-type]  # our own kinds
        )

    def _run_layers(self, hidden: Tensor, step: RetentionPass) -> Tensor:
        window = FeatureWindow(self.config.dense_block_layers)
        for layer in self.layers:
            hidden, k, v = layer(hidden, step, *window.flat())
            window.push(k, v)
        return hidden

    def _uncached(
        self, x: Tensor, mask: Tensor | None, starts: Tensor | None, state: RetentionState | None
    ) -> RetentionPass:
        """The pass over a rectangle, from nothing or from a state that the caller carries."""
        decay, config = self._decay(x), self.config
        real = None if mask is None else mask[:, -x.shape[1] :].to(x.device, torch.bool)
        clock = Clock.of(real, starts, (x.shape[0], x.shape[1]), x.device)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return retention(q, k, v, decay, clock, config.retention_form, config.chunk_size)

        if state is None:
            return self._step(clock.positions, decay, lambda _, q, k, v: mix(q, k, v))
        if config.retention_form == "clamped":
            raise ConfigurationError("retention_form='clamped' has no state to go on from")
        positions = clock.positions + state.lengths.unsqueeze(1)
        return self._step(positions, decay, CarriedRetention(state, clock, decay, mix))

    def _cached(
        self,
        feed: Feed,
        x: Tensor,
        cache: RetentionRowCache,
        native: bool,
        keep: int | Tensor,
    ) -> Tensor:
        """Hidden states of a pass with a row cache: in one call where the core knows all of it."""
        layers = native_layers(self, x) if native and cache.layout is not None else None
        if layers is not None:
            rows, positions, wanted = (feed.pack(t) for t in (x, feed.positions, _kept(x, keep)))
            index = wanted.nonzero()[:, 0]
            return feed.unpack(run_layers(layers, self, rows, positions, cache, index))
        step = self._cached_step(feed, x, cache, native)
        return self.norm(self._run_layers(x, step))

    def _cached_step(
        self, feed: Feed, x: Tensor, cache: RetentionRowCache, native: bool
    ) -> RetentionPass:
        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return feed.unpack(cache.retention(layer, *(feed.pack(t) for t in (q, k, v))))

        if native:
            return self._native_step(feed.positions, mix)
        return self._step(feed.positions, self._decay(x), mix)

    def _decay(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return log_decay(self.config.num_attention_heads, dtype, x.device)

    def _step(self, positions: Tensor, decay: Tensor, mix: Callable) -> RetentionPass:
        phase = rotary_phase(positions, self.cache_shape.key_dim, decay.dtype)
        root = normaliser(positions + 1, decay).unsqueeze(-1)
        return RetentionPass(partial(rotate, phase=phase), root, mix)

    def _native_step(self, positions: Tensor, mix: Callable) -> RetentionPass:
        shape = self.cache_shape
        cos, sin, root = position_tables(shape.heads, shape.key_dim).at(positions.flatten())

        def turned(x: Tensor) -> Tensor:
            return rotate_pairs(x.flatten(0, 1), cos, sin).view(x.shape)

        return RetentionPass(turned, root.view(*positions.shape, -1, 1), mix)


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """Which tokens of ``x`` ``[B, T, hidden]`` a `logits_to_keep` names, bool ``[B, T]``."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    kept[:, slice(-keep, None) if isinstance(keep, int) else keep] = True
    return kept


class DenseRetNetForCausalLM(DenseRetNetPreTrainedModel, RecurrentGeneration, GenerationMixin):
    """DenseRetNet with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DenseRetNetConfig) -> None:
        super().__init__(config)
        self.model = DenseRetNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RetentionRowCache | RetentionState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of labels that are shifted here.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                see `DenseRetNetModel.forward`.
            labels: ``[B, T]``, −100 where there is no loss.
            logits_to_keep: the last n positions (0: all), or their indices.
            **kwargs: ``num_items_in_batch`` and others of the loss; ``output_hidden_states``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            states_to_keep=logits_to_keep,
            **kwargs,
        )
        return with_logits(self, outputs, labels, logits_to_keep, kwargs)


__all__ = [
    "DenseRetNetConfig",
    "DenseRetNetForCausalLM",
    "DenseRetNetModel",
    "DenseRetNetPreTrainedModel",
]
