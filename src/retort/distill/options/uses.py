"""Which part of a method reads which option: what nothing reads is refused, not passed over.

Limits (``max_completion_length``, ``rollout_batch_size``) are no such options: a limit holds where
there is nothing to limit, so that one file of settings serves several methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retort.distill.config import DistillConfig


@dataclass(frozen=True)
class Use:
    """Options, the choice that has them read, and whether a configuration made it."""

    keys: tuple[str, ...]
    choice: str
    made: Callable[[DistillConfig], bool]


def _clips(config: DistillConfig) -> bool:
    return config.recipe.distils and config.recipe.divergence == "dac"


def _writes(config: DistillConfig) -> bool:
    """Whether a model here writes: the student in a step or an evaluation, or the teacher."""
    asked = config.recipe.completions == "teacher" or config.predict_with_generate
    return config.recipe.writes or asked


_FIXED_BAND = ("dac_lower", "dac_upper")
_LEARNED_BAND = (
    *("dac_coverage", "dac_min_coverage", "dac_max_hidden"),
    *("dac_dual_rate", "dac_dual_max"),
)
_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")

USES = (
    Use(("scrg_rounds", "scrg_warmup_steps"), "scrg=True", lambda c: c.recipe.scrg),
    Use(
        ("span_distance", "span_chunker"),
        "a span_weight above 0",
        lambda c: c.recipe.span_weight > 0,
    ),
    Use(("dac_mode", "dac_top_k", "dac_temperature"), "divergence='dac'", _clips),
    Use(
        _FIXED_BAND,
        "divergence='dac' with dac_mode='fixed'",
        lambda c: _clips(c) and c.dac_mode == "fixed",
    ),
    Use(
        _LEARNED_BAND,
        "divergence='dac' with dac_mode='learned'",
        lambda c: _clips(c) and c.dac_mode == "learned",
    ),
    Use(
        ("dac_learning_rate",),
        "divergence='dac' with a band that is learned",
        lambda c: _clips(c) and c.dac_mode != "fixed",
    ),
    Use(
        ("rollout_drafter",),
        "text that student or teacher writes (lmbda, completions, predict_with_generate)",
        lambda c: _writes(c) or c.rollout_drafter == "none",
    ),
    Use(
        ("rollout_draft_budget",),
        "a rollout_drafter",
        lambda c: c.rollout_drafter not in (None, "none"),
    ),
    Use(
        ("rollout_temperature",),
        "text that the student draws (lmbda, do_sample=True)",
        lambda c: c.recipe.writes and c.recipe.do_sample,
    ),
    Use(
        ("replay_buffer_size",),
        "a replay_share above 0, or lmbda='adaptive'",
        lambda c: c.recipe.adaptive or c.replay_share > 0,
    ),
    Use(
        ("teacher_text_file",),
        "completions='teacher'",
        lambda c: c.asked.completions == "teacher",
    ),
    Use(_ADAPTER, "use_peft=True", lambda c: c.use_peft),
    Use(("student_config",), "a student_type", lambda c: c.student_type is not None),
)


def unread(config: DistillConfig) -> str | None:
    """The first options that were given and that nothing reads, in one line; None where all are."""
    defaults = {field.name: field.default for field in fields(config)}
    for use in USES:
        given = [key for key in use.keys if _is_given(getattr(config, key), defaults[key])]
        if given and not use.made(config):
            return _line(config, given, use.choice)
    return None


def _is_given(value: Any, default: Any) -> bool:
    return value not in (None, {}, default)


def _line(config: DistillConfig, given: list[str], choice: str) -> str:
    values = ", ".join(f"{key}={getattr(config, key)!r}" for key in given)
    verb, them = ("contradicts", "it") if len(given) == 1 else ("contradict", "them")
    return (
        f"{values} {verb} method={config.method!r} as it is set: only {choice} reads {them}; "
        f"choose that, or leave {them} out"
    )
