"""What contradicts what in a `DistillConfig`: each check gives one line, or None."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import IntervalStrategy

from retort.distill.losses import DIVERGENCES, SPAN_DISTANCES
from retort.distill.options.uses import unread
from retort.distill.presets import ADAPTIVE, PRESETS, contradiction

if TYPE_CHECKING:
    from retort.distill.config import DistillConfig

_SHARES = ("beta", "lora_dropout", "replay_share", "dac_coverage", "dac_min_coverage")
_COUNTS = [*("max_length", "max_completion_length", "rollout_batch_size", "scrg_rounds")]
_COUNTS += ["lora_r", "lora_alpha", "report_sample_tokens"]
_OPTIONAL_COUNTS = ("student_num_hidden_layers", "max_train_rows", "max_eval_rows")
_WEIGHTS = [*("sft_weight", "divergence_weight", "span_weight", "scrg_warmup_steps")]
_WEIGHTS += ["replay_buffer_size", "interleave_top_k", "dac_learning_rate"]
_ABOVE_ZERO = ("temperature", "rollout_temperature")


def value_fault(config: DistillConfig) -> str | None:
    """The first value that is out of its range."""
    for name, fine, rule in _rules(config):
        if not fine:
            return f"{name}={getattr(config, name)!r} is wrong: {rule}"
    return None


def method_fault(config: DistillConfig) -> str | None:
    """The first flag that contradicts the method."""
    checks = (_compared, _written, _whole_rows, _predicted, _packed, _mixed, _captured, unread)
    return next(filter(None, (check(config) for check in checks)), None)


def _rules(config: DistillConfig) -> Iterator[tuple[str, bool, str]]:
    """Name, whether its value is fine, and the rule."""

    def given(name: str) -> Any:
        return getattr(config, name)

    share, positive = "it must lie in [0, 1]", "it must be at least 1"
    yield "method", config.method in PRESETS, f"use one of {sorted(PRESETS)}"
    yield from ((n, _within(given(n), 0, 1), share) for n in _SHARES)
    lmbda = config.lmbda == ADAPTIVE or _within(config.lmbda, 0, 1)
    yield "lmbda", lmbda, f"{share}, or be '{ADAPTIVE}'"
    yield from ((n, given(n) >= 1, positive) for n in _COUNTS)
    yield from ((n, given(n) is None or given(n) >= 1, positive) for n in _OPTIONAL_COUNTS)
    yield from ((n, (given(n) or 0) >= 0, "it must be 0 or more") for n in _WEIGHTS)
    yield from ((n, given(n) > 0, "it must be above 0") for n in _ABOVE_ZERO)
    yield "loss_chunk_size", config.loss_chunk_size >= 0, "it must be 0 (off) or more"
    yield "report_samples", config.report_samples >= 0, "it must be 0 (none) or more"
    yield "rollout_draft_budget", config.rollout_draft_budget >= 0, "it must be 0 or more"
    yield from _choices(config)
    yield from _finite(config)
    unread = "nothing here reads it: leave it out"
    yield "label_smoothing_factor", config.label_smoothing_factor == 0, unread
    kept = "rows are tokenised here, so that no column is the model's: leave it out"
    yield "remove_unused_columns", not config.remove_unused_columns, kept
    rivals = ("student_num_hidden_layers", "student_type")
    rival = next((n for n in rivals if given(n) is not None), None)
    alone = config.student_layer_indices is None or rival is None
    yield "student_layer_indices", alone, f"{rival} says otherwise: leave one of them out"
    built = not config.warm_start or config.student_type is not None
    yield "warm_start", built, "it is for a student that is built: set student_type"
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        own = "trust_remote_code" not in (given(name) or {})
        yield name, own, "trust_remote_code is an argument of its own: give it there"


def _finite(config: DistillConfig) -> Iterator[tuple[str, bool, str]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            yield field.name, math.isfinite(value), "it must be a finite number"


def _choices(config: DistillConfig) -> Iterator[tuple[str, bool, str]]:
    bits, writers = ("8bit", "4bit"), ("dataset", "teacher")
    yield "teacher_quantization", config.teacher_quantization in (None, *bits), _use(bits)
    names = [*DIVERGENCES, "dac"]
    yield "divergence", config.divergence in (None, *names), f"use one of {names}"
    offered = config.contrast in (None, "", *DIVERGENCES)
    yield "contrast", offered, f"use one of {[*DIVERGENCES]}"
    yield "completions", config.completions in (None, *writers), _use(writers)
    distances = list(SPAN_DISTANCES)
    yield "span_distance", config.span_distance in distances, f"use one of {distances}"
    known = config.student_type in (None, "dense_retnet", "dense_mamba")
    yield "student_type", known, "use 'dense_retnet', 'dense_mamba', or leave it out"
    steady = config.train_sampling_strategy != "batch_rebalance"
    yield "train_sampling_strategy", steady, "batches have a fixed size: use 'group_by_length'"


def _use(names: tuple[str, str]) -> str:
    return f"use {names[0]!r} or {names[1]!r}"


def _compared(config: DistillConfig) -> str | None:
    compared = ("lmbda", "beta", "divergence", "divergence_parameters", "contrast")
    for key in () if config.recipe.distils else compared:
        if getattr(config, key) not in (None, 0, "", {}):
            return (
                f"{key}={getattr(config, key)!r} contradicts method={config.method!r}, which has "
                "no distance to a teacher: set divergence_weight, or choose another method"
            )
    return None


def _written(config: DistillConfig) -> str | None:
    recipe = config.recipe
    for key in () if recipe.writes else ("do_sample", "replay_buffer_size", "replay_share"):
        if getattr(config, key):
            return (
                f"{key}={getattr(config, key)!r} contradicts method={config.method!r} with "
                f"lmbda={recipe.lmbda}, by which the student writes nothing: raise lmbda"
            )
    return None


def _whole_rows(config: DistillConfig) -> str | None:
    if config.completion_only_loss or config.learns_whole_rows:
        return None
    return (
        f"completion_only_loss=False contradicts method={config.method!r}: text that is written "
        "after a prompt has a prompt that is not learned"
    )


def _predicted(config: DistillConfig) -> str | None:
    if config.completion_only_loss or not config.predict_with_generate:
        return None
    return (
        "completion_only_loss=False contradicts predict_with_generate=True: a prompt that is "
        "learned is no longer told from the answer that is to be written; leave one of them out"
    )


def _packed(config: DistillConfig) -> str | None:
    recipe = config.recipe
    if not (config.packing and recipe.writes):
        return None
    return (
        f"packing=True contradicts method={config.method!r} with lmbda={recipe.lmbda}: rows are "
        "packed from text that was there before the step, and the student writes its text within "
        "it; set lmbda to 0, or leave packing out"
    )


def _mixed(config: DistillConfig) -> str | None:
    faults = (_schedule(config), _adapter(config), _url(config))
    fault = contradiction(config.recipe) or next(filter(None, faults), None)
    return fault and f"method={config.method!r}, lmbda={config.recipe.lmbda!r}: {fault}"


def _schedule(config: DistillConfig) -> str | None:
    if config.replay_share and not config.recipe.replay_buffer_size:
        return f"replay_share={config.replay_share} needs replay_buffer_size"
    if not config.recipe.adaptive:
        return None
    if config.replay_share:
        return "replay_share is for a fixed lmbda; the scheduler decides itself"
    if IntervalStrategy(config.eval_strategy) == IntervalStrategy.NO:
        return "the scheduler follows the evaluation's loss: set eval_strategy and its data"
    return None


def _adapter(config: DistillConfig) -> str | None:
    if config.lora_dropout and config.disable_dropout:
        return f"lora_dropout={config.lora_dropout} needs disable_dropout=False"
    if config.use_peft and config.student_type is not None:
        return "use_peft adapts a trained student; student_type builds a new one: choose one"
    return None


def _url(config: DistillConfig) -> str | None:
    if config.teacher_url is None:
        named = config.teacher_served_model_name
        return f"teacher_served_model_name={named!r} needs teacher_url" if named else None
    if not config.teacher_url.startswith(("http://", "https://")):
        return f"teacher_url={config.teacher_url!r} must begin with http:// or https://"
    if config.asked.distils:
        return (
            f"teacher_url={config.teacher_url!r} gives text, and this method compares the models' "
            "predictions: set teacher_model_name_or_path, or choose method='seqkd'"
        )
    if config.asked.completions != "teacher":
        return (
            f"teacher_url={config.teacher_url!r} is never asked, the method reads the dataset's "
            "completions: choose method='seqkd', or leave it out"
        )
    return None


def _captured(config: DistillConfig) -> str | None:
    if config.teacher_signal is None:
        return None
    if not config.recipe.distils:
        return (
            f"teacher_signal={config.teacher_signal!r} contradicts method={config.method!r}, which "
            "has no distance to a teacher: leave it out, or choose another method"
        )
    if config.recipe.writes or config.recipe.completions == "teacher":
        return (
            f"teacher_signal={config.teacher_signal!r} knows the dataset's completions only, and "
            f"method={config.method!r} has others written: set lmbda to 0, or leave it out"
        )
    return None


def _within(value: Any, least: float, most: float) -> bool:
    return value is None or (not isinstance(value, str) and least <= value <= most)
