"""A whole run from its configuration: what ``retort distill`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from retort.decode.support import check_supported
from retort.distill.adapters import save_merged
from retort.distill.config import DistillConfig
from retort.distill.data import load_rows
from retort.distill.spans import check_chunker
from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError
from retort.train import checkpoint
from retort.train.running import named_start, train_to_end


def run(config: DistillConfig, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train as ``config`` says and return its output folder, which holds the student.

    A run on an ``output_dir`` that has a complete checkpoint goes on from the newest one, and
    ends in the weights of an unbroken run; ``resume_from_checkpoint`` names another one. Raises
    ConfigurationError, before anything is trained, for what does not fit together.
    """
    trainer = build_trainer(config, callbacks)

    def finish(folder: Path) -> None:
        if config.use_peft:
            save_merged(trainer, folder)
        else:
            trainer.save_model()

    return train_to_end(trainer, finish, quiet=bool(callbacks))


def build_trainer(
    config: DistillConfig, callbacks: Sequence[TrainerCallback] = ()
) -> DistillTrainer:
    """Load data and tokenizer; the trainer loads teacher and student once both are found fit."""
    set_seed(config.seed)
    check(config)
    return DistillTrainer(
        args=config,
        train_dataset=_train_rows(config),
        eval_dataset=_eval_rows(config),
        processing_class=_tokenizer(config),
        resume_from=_start(config),
        callbacks=list(callbacks),
    )


def check(config: DistillConfig) -> None:
    """Refuse, before weights are loaded or anything is written, what would fail in a step.

    Raises:
        ConfigurationError: evaluation without data, or a chunker or drafter that is not there.
        UnsupportedModelError: a student that cannot write, or a teacher that cannot revise.
    """
    recipe, student = config.recipe, config.model_name_or_path
    evaluates = config.eval_dataset_name or config.dataset_test_split
    strategy = IntervalStrategy(config.eval_strategy).value
    if strategy != "no" and not evaluates:
        raise ConfigurationError(
            f"eval_strategy={strategy!r} has no data: set eval_dataset_name or dataset_test_split"
        )
    if strategy == "no" and config.predict_with_generate:
        raise ConfigurationError(
            "predict_with_generate=True has no evaluation: set eval_strategy and its data"
        )
    if recipe.span_weight > 0:
        check_chunker(config.span_chunker)
    drafter, teacher = config.rollout_drafter, config.teacher_model_name_or_path
    writes = recipe.writes or config.predict_with_generate
    needed = [
        (student, writes and config.student_type is None),
        (teacher, recipe.scrg or recipe.interleave_top_k or recipe.completions == "teacher"),
        (drafter, recipe.writes and drafter not in ("none", "prompt-lookup")),
    ]
    for name, decodes in needed:
        if name is not None and decodes:
            _check_decodes(name, config.trust_remote_code)


def _check_decodes(name: str, trust_remote_code: bool) -> None:
    from retort.models import zoo

    found = zoo.load_config(name, trust_remote_code)
    if not getattr(found, "auto_map", None):  # code of its own is known once it is loaded
        check_supported(found)


def _start(config: DistillConfig) -> Path | None:
    """Where `train_to_end` will go on, which alone hashes it in full."""
    named = named_start(config)
    if named is not None:
        return checkpoint.require(named, full=False)
    return checkpoint.newest(str(config.output_dir), full=False)


def _tokenizer(config: DistillConfig) -> Any:
    """The student's tokenizer; a student that is built has its teacher's."""
    from retort.models import zoo

    name = config.model_name_or_path or config.teacher_model_name_or_path
    if name is None:
        raise ConfigurationError("no student: set model_name_or_path, or student_type")
    return zoo.load_tokenizer(name, config.trust_remote_code)


def _train_rows(config: DistillConfig) -> Any:
    if config.dataset_name is None:
        raise ConfigurationError("no data: set dataset_name to a file, folder or hub name")
    rows = load_rows(config.dataset_name, config.dataset_train_split, config.dataset_config)
    return _first(rows, config.max_train_rows)


def _eval_rows(config: DistillConfig) -> Any:
    name, split = config.eval_dataset_name, config.dataset_test_split
    if name is None and split is None:
        return None
    rows = load_rows(name or config.dataset_name or "", split or "train", config.dataset_config)
    return _first(rows, config.max_eval_rows)


def _first(rows: Any, count: int | None) -> Any:
    return rows if count is None else rows.select(range(min(count, len(rows))))
