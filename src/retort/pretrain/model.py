"""A new model from its ``model_type`` and configuration values."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from retort.errors import ConfigurationError


def new_model(model_type: str, values: dict[str, Any], tokenizer: Any) -> Any:
    """A causal language model with random weights (torch's global generator).

    The vocabulary is the tokenizer's unless ``values`` names a larger one; so are the special
    tokens. Raises ConfigurationError for an unknown type, an unknown value, or one that does not
    fit.
    """
    try:
        default = AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"model_type={model_type!r} is unknown: use dense_retnet, dense_mamba, or a "
            "model_type of transformers"
        ) from error
    unknown = sorted(name for name in values if not hasattr(default, name))
    if unknown:
        raise ConfigurationError(f"model_config: {model_type} has no {unknown[0]!r}")
    merged = {**_tokens(tokenizer), **values}
    if merged["vocab_size"] < len(tokenizer):
        raise ConfigurationError(
            f"model_config: vocab_size={merged['vocab_size']} is less than the tokenizer's "
            f"{len(tokenizer)} ids"
        )
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **merged))
    except ConfigurationError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"model_config of {model_type}: {reason}") from error


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,  # the end token may pad too, and its embedding must learn
    }
