"""What a `DistillTrainer` is put together from: models, the longest sequence, rows as ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retort.decode.support import max_length
from retort.distill.config import DistillConfig
from retort.distill.data import Encoding, tokenize
from retort.distill.init import build_student
from retort.distill.remote_rows import answered
from retort.distill.teachers import has_adapter, load_teacher


def teacher_for(config: DistillConfig, given: Any, student: Any) -> Any:
    """The teacher that is ``given`` (a model, a name or None), or that the configuration names."""
    if isinstance(given, str):
        config.teacher_model_name_or_path, given = given, None
    own = config.teacher_signal is not None or has_adapter(student)
    needed = (config.recipe.needs_teacher and not own) or config.student_type is not None
    named = config.teacher_model_name_or_path is not None
    return load_teacher(config) if given is None and (needed or named) else given


def student_for(config: DistillConfig, given: Any, teacher: Any) -> Any:
    """The student that is ``given`` (a model, a name or None), or as the configuration says."""
    if isinstance(given, str):
        config.model_name_or_path, given = given, None
    return build_student(config, teacher) if given is None else given


def longest_sequence(config: DistillConfig, *models: Any) -> int:
    """Most tokens of a sequence: ``max_length``, within the context of student and teacher."""
    contexts = (max_length(model.config) for model in models if model is not None)
    return min([config.max_length, *(c for c in contexts if c is not None)])


def tokenized(
    rows: Any, name: str, config: DistillConfig, tokenizer: Any, ends: tuple[int, ...], longest: int
) -> Any:
    """Rows of the argument ``name`` as ids; a dictionary of datasets stays one."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {
            k: tokenized(v, f"{name} {k!r}", config, tokenizer, ends, longest)
            for k, v in rows.items()
        }
    evaluating = name.startswith("eval")
    origin = (config.eval_dataset_name if evaluating else None) or config.dataset_name or name
    encoding = Encoding(
        tokenizer=tokenizer,
        eos_ids=ends,
        max_length=longest,
        completion=evaluating or config.recipe.reads_dataset,
        as_chat=config.as_chat,
        skip_long_prompts=config.skip_long_prompts,
        whole=not config.predict_with_generate if evaluating else config.learns_whole_rows,
        completion_only=config.completion_only_loss,
        origin=Path(origin).name,
    )
    if config.teacher_url is not None and not evaluating:
        rows = answered(rows, config, encoding)
    return tokenize(rows, encoding, config.dataset_num_proc)
