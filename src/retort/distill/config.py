"""`DistillConfig`: every choice of a distillation run, typed and documented once.

The same fields are the keywords in Python, the flags of ``retort distill`` and the keys of its
YAML file (`HfArgumentParser`). Names are TRL's where the meaning is equal. The fields themselves
stand by subject in `options`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainingArguments

from retort.distill.losses import DacSettings, divergence
from retort.distill.options.checks import method_fault, value_fault
from retort.distill.options.data import DataOptions
from retort.distill.options.elsewhere import FLAGS
from retort.distill.options.losses import LossOptions
from retort.distill.options.models import ModelOptions
from retort.distill.options.sequences import SequenceOptions
from retort.distill.presets import KEYS, Preset, preset
from retort.errors import ConfigurationError
from retort.train.arguments import check_given, check_training, say

_OPTIONS = (ModelOptions, DataOptions, SequenceOptions, LossOptions)


@dataclass
class DistillConfig(LossOptions, SequenceOptions, DataOptions, ModelOptions, TrainingArguments):
    """Arguments of a distillation run, on top of transformers' TrainingArguments.

    Raises `ConfigurationError`, naming the key, for a value out of range and for a flag that
    contradicts the method.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # transformers' list: these flags take JSON
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "student_config",
        "teacher_model_init_kwargs",
        "divergence_parameters",
    ]

    ELSEWHERE = FLAGS

    # Other defaults than transformers'
    remove_unused_columns: bool = say(False, "Kept off: rows are tokenised here.")
    logging_nan_inf_filter: bool = say(False, "Kept off: a NaN loss ends the run.")
    logging_steps: float = say(10, "Optimiser steps between log records; below 1: a share.")

    def __post_init__(self) -> None:
        """Check every value that is ours; transformers checks its own."""
        for kind in (*_OPTIONS, DistillConfig):
            check_given(self, kind)
        check_training(self, super().__post_init__)
        self.lmbda = _number_or_adaptive(self.lmbda)
        fault = value_fault(self) or method_fault(self)
        if fault is not None:
            raise ConfigurationError(fault)
        self.dac_settings()
        for name in dict.fromkeys(filter(None, (self.recipe.divergence, self.recipe.contrast))):
            self.divergence_function(name)

    @property
    def recipe(self) -> Preset:
        """The method with what this configuration overrides.

        What a teacher behind a URL writes is there before the first step, as the dataset is.
        """
        recipe = self.asked
        return recipe if self.teacher_url is None else replace(recipe, completions="dataset")

    @property
    def asked(self) -> Preset:
        """The method as it was asked for, whoever writes its offline text."""
        given = {key: getattr(self, key) for key in KEYS}
        return replace(
            preset(self.method), **{key: value for key, value in given.items() if value is not None}
        )

    @property
    def learns_whole_rows(self) -> bool:
        """Whether rows without a prompt can be learned: nothing is written after a prompt."""
        return not self.asked.writes and self.asked.completions == "dataset"

    def dac_settings(self) -> DacSettings:
        """The constants of DAC-KL."""
        return DacSettings(
            mode=self.dac_mode,
            top_k=self.dac_top_k,
            tau=self.dac_temperature,
            lower=self.dac_lower,
            upper=self.dac_upper,
            coverage=self.dac_coverage,
            min_coverage=self.dac_min_coverage,
            max_hidden=self.dac_max_hidden,
            dual_rate=self.dac_dual_rate,
            dual_max=self.dac_dual_max,
        )

    def divergence_function(self, name: str) -> Any:
        """The divergence ``name`` with the parameters that are given, None for "dac"."""
        given = dict(self.divergence_parameters or {})  # type: ignore[arg-type]
        given |= {} if self.beta is None else {"beta": self.beta}
        if name != "dac":
            return divergence(name, **given)
        if given:
            raise ConfigurationError(f"divergence 'dac' has no parameter {next(iter(given))!r}")
        return None

    def scrg_start(self, max_steps: int) -> int:
        """The optimiser step from which sequences are revised, of ``max_steps`` in all."""
        warmup = self.scrg_warmup_steps
        return int(warmup) if warmup >= 1 else int(warmup * max_steps)


def _number_or_adaptive(value: Any) -> Any:
    """Text of a flag as a number where it is one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


FREE = (
    "trust_remote_code",
    "teacher_url",
    "teacher_served_model_name",
    "teacher_text_file",
    "dataset_num_proc",
    "predict_with_generate",
    "report_samples",
    "report_sample_tokens",
    "loss_chunk_size",
    "rollout_batch_size",
    "rollout_drafter",
    "rollout_draft_budget",
)
"""Options that a continuation may change: where and how fast, never what is learned."""

_EVALUATED = ("dataset_test_split", "eval_dataset_name", "max_eval_rows")

_SHARED = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("train_sampling_strategy", "dataloader_drop_last"),
)
# A loaded optimiser and its schedule keep, or mix with, the values that they were saved with.
_OPTIMISED = (
    *("learning_rate", "optim", "optim_args", "optim_target_modules", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16"),
)


def fixed_choices(config: DistillConfig) -> dict[str, Any]:
    """What a run and its continuation share: every option but `FREE`, and the resolved recipe.

    Evaluations may change too, where no scheduler follows them; so may the end of the run.
    """
    free = FREE if config.recipe.adaptive else FREE + _EVALUATED
    names = [name for kind in _OPTIONS for name in kind.__annotations__ if name not in free]
    given = {name: getattr(config, name) for name in (*names, *_SHARED, *_OPTIMISED)}
    return given | {key: getattr(config.recipe, key) for key in KEYS}
