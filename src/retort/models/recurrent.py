"""What our recurrent models share: caches by name and shape, packed input, generation, the head.

A model adds `RecurrentModel` to its pre-trained base class and defines ``row_cache`` (the class
of its caches), ``carried_state`` (the class of states that the caller carries) and
``cache_shape`` (the sizes of both).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from retort.cache.recurrent import RecurrentRowCache
from retort.cache.taped import TapeKind
from retort.errors import ConfigurationError

logger = logging.get_logger(__name__)


class RecurrentModel:
    """Mixin of a `PreTrainedModel` whose state is a `RecurrentRowCache`, or carried tensors."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    training: bool
    gradient_checkpointing: bool = False
    calls_core = True  # with a cache on the native core torch computes no activation

    row_cache: Any
    cache_shape: Any
    carried_state: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a weight that is missing or unknown is an error.

        transformers warns and fills a missing weight with random numbers.

        Raises:
            ConfigurationError: names the weights, the checkpoint and the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(  # type: ignore[misc]  # of PreTrainedModel
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        refuse_unfit(pretrained_model_name_or_path, model, info)
        return (model, info) if wants_info else model

    def optional_weights(self) -> set[str]:
        """Weights that a checkpoint may lack all together: the model has a start for them."""
        return set()

    def runs_as_one_call(self) -> bool:
        """Whether the native core runs all layers in one call, on packed linears as they are now.

        Passes with a cache on the core, that is, such as packed ones.
        """
        return False

    def new_row_cache(self, tape: TapeKind = "draft", max_draft: int = 16) -> Any:
        """An empty cache for this model, for packed passes or as `past_key_values`.

        Args:
            tape: "draft" can be rewound by ``max_draft`` tokens at least, "completion" to any
                length.
            max_draft: see ``tape``.
        """
        return self.row_cache(self.cache_shape, self.dtype, self.device, tape, max_draft)

    def new_state(self, batch_size: int) -> Any:
        """The state before any token, as tensors that the caller carries (`models.carried`).

        Given as `past_key_values`, the next one comes back; gradients flow through both.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.carried_state.zeros(
            self.cache_shape, batch_size, dtype=dtype, device=self.device
        )

    def _pass_input(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        starts: Tensor | None,
        cache: Any,
        use_cache: bool | None,
    ) -> Any:
        """The cache of a pass, None without one; refuses what does not fit together.

        Args:
            hidden: ``[B, T, hidden]``.
            attention_mask: ``[B, T]``, with a cache also ``[B, past + T]``.
            starts: of `sequence_starts`.
            cache: what the caller gave.
            use_cache: what the caller asked for.
        """
        if getattr(cache, "layout", None) is None and _packed(starts, attention_mask):
            if use_cache or cache is not None:
                raise ConfigurationError(
                    "packed sequences restart at position 0 inside a row, a cached row cannot: "
                    "pass use_cache=False, or feed them as rows between cache.begin and cache.end"
                )
            use_cache = False
        if isinstance(cache, self.carried_state):
            self._check_state(cache, hidden.shape[0])
        else:
            cache = self._cache(cache, use_cache)
        _check_mask(attention_mask, hidden, cache)
        return cache

    def _check_state(self, state: Any, batch: int) -> None:
        wanted = self.carried_state.zeros(self.cache_shape, batch, device="meta")
        shapes = [[list(x.shape) for x in parts] for parts in (state, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigurationError(
                f"the state has shapes {shapes[0]}; this model and {batch} rows need {shapes[1]}: "
                "use model.new_state(batch_size)"
            )

    def _cache(self, cache: Any, use_cache: bool | None) -> Any:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing and (use_cache or cache is not None):
            logger.warning_once("gradient checkpointing runs layers twice: no cache is used")
            return None
        if cache is None:
            return self.new_row_cache() if use_cache else None
        shape = getattr(cache, "shape", None)
        if not isinstance(cache, RecurrentRowCache) or shape != self.cache_shape:
            raise ConfigurationError(
                f"past_key_values is {type(cache).__name__} with {shape}; this model needs "
                f"{self.cache_shape}: use model.new_row_cache()"
            )
        return cache


class RecurrentGeneration(GenerationMixin):
    """`generate` of a `RecurrentModel`: it starts from `new_row_cache`."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ConfigurationError(
                f"cache_implementation={generation_config.cache_implementation!r}: "
                f"{type(self).__name__} has one kind of cache, leave it unset"
            )
        given = model_kwargs.pop("cache_params", None)
        if given is not None:
            model_kwargs["past_key_values"] = given
        if isinstance(model_kwargs.get("past_key_values"), tuple):
            raise ConfigurationError(
                "generate needs a cache that it can write to: model.new_row_cache()"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_row_cache()  # type: ignore[attr-defined]


def with_logits(
    model: Any,
    outputs: Any,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    loss_options: dict[str, Any],
) -> CausalLMOutputWithPast:
    """What ``model`` with its ``lm_head`` answers, from the ``outputs`` of its backbone."""
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(outputs.last_hidden_state[:, keep])
    loss = None
    if labels is not None:
        loss = model.loss_function(logits, labels, model.config.vocab_size, **loss_options)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
    )


def refuse_unfit(source: Any, model: Any, info: dict[str, Any]) -> None:
    """Raise where the weights of ``source`` are not those that ``model`` has.

    Args:
        source: the checkpoint, as the user named it.
        model: what was loaded, with its configuration.
        info: transformers' ``output_loading_info``.
    """
    missing, unexpected = (set(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if (optional := model.optional_weights()) <= missing:
        missing -= optional
    if not missing and not unexpected:
        return
    config = model.config
    found = [
        f"{kind}: {', '.join(sorted(names)[:4])}{' and others' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise ConfigurationError(
        f"the weights of {str(source)!r} do not fit {type(model).__name__} with num_hidden_layers="
        f"{config.num_hidden_layers}, dense_block_layers={config.dense_block_layers}; "
        f"{'; '.join(found)}: load it with the configuration that it was saved with"
    )


def sequence_starts(
    position_ids: Tensor | None, bounds: Tensor | None, width: int
) -> Tensor | None:
    """Where packed sequences start, bool ``[B or 1, T]``; None for one sequence a row.

    Args:
        position_ids: ``[B, T]``; a sequence starts at each 0.
        bounds: ``cu_seq_lens``, which decide where both are given.
        width: T.
    """
    if bounds is not None:
        starts = torch.zeros(1, width, dtype=torch.bool, device=bounds.device)
        starts[0, bounds[bounds < width].long()] = True
        return starts
    return None if position_ids is None else position_ids == 0


def _check_mask(mask: Tensor | None, x: Tensor, cache: RecurrentRowCache | None) -> None:
    """The mask has one column a token; with a cache it may have the past's too (checked there)."""
    if mask is None:
        return
    fits = mask.ndim == 2 if cache is not None else mask.shape == x.shape[:2]
    if not fits:
        raise ConfigurationError(
            f"attention_mask is {list(mask.shape)}, the input needs [batch, tokens] = "
            f"{list(x.shape[:2])}"
        )


def _packed(starts: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a row holds several sequences."""
    if starts is None or starts.shape[1] == 1:
        return False
    if mask is not None:
        starts = starts.to(mask.device) & mask[:, -starts.shape[1] :].bool()
    return bool((starts.sum(1) > 1).any())
