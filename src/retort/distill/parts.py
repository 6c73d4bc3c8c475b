"""The models that a `DistillTrainer` is put together from: given, or loaded by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retort.decode.support import max_length
from retort.distill.captured import require_able_base
from retort.distill.config import DistillConfig
from retort.distill.init import build_student, student_outline
from retort.distill.sequences.writers import check_drafter
from retort.distill.signals import TRAINING_ADVICE, check_vocabularies
from retort.distill.teachers import has_adapter, load_teacher, teacher_outline
from retort.errors import ConfigurationError, RetortError
from retort.models import zoo

PADDING = 1024
"""Rows that a head may have beyond the tokenizer's (or a sixteenth of these, if that is more)."""


@dataclass
class Models:
    """Student and teacher of a run, each as a model, or None until it is loaded.

    What is known of both before their weights are read stands in ``outlines``: the models
    themselves where they are given.
    """

    config: DistillConfig
    student: Any
    teacher: Any
    outlines: tuple[Any, Any]

    def load(self) -> tuple[Any, Any]:
        """Student and teacher (None without one), their weights read."""
        if self.teacher is None and self.outlines[1] is not None:
            self.teacher = load_teacher(self.config)
        if self.student is None:
            self.student = build_student(self.config, self.teacher)
        if self.student is self.teacher:
            raise ConfigurationError(
                "model and teacher_model are one object, whose weights cannot stand and move: give "
                "the teacher a copy"
            )
        return self.student, self.teacher

    def longest_sequence(self) -> int:
        """Most tokens of a sequence: ``max_length``, within the context of both."""
        contexts = (max_length(model.config) for model in self.outlines if model is not None)
        return min([self.config.max_length, *(c for c in contexts if c is not None)])

    def vocab_size(self) -> int:
        """Ids that both know, from 0; heads and embeddings may be padded beyond."""
        known = [m.config.get_text_config().vocab_size for m in self.outlines if m is not None]
        return min(known)

    def check_tokenizers(self, tokenizer: Any) -> None:
        """Refuse models whose predictions are over another vocabulary than ``tokenizer``'s.

        A model that is named brings its tokenizer. A teacher that is given brings the one of the
        folder or known model that it came from, or else the size of its head speaks.
        """
        recipe, teacher = self.config.recipe, self.outlines[1]
        if teacher is None or not (recipe.needs_teacher or self.config.student_type is not None):
            return
        students, teachers = self._students_tokenizer(), self._teachers_tokenizer()
        if teachers is None:
            _check_heads(tokenizer, *self.outlines)
        else:
            check_vocabularies(teachers, tokenizer)
        if students is not None:
            check_vocabularies(tokenizer, students, who="processing_class's and the student's")

    def check_drafter(self) -> None:
        """Refuse a model as the drafter of rollouts that cannot draft for the student."""
        name = self.config.rollout_drafter
        if self.config.recipe.writes and name not in (None, "none", "prompt-lookup"):
            check_drafter(name, zoo.load_outline(name), self.outlines[0])

    def _students_tokenizer(self) -> Any:
        """That of a student that is named; one that is given may have been made for another."""
        name = self.config.model_name_or_path
        return None if self.student is not None or name is None else self._found(name)

    def _teachers_tokenizer(self) -> Any:
        """The teacher's own, None where a model was given that does not tell it."""
        if self.teacher is not None:
            name = self.teacher.config.name_or_path
            return self._found(name) if zoo.is_at_hand(name) else None
        name = self.config.teacher_model_name_or_path or ""
        return zoo.load_tokenizer(name, self.config.trust_remote_code)

    def _found(self, name: str) -> Any:
        try:
            return zoo.load_tokenizer(name, self.config.trust_remote_code)
        except RetortError:
            return None


def find_models(config: DistillConfig, student: Any, teacher: Any) -> Models:
    """The models of a run, each given as a model, a name or None (then the configuration names it).

    A name that is given moves into ``config``; nothing is loaded but outlines. Raises
    ConfigurationError where a model is needed and none is named.
    """
    if isinstance(student, str):
        config.model_name_or_path, student = student, None
    if isinstance(teacher, str):
        config.teacher_model_name_or_path, teacher = teacher, None
    if teacher is None and _needs_loading(config, student):
        guide = teacher_outline(config)
    else:
        guide = teacher
    outline = student_outline(config, guide) if student is None else student
    return Models(config, student, teacher, (outline, guide))


def _needs_loading(config: DistillConfig, student: Any) -> bool:
    """Whether a teacher that was not given has to be loaded."""
    if config.teacher_model_name_or_path is not None or config.student_type is not None:
        return True
    if not config.recipe.needs_teacher or config.teacher_signal is not None:
        return False
    base_teaches = config.use_peft or has_adapter(student)
    if base_teaches:
        require_able_base(config)
    return not base_teaches


def _check_heads(tokenizer: Any, student: Any, teacher: Any) -> None:
    """Refuse a teacher whose head lacks tokens, or has more of them than padding explains."""
    known = len(tokenizer)
    ours, theirs = (m.config.get_text_config().vocab_size for m in (student, teacher))
    padded = theirs - known <= max(PADDING, known // 16)
    if theirs != ours and not (min(known, ours) <= theirs and padded):
        raise ConfigurationError(
            f"The teacher predicts {theirs} tokens, the student {ours}, and the tokenizer has "
            f"{known}: they do not share one. {TRAINING_ADVICE}"
        )
