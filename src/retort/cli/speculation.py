"""vLLM's names for what drafts: ``--spec-…`` flags and ``--speculative-config``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from retort.errors import ConfigurationError

SpecMethod = Annotated[
    str | None, typer.Option(help="ngram (as --drafter prompt-lookup), draft_model or none.")
]
SpecModel = Annotated[str | None, typer.Option(help="Draft model, as --drafter MODEL.")]
SpecTokens = Annotated[int | None, typer.Option(min=0, help="As --draft-budget N.")]
SpecConfig = Annotated[
    str | None, typer.Option(help="The same as JSON: method, model, num_speculative_tokens.")
]

_LOOKUP = ("ngram", "prompt-lookup", "prompt_lookup")
_KNOWN = ("method", "model", "num_speculative_tokens")


def drafting(given: Mapping[str, Any]) -> tuple[str | None, str]:
    """The drafter and the budget that the flags of ``retort serve`` ask for.

    Raises:
        ConfigurationError: flags that contradict each other, unknown methods or keys.
    """
    config = _config(given)
    if not config:
        return given["drafter"], given["draft_budget"]
    if given["drafter"] is not None:
        raise ConfigurationError("give either --drafter or --spec-… flags, not both")
    budget = config.get("num_speculative_tokens")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ConfigurationError(f"num_speculative_tokens={budget!r} must be a whole number")
    if budget is not None and given["draft_budget"] != "auto":
        raise ConfigurationError("give either --draft-budget or --spec-tokens, not both")
    return _drafter(config), given["draft_budget"] if budget is None else str(budget)


def _drafter(config: Mapping[str, Any]) -> str | None:
    method, model = config.get("method"), config.get("model")
    if method in _LOOKUP and model is None:
        return "prompt-lookup"
    if method == "none" and model is None:
        return None
    if method in (None, "draft_model") and isinstance(model, str) and model:
        return model
    raise ConfigurationError(
        f"speculation with method={method!r} and model={model!r}: use method ngram or none without "
        "a model, or draft_model with one"
    )


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("spec_method", "spec_model", "spec_tokens")
    flags = {key: given[name] for key, name in zip(_KNOWN, names, strict=True)}
    config = {key: value for key, value in flags.items() if value is not None}
    if given["speculative_config"] is None:
        return config
    try:
        told = json.loads(given["speculative_config"])
    except ValueError as error:
        raise ConfigurationError(f"--speculative-config is not JSON: {error}") from None
    if not isinstance(told, dict) or not told:
        raise ConfigurationError("--speculative-config must be a JSON object that is not empty")
    if unknown := sorted(set(told) - set(_KNOWN)):
        raise ConfigurationError(
            f"--speculative-config: unknown key {unknown[0]!r}; known: {', '.join(_KNOWN)}"
        )
    if config:
        raise ConfigurationError("give either --speculative-config or --spec-… flags, not both")
    return told
