"""What the configurations of all training verbs share: help texts, checks, plain values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from retort.errors import ConfigurationError

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


def say(default: Any, text: str) -> Any:
    """A dataclass field with its help text, which flags, YAML and docs show."""
    return field(default=default, metadata={"help": text})


def check_given(config: TrainingArguments, kind: type) -> None:
    """Refuse a null where a value is needed (YAML can say it) and text that is not JSON.

    Args:
        config: the configuration.
        kind: the dataclass whose own fields are looked at.
    """
    for name, hint in kind.__annotations__.items():
        value = getattr(config, name, None)
        if value is None and "None" not in str(hint):
            raise ConfigurationError(f"{name}=None is wrong: it needs a value")
        if "dict" in str(hint) and isinstance(value, str):
            _check_json(name, value)


def check_training(config: TrainingArguments, check: Callable[[], None]) -> None:
    """Let transformers check (``check``) its own arguments; its errors become ours."""
    if config.max_steps == 0:
        raise ConfigurationError("max_steps=0 trains nothing: give at least 1, or -1 for all")
    for name in _COUNTS:
        if getattr(config, name) < 1:
            raise ConfigurationError(
                f"{name}={getattr(config, name)} is wrong: it must be at least 1"
            )
    if not 0 <= config.seed < 1 << 32:
        raise ConfigurationError(f"seed={config.seed} is wrong: it must lie in [0, 2**32)")
    if not config.learning_rate >= 0:
        raise ConfigurationError(
            f"learning_rate={config.learning_rate} is wrong: it must be 0 or more"
        )
    try:
        check()
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()  # says what is not installed
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigurationError(" ".join(str(error).split())) from error


def _check_json(name: str, text: str) -> None:
    try:
        fine = isinstance(json.loads(text), dict)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigurationError(f"{name}={text!r} is wrong: it must be a JSON object")


def resolved(config: TrainingArguments) -> dict[str, Any]:
    """Every argument as plain values, without secrets: can be given back as a YAML file."""
    known = {f.name for f in fields(config) if f.init}
    values = config.to_dict()
    secrets = {name for name in known if name.endswith("_token")}
    values["report_to"] = values["report_to"] or "none"  # an empty list is refused as a flag
    return {name: value for name, value in values.items() if name in known - secrets}
