"""Which models the packed forward handles, decided before any weight is loaded."""

from __future__ import annotations

import sys
from typing import Any

from retort.decode.probe import objection
from retort.errors import UnsupportedModelError

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


def check_supported(config: Any, model_class: type | None = None) -> None:
    """Refuse what a packed pass with per-row caches would compute wrongly.

    Args:
        config: a transformers configuration.
        model_class: the class that would be built; None looks it up among the causal models.

    Raises:
        UnsupportedModelError: naming the feature.
    """
    model_class = model_class or _causal_class(config)
    if hasattr(model_class, "new_row_cache"):
        return
    found = _objections(config, model_class)
    reason = found[0] if found else objection(config, model_class)
    if reason is not None:
        raise UnsupportedModelError(
            f"{config.model_type}: {reason}; use transformers' own generate for this model"
        )


def max_length(config: Any) -> int | None:
    """Longest row that the model can hold, or None without a limit.

    Rotary scalings that look at the longest row of a pass (dynamic, longrope) are exact only
    within the original length, so that is their limit here.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    rope = _rope_sets(text)
    originals = [
        r.get("original_max_position_embeddings") or limit
        for r in rope
        if r.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min((x for x in (limit, *originals) if x is not None), default=None)


def _objections(config: Any, model_class: type) -> list[str]:
    if config.is_encoder_decoder:  # which may have several texts
        return ["encoder-decoder models are not handled"]
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    checks = {
        "its recurrent state cannot be rewound by row": getattr(model_class, "_is_stateful", False),
        "its attention does not go through transformers' attention interface": not hasattr(
            sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS"
        ),
        f"layers of type {', '.join(sorted(layers))} are not handled": layers,
        "multi-axis rotary positions (M-RoPE) are not handled": any(
            "mrope_section" in r for r in _rope_sets(text)
        ),
        "layers that share keys and values are not handled": getattr(
            text, "num_kv_shared_layers", 0
        ),
    }
    return [reason for reason, hit in checks.items() if hit]


def _rope_sets(config: Any) -> list[dict]:
    """Rotary parameter sets: one for the model, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    return nested or [rope]


def _causal_class(config: Any) -> type:
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"{config.model_type}: not a causal language model; choose a decoder-only model"
        ) from None
    return found[0] if isinstance(found, tuple) else found
