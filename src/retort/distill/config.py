"""`DistillConfig`: every choice of a distillation run, typed and documented once.

The same fields are the keywords in Python, the flags of ``retort distill`` and the keys of its
YAML file (`HfArgumentParser`). Names are TRL's where the meaning is equal.
"""

# ruff: noqa: RUF009  # `say` returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from retort.distill.losses import DIVERGENCES, SPAN_DISTANCES, DacSettings, divergence
from retort.distill.presets import ADAPTIVE, KEYS, PRESETS, Preset, contradiction, preset
from retort.errors import ConfigurationError
from retort.train.arguments import check_given, check_training, say


@dataclass
class DistillConfig(TrainingArguments):
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

    method: str = say("mgsr", f"What to train by: one of {', '.join(PRESETS)}.")

    # Models
    model_name_or_path: str | None = say(None, "The student: zoo name, hub id or folder.")
    model_init_kwargs: dict[str, Any] | str | None = say(
        None, "Keywords of the student's from_pretrained, as JSON."
    )
    student_type: str | None = say(
        None, "'dense_retnet' or 'dense_mamba': built with the teacher's embedding and head."
    )
    warm_start: bool = say(
        False, "A student that is built begins with layers of the teacher, its MLPs among them."
    )
    student_num_hidden_layers: int | None = say(
        None, "Layers of the student: that many are cut out of model_name_or_path, or are built."
    )
    student_config: dict[str, Any] | str | None = say(
        None, "More configuration values of a student that is built, as JSON."
    )
    freeze_embeddings: bool = say(False, "Keep the student's embedding and head as they are.")
    use_peft: bool = say(
        False, "Train a LoRA adapter; without a teacher the student's base teaches. Needs peft."
    )
    lora_r: int = say(16, "Rank of the adapter.")
    lora_alpha: int = say(32, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = say(0.0, "Dropout before the adapter; needs disable_dropout=False.")
    lora_target_modules: list[str] | None = say(
        None, "Modules that are adapted, or all-linear; by default PEFT's for the model."
    )
    teacher_model_name_or_path: str | None = say(
        None, "The teacher: zoo name, hub id or folder; must share the student's tokenizer."
    )
    teacher_model_revision: str | None = say(None, "Hub revision of the teacher.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = say(
        None, "Keywords of the teacher's from_pretrained, as JSON."
    )
    teacher_quantization: str | None = say(
        None, "'8bit' or '4bit': the teacher's linears by bitsandbytes, which must be installed."
    )
    teacher_url: str | None = say(
        None,
        "A teacher behind an OpenAI-compatible URL, up to and with /v1, writes the texts (seqkd).",
    )
    teacher_served_model_name: str | None = say(
        None, "The teacher's name there; not needed where the server offers one model."
    )
    teacher_signal: str | None = say(
        None, "Folder of `retort capture`, instead of the teacher's forwards on the dataset."
    )
    trust_remote_code: bool = say(False, "Allow models to bring code of their own.")
    disable_dropout: bool = say(True, "Set every dropout of the student to 0.")

    # Data
    dataset_name: str | None = say(
        None, "JSONL or Parquet file, folder, or hub name; rows: messages, or prompt + completion."
    )
    dataset_config: str | None = say(None, "Configuration of a hub dataset.")
    dataset_train_split: str = say("train", "Split to train on.")
    dataset_test_split: str | None = say(None, "Split of dataset_name to evaluate on.")
    eval_dataset_name: str | None = say(None, "Another file, folder or name to evaluate on.")
    max_train_rows: int | None = say(None, "Train on the first rows only.")
    max_eval_rows: int | None = say(None, "Evaluate on the first rows only.")
    dataset_num_proc: int | None = say(None, "Processes that tokenise.")
    skip_long_prompts: bool = say(
        False, "Leave out rows whose prompt leaves no room in max_length, instead of refusing them."
    )
    completion_only_loss: bool = say(
        True, "Learn the completion only; false: the prompt too (methods without student text)."
    )
    as_chat: bool = say(False, "Wrap prompts that are plain text as a user's chat message.")
    max_length: int = say(
        1024, "Most tokens of prompt + completion; longer completions are cut, prompts refused."
    )

    packing: bool = say(
        False,
        "Several examples of a batch in one row of at most max_length tokens (no student text).",
    )

    # Sequences
    max_completion_length: int = say(512, "N: most tokens that the student writes.")
    lmbda: float | str | None = say(
        None, "Share of distilled sequences that the student writes, or 'adaptive' (DistiLLM's)."
    )
    do_sample: bool | None = say(None, "The student draws its texts; else its likeliest tokens.")
    rollout_temperature: float = say(1.0, "Divides the logits that the student draws from.")
    completions: str | None = say(
        None, "Text that the student did not write: 'dataset' or 'teacher', who writes it once."
    )
    teacher_text_file: str | None = say(
        None, "JSONL file that keeps the teacher's texts for later runs; else in output_dir."
    )
    interleave_top_k: int | None = say(
        None, "K of speculative KD: the teacher replaces student tokens below its K; 0: off."
    )
    rollout_batch_size: int = say(16, "Rows that are written at once.")
    rollout_drafter: str | None = say(
        None, "'prompt-lookup' speculates while the student writes; the text stays the same."
    )
    rollout_draft_budget: int = say(4, "Drafts a row and step; fixed, so that resume is exact.")
    replay_buffer_size: int | None = say(
        None, "Student sequences that are kept for reuse, the oldest goes first; 0: none."
    )
    replay_share: float = say(0.0, "Share of the student's sequences that come from the buffer.")
    scrg: bool | None = say(None, "Revise the student's sequences at their worst error.")
    scrg_rounds: int = say(1, "Corrections of each sequence.")
    scrg_warmup_steps: float = say(
        0.1, "Optimiser steps before sequences are revised; below 1: a share of all steps."
    )

    # Losses
    sft_weight: float | None = say(None, "Weight of cross-entropy on the dataset.")
    divergence: str | None = say(
        None, f"Distance to the teacher: dac, {', '.join(DIVERGENCES)}; by default the method's."
    )
    divergence_weight: float | None = say(None, "Weight of the distance to the teacher.")
    contrast: str | None = say(
        None, "Another divergence for student text; every prompt then gives offline text as well."
    )
    divergence_parameters: dict[str, Any] | str | None = say(
        None, "Parameters of the divergence, as JSON, e.g. '{\"alpha\": 0.1}'."
    )
    beta: float | None = say(None, "β of jsd: 0 is forward KL, 1 reverse KL.")
    span_weight: float | None = say(None, "Weight of the span loss.")
    temperature: float = say(1.0, "Divides both models' logits in all terms but sft.")
    loss_chunk_size: int = say(
        64, "Tokens whose logits exist at once; 0: all (faster, but holds tokens × vocabulary)."
    )
    dac_mode: str = say("learned", "Band of DAC-KL: learned (under the constraint) or fixed.")
    dac_top_k: int = say(64, "K: the teacher's likeliest tokens that DAC-KL looks at.")
    dac_temperature: float = say(0.02, "τ: softness of the band's edges.")
    dac_coverage: float = say(0.95, "Least mean share of the top-K's mass that a band keeps.")
    dac_min_coverage: float = say(0.8, "A token below this share falls back to the full band.")
    dac_max_hidden: float = say(0.1, "So does one whose band hides more of its KL than this.")
    dac_lower: float | None = say(None, "Lower end of a fixed band; by default all is kept.")
    dac_upper: float | None = say(None, "Upper end of a fixed band.")
    dac_dual_rate: float = say(2.0, "Step of the constraint's dual variable.")
    dac_dual_max: float = say(20.0, "Largest value of the dual variable.")
    dac_learning_rate: float = say(1e-3, "Learning rate of the sub-network that sets the band.")
    span_distance: str = say("l2", f"Distance of correlations: {', '.join(SPAN_DISTANCES)}.")
    span_chunker: str = say("punctuation", "Finds spans: punctuation, spacy, random.")

    # Other defaults than transformers'
    remove_unused_columns: bool = say(False, "Kept off: rows are tokenised here.")
    logging_nan_inf_filter: bool = say(False, "Kept off: a NaN loss ends the run.")
    logging_steps: float = say(10, "Optimiser steps between log records; below 1: a share.")

    def __post_init__(self) -> None:
        """Check every value that is ours; transformers checks its own."""
        check_given(self, DistillConfig)
        check_training(self, super().__post_init__)
        self.lmbda = _number_or_adaptive(self.lmbda)
        for name, fine, rule in self._rules():
            if not fine:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is wrong: {rule}")
        self._check_method()
        self._check_signal()
        self.dac_settings()
        for name in dict.fromkeys(filter(None, (self.recipe.divergence, self.recipe.contrast))):
            self.divergence_function(name)

    @property
    def recipe(self) -> Preset:
        """The method with what this configuration overrides.

        What a teacher behind a URL writes is there before the first step, as the dataset is.
        """
        recipe = self._asked
        return recipe if self.teacher_url is None else replace(recipe, completions="dataset")

    @property
    def _asked(self) -> Preset:
        """The method as it was asked for, whoever writes its offline text."""
        given = {key: getattr(self, key) for key in KEYS}
        return replace(
            preset(self.method), **{key: value for key, value in given.items() if value is not None}
        )

    @property
    def learns_whole_rows(self) -> bool:
        """Whether rows without a prompt can be learned: nothing is written after a prompt."""
        return not self._asked.writes and self._asked.completions == "dataset"

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

    def _check_method(self) -> None:
        recipe = self.recipe
        compared = ("lmbda", "beta", "divergence", "divergence_parameters", "contrast")
        for key in () if recipe.distils else compared:
            if getattr(self, key) not in (None, 0, "", {}):
                raise ConfigurationError(
                    f"{key}={getattr(self, key)!r} contradicts method={self.method!r}, which has "
                    "no distance to a teacher: set divergence_weight, or choose another method"
                )
        for key in () if recipe.writes else ("do_sample", "replay_buffer_size", "replay_share"):
            if getattr(self, key):
                raise ConfigurationError(
                    f"{key}={getattr(self, key)!r} contradicts method={self.method!r} with "
                    f"lmbda={recipe.lmbda}, by which the student writes nothing: raise lmbda"
                )
        if not (self.completion_only_loss or self.learns_whole_rows):
            raise ConfigurationError(
                f"completion_only_loss=False contradicts method={self.method!r}: text that is "
                "written after a prompt has a prompt that is not learned"
            )
        if self.packing and recipe.writes:
            raise ConfigurationError(
                f"packing=True contradicts method={self.method!r} with lmbda={recipe.lmbda}: rows "
                "are packed from text that was there before the step, and the student writes its "
                "text within it; set lmbda to 0, or leave packing out"
            )
        faults = (self._schedule_fault, self._adapter_fault, self._url_fault)
        fault = contradiction(recipe) or next(filter(None, (find() for find in faults)), None)
        if fault is not None:
            raise ConfigurationError(f"method={self.method!r}, lmbda={recipe.lmbda!r}: {fault}")

    def _schedule_fault(self) -> str | None:
        if self.replay_share and not self.recipe.replay_buffer_size:
            return f"replay_share={self.replay_share} needs replay_buffer_size"
        if not self.recipe.adaptive:
            return None
        if self.replay_share:
            return "replay_share is for a fixed lmbda; the scheduler decides itself"
        if IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            return "the scheduler follows the evaluation's loss: set eval_strategy and its data"
        return None

    def _adapter_fault(self) -> str | None:
        if self.lora_dropout and self.disable_dropout:
            return f"lora_dropout={self.lora_dropout} needs disable_dropout=False"
        if self.use_peft and self.student_type is not None:
            return "use_peft adapts a trained student; student_type builds a new one: choose one"
        return None

    def _url_fault(self) -> str | None:
        if self.teacher_url is None:
            named = self.teacher_served_model_name
            return f"teacher_served_model_name={named!r} needs teacher_url" if named else None
        if not self.teacher_url.startswith(("http://", "https://")):
            return f"teacher_url={self.teacher_url!r} must begin with http:// or https://"
        if self._asked.distils:
            return (
                f"teacher_url={self.teacher_url!r} gives text, and this method compares the "
                "models' predictions: set teacher_model_name_or_path, or choose method='seqkd'"
            )
        if self._asked.completions != "teacher":
            return (
                f"teacher_url={self.teacher_url!r} is never asked, the method reads the dataset's "
                "completions: choose method='seqkd', or leave it out"
            )
        return None

    def _check_signal(self) -> None:
        if self.teacher_signal is None:
            return
        if not self.recipe.distils:
            raise ConfigurationError(
                f"teacher_signal={self.teacher_signal!r} contradicts method={self.method!r}, which "
                "has no distance to a teacher: leave it out, or choose another method"
            )
        if self.recipe.writes or self.recipe.completions == "teacher":
            raise ConfigurationError(
                f"teacher_signal={self.teacher_signal!r} knows the dataset's completions only, and "
                f"method={self.method!r} has others written: set lmbda to 0, or leave it out"
            )

    def _rules(self) -> list[tuple[str, bool, str]]:
        share = "it must lie in [0, 1]"
        positive = "it must be at least 1"
        shares = ("beta", "lora_dropout", "replay_share", "dac_coverage", "dac_min_coverage")
        counts = [*("max_length", "max_completion_length", "rollout_batch_size", "scrg_rounds")]
        counts += ["lora_r", "lora_alpha"]
        optional = ("student_num_hidden_layers", "max_train_rows", "max_eval_rows")
        weights = [*("sft_weight", "divergence_weight", "span_weight", "scrg_warmup_steps")]
        weights += ["replay_buffer_size", "interleave_top_k"]
        names = [*DIVERGENCES, "dac"]
        return [
            ("method", self.method in PRESETS, f"use one of {sorted(PRESETS)}"),
            *((n, _within(getattr(self, n), 0, 1), share) for n in shares),
            (
                "lmbda",
                self.lmbda == ADAPTIVE or _within(self.lmbda, 0, 1),
                f"{share}, or be '{ADAPTIVE}'",
            ),
            *((n, getattr(self, n) >= 1, positive) for n in counts),
            *((n, getattr(self, n) is None or getattr(self, n) >= 1, positive) for n in optional),
            *((n, (getattr(self, n) or 0) >= 0, "it must be 0 or more") for n in weights),
            (
                "teacher_quantization",
                self.teacher_quantization in (None, "8bit", "4bit"),
                "use '8bit' or '4bit'",
            ),
            ("temperature", self.temperature > 0, "it must be above 0"),
            ("loss_chunk_size", self.loss_chunk_size >= 0, "it must be 0 (off) or more"),
            ("rollout_draft_budget", self.rollout_draft_budget >= 0, "it must be 0 or more"),
            ("rollout_temperature", self.rollout_temperature > 0, "it must be above 0"),
            ("divergence", self.divergence in (None, *names), f"use one of {names}"),
            (
                "contrast",
                self.contrast in (None, "", *DIVERGENCES),
                f"use one of {[*DIVERGENCES]}",
            ),
            (
                "completions",
                self.completions in (None, "dataset", "teacher"),
                "use 'dataset' or 'teacher'",
            ),
            (
                "span_distance",
                self.span_distance in SPAN_DISTANCES,
                f"use one of {list(SPAN_DISTANCES)}",
            ),
            (
                "student_type",
                self.student_type in (None, "dense_retnet", "dense_mamba"),
                "use 'dense_retnet', 'dense_mamba', or leave it out",
            ),
            (
                "warm_start",
                not self.warm_start or self.student_type is not None,
                "it is for a student that is built: set student_type",
            ),
        ]


def _number_or_adaptive(value: Any) -> Any:
    """Text of a flag as a number where it is one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _within(value: Any, least: float, most: float) -> bool:
    return value is None or (not isinstance(value, str) and least <= value <= most)


FIXED = (
    "method",
    "model_name_or_path",
    "student_type",
    "student_num_hidden_layers",
    "use_peft",
    "teacher_model_name_or_path",
    "dataset_name",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
"""Arguments that must not change between a run and its continuation."""


def fixed_choices(config: DistillConfig) -> dict[str, Any]:
    """The values of `FIXED`."""
    return {name: getattr(config, name) for name in FIXED}
