"""DenseMamba: Mamba whose layers read the hidden states of earlier layers too.

Mamba (arXiv 2312.00752) with the dense connection of DenseSSM (arXiv 2403.00818), whose authors
released no such model; from their general equations [ours]:

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t                      carried un-fused
    y_t = C_t·(h_t + a_t ⊙ Σ_{i=1..min(m,l)} h_t^{l−i}) + D u_t
    a_t = silu(fc2 silu(fc1 x_t))                               one number a channel

fc2 starts at zero: the model then *is* Mamba and takes a Mamba checkpoint's weights under their
names (`DenseMambaForCausalLM.from_mamba`). Because a_t is constant over a channel's states, the
sum can be read layer by layer: m extra scans with layer l−i's inputs and layer l's C.

Inside the model there is no padding: the real tokens of all rows lie on one axis ``[n, ...]``,
row after row (`retort.ops.segments`). Shapes: B rows, T tokens, D channels, N states a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from retort.cache.mamba import MambaRowCache, MambaShape
from retort.cache.recurrent import Feed
from retort.errors import ConfigurationError
from retort.models.carried import CarriedMamba, CarriedPass, MambaState, OneTokenPass
from retort.models.dense import FeatureWindow, RMSNorm
from retort.models.mamba_config import DenseMambaConfig
from retort.models.mamba_mixer import STARTS_AT_ZERO, DenseMambaBlock, DenseMambaMixer
from retort.models.mamba_native import SILU, NativePass, native_layers, run_layers, serves
from retort.models.mamba_passes import MambaPass, RescanPass, StatePass, real_sequences
from retort.models.recurrent import (
    RecurrentGeneration,
    RecurrentModel,
    sequence_starts,
    with_logits,
)
from retort.ops.elementwise import core_arithmetic
from retort.ops.segments import cut


class DenseMambaPreTrainedModel(RecurrentModel, PreTrainedModel):
    """Weights, caches and transformers' switches shared by the models below."""

    config: DenseMambaConfig
    config_class = DenseMambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseMambaBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache_params"]  # noqa: RUF012
    _is_stateful = True
    _input_embed_layer = "embeddings"
    row_cache = MambaRowCache
    carried_state = MambaState

    @property
    def cache_shape(self) -> MambaShape:
        """Sizes of the states that a cache of this model holds."""
        c = self.config
        return MambaShape(c.num_hidden_layers, c.intermediate_size, c.state_size, c.conv_kernel)

    @property
    def calls_core(self) -> bool:  # type: ignore[override]
        """Other activations than silu stay in torch."""
        return self.config.hidden_act in SILU

    def runs_as_one_call(self) -> bool:
        """See `RecurrentModel.runs_as_one_call`."""
        backbone: Any = self.base_model
        return self.calls_core and native_layers(backbone) is not None

    def optional_weights(self) -> set[str]:
        """The gates, which a Mamba checkpoint has none of: they start at zero."""
        return {name for name, _ in self.named_parameters() if ".select." in name}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DenseMambaMixer):
            module.initialise()
        if isinstance(module, nn.Linear) and hasattr(module, STARTS_AT_ZERO):
            init.zeros_(module.weight)


class DenseMambaModel(DenseMambaPreTrainedModel):
    """Embedding, layers and final norm, with the names of transformers' `MambaModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DenseMambaBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MambaRowCache | MambaState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_params: MambaRowCache | MambaState | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, zero before it at padding.

        Args:
            input_ids: ``[B, T]``, or ``[1, total]`` inside begin/end of a cache.
            attention_mask: ``[B, T]``, with a cache also ``[B, past + T]``; 0 at padding, which
                may stand anywhere.
            position_ids: without a cache, a real token at position 0 starts a packed sequence;
                else unused.
            past_key_values: from `new_row_cache`, `new_state` or an earlier output.
            inputs_embeds: ``[B, T, hidden]`` instead of ids.
            use_cache: by default the configuration's, but never while training.
            cache_params: transformers' other name for ``past_key_values``.
            output_hidden_states: also return each layer's input, and the final hidden states.
            **kwargs: ``cu_seq_lens_q`` marks packed sequences too; others are ignored.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigurationError("give input_ids or inputs_embeds, one of the two")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        starts = sequence_starts(position_ids, kwargs.get("cu_seq_lens_q"), x.shape[1])
        given = cache_params if past_key_values is None else past_key_values
        cache = self._pass_input(x, attention_mask, starts, given, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        want = bool(output_hidden_states)
        native = serves(self.config, x, cache)
        if isinstance(cache, MambaRowCache):
            with cache.feed(x.shape[:2], attention_mask) as feed:
                inputs, hidden = self._cached(feed.pack(x), cache, native, want)
        else:
            starts = None if cache else starts
            feed, step = self._uncached(x, attention_mask, starts, cache, native)
            inputs, hidden = self._run(feed.pack(x), step, want)
            cache = None if cache is None else step.after()  # type: ignore[attr-defined]
        hidden = feed.unpack(hidden)
        states = (*(feed.unpack(h) for h in inputs), hidden) if want else None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,  # type: ignore[arg-type]  # our own kind of cache
            hidden_states=states,
        )

    def _cached(
        self, x: Tensor, cache: MambaRowCache, native: bool, want_inputs: bool
    ) -> tuple[list[Tensor], Tensor]:
        """As `_run`, for ``x`` of the cache's pass; one call where the core knows all of it."""
        counts = cache.layout.counts if cache.layout else ()
        layers = native_layers(self) if native and counts and not want_inputs else None
        if layers is not None:
            return [], run_layers(layers, x, cache)
        return self._run(x, self._step(counts, cache, x.device, native), want_inputs)

    def _run(self, x: Tensor, step: MambaPass, want_inputs: bool) -> tuple[list[Tensor], Tensor]:
        """Each layer's input where wanted, and the normed output, all ``[n, hidden]``."""
        with core_arithmetic(isinstance(step, NativePass)):
            inputs, hidden = self._run_layers(x, step, want_inputs)
            return inputs, self.norm_f(hidden.to(self.norm_f.weight.dtype))

    def _run_layers(
        self, x: Tensor, step: MambaPass, want_inputs: bool
    ) -> tuple[list[Tensor], Tensor]:
        outputs: list[list[Tensor]] = []
        for piece in step:
            hidden, seen = x[piece.begin : piece.end], []
            window = FeatureWindow(self.config.dense_block_layers)
            for layer in self.layers:
                if want_inputs:
                    seen.append(hidden)
                hidden, *features = layer(hidden, step, *window.flat())
                window.push(*features)
            outputs.append([*seen, hidden])
        if not outputs:  # a rectangle of padding only
            return [x] * (want_inputs * len(self.layers)), x
        *inputs, hidden = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return inputs, hidden

    def _uncached(
        self,
        x: Tensor,
        mask: Tensor | None,
        starts: Tensor | None,
        state: MambaState | None,
        native: bool,
    ) -> tuple[Feed, MambaPass]:
        """The pass over a rectangle, from nothing or from a state that the caller carries."""
        batch, width = x.shape[:2]
        if state is not None and width == 1 and mask is None:
            return Feed(torch.zeros(batch, 1, dtype=torch.long), None), OneTokenPass(state)
        if mask is not None:
            mask = mask[:, -width:]
        feed, lengths = real_sequences(x, mask, starts)
        if state is None:
            return feed, self._step(lengths, None, x.device, native)
        counts = [width] * batch if mask is None else mask.bool().sum(1).tolist()
        pieces = cut(lengths, self.config.chunk_size, self.config.conv_kernel, 0, x.device)
        return feed, CarriedPass(pieces, CarriedMamba(state, counts))

    def _step(
        self,
        lengths: tuple[int, ...],
        cache: MambaRowCache | None,
        device: torch.device,
        native: bool,
    ) -> MambaPass:
        """The pass over segments of ``lengths`` tokens."""
        if native:
            return NativePass(lengths, cache)
        form, kernel = self.config.scan_form, self.config.conv_kernel
        remembers = torch.is_grad_enabled() and form == "auto"
        checkpoints = self.training and self.gradient_checkpointing
        if cache is None and (form == "rescan" or remembers or checkpoints):
            whole = cut(lengths, max(sum(lengths), 1), kernel, 0, device)
            return RescanPass(whole, self.config.chunk_size, lengths)
        limit = sum(lengths) if form == "recurrent" else 0
        if cache is not None:
            limit = cache.max_draft + 1  # what a rewind may replay must have a replay's bits
        return StatePass(cut(lengths, self.config.chunk_size, kernel, limit, device), cache)


class DenseMambaForCausalLM(DenseMambaPreTrainedModel, RecurrentGeneration, GenerationMixin):
    """DenseMamba with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__(config)
        self.backbone = DenseMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MambaRowCache | MambaState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_params: MambaRowCache | MambaState | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of labels that are shifted here.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                cache_params, output_hidden_states: see `DenseMambaModel.forward`.
            labels: ``[B, T]``, −100 where there is no loss.
            logits_to_keep: the last n positions (0: all), or their indices.
            **kwargs: ``num_items_in_batch`` and others of the loss.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_params=cache_params,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        return with_logits(self, outputs, labels, logits_to_keep, kwargs)

    @classmethod
    def from_mamba(cls, source: Any, **changes: Any) -> DenseMambaForCausalLM:
        """A DenseMamba that computes what a Mamba does: its weights, and gates of zero.

        Args:
            source: a `transformers.MambaForCausalLM`, or where one is loaded from.
            **changes: of the configuration, such as ``dense_block_layers``.

        Raises:
            ConfigurationError: the checkpoint lacks weights or holds others.
        """
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            return cls.from_pretrained(source, **changes)
        unlike = ("model_type", "architectures", "transformers_version")
        fields = {k: v for k, v in source.config.to_dict().items() if k not in unlike}
        model = cls(DenseMambaConfig(**(fields | changes))).to(source.device, source.dtype)
        found = model.load_state_dict(source.state_dict(), strict=False)
        missing = [name for name in found.missing_keys if ".select." not in name]
        if missing or found.unexpected_keys:
            raise ConfigurationError(
                f"{type(source).__name__} does not fit: missing {missing}, "
                f"unexpected {found.unexpected_keys}"
            )
        return model.train(source.training)


__all__ = [
    "DenseMambaConfig",
    "DenseMambaForCausalLM",
    "DenseMambaModel",
    "DenseMambaPreTrainedModel",
]
