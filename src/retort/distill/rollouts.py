"""What is written for each optimiser step: sources, writers and the copy of a sharded student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from retort.distill import metrics
from retort.distill.batch import TrainingSequence
from retort.distill.config import DistillConfig
from retort.distill.data import Example
from retort.distill.records import correction_record
from retort.distill.sequences.sources import Sources, source_shares
from retort.distill.sequences.teacher_text import TeacherTexts
from retort.distill.sequences.writers import StudentWriter, Writing, WritingSettings
from retort.distill.sharding import RolloutCopy

KEPT_CORRECTIONS = 64


@dataclass(frozen=True)
class Writers:
    """Who writes, and within which limits.

    Attributes:
        student: the bare student, before it is sharded.
        teacher: the live teacher's model, None without one.
        end_tokens: ids that end a text; ``max_length`` bounds prompt + completion.
        rank: the process, which keeps the teacher's texts in a file of its own.
        sharded: the student will be sharded, and writes with a whole copy.
        share: gives the items of all processes for one's own.
    """

    student: Any
    teacher: Any
    end_tokens: tuple[int, ...]
    max_length: int
    rank: int = 0
    sharded: bool = False
    share: Callable[[list[Any]], list[Any]] = list


class Rollouts:
    """Draws the sequences of a step, counts what that took, and keeps the newest corrections.

    Attributes:
        sources: chooses and writes sequences.
        copy: the whole copy that a sharded student writes with, else None.
        corrections: records of the newest corrections of SCRG.
    """

    def __init__(self, config: DistillConfig, tokenizer: Any, writers: Writers) -> None:
        self.config, self.tokenizer, self.writers = config, tokenizer, writers
        self.copy: RolloutCopy | None = None
        self.corrections: list[dict[str, Any]] = []
        self.sources = self._build_sources()

    def draw(
        self, window: Sequence[Sequence[Example]], step: int, max_steps: int, student: Any
    ) -> tuple[list[list[TrainingSequence]], metrics.Sums]:
        """Sequences of each batch of an accumulation window, and sums for the run's meter.

        ``step`` counts the optimiser steps done, of ``max_steps``; a copy takes ``student``'s
        weights first.
        """
        started = perf_counter()
        if self.copy is not None:
            self.copy.refresh(student)
        revise = self.config.recipe.scrg and step >= self.config.scrg_start(max_steps)
        sequences, writing = self.sources.draw(window, step, revise, step / max(max_steps, 1))
        seconds = perf_counter() - started - writing.teacher_seconds
        made = [correction_record(c, step, self.tokenizer) for c in writing.corrections]
        self.corrections = [*self.corrections, *made][-KEPT_CORRECTIONS:]
        shares = {f"source/{k}": float(v) for k, v in source_shares(sequences).items()}
        times = {"time/rollout": seconds, "time/teacher": writing.teacher_seconds}
        return sequences, times | shares | _counted(writing)

    @property
    def writes_whole(self) -> bool:
        """Whether there is a whole student to write with: sharded, it needs a copy."""
        return not self.writers.sharded or self.copy is not None

    def answer(
        self,
        prompts: Sequence[list[int]],
        student: Any,
        limit: int | None = None,
        revise: bool = False,
    ) -> Writing:
        """The student's likeliest text after each prompt, at most ``limit`` tokens.

        Nothing is learned from it, counted, or drawn at random. With ``revise`` the teacher
        corrects each once. A copy takes ``student``'s weights first: every process must call this.
        """
        if self.copy is not None:
            self.copy.refresh(student)
        writer = StudentWriter(self._writing_student, self.writers.teacher, self._greedy(limit))
        return writer.write(prompts, revise)

    def teach(self, prompts: Sequence[list[int]], limit: int | None = None) -> Writing:
        """The teacher's likeliest texts, likewise."""
        writer = StudentWriter(self.writers.teacher, self._writing_student, self._greedy(limit))
        return writer.write(prompts)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a JSON checkpoint."""
        return {"sources": self.sources.state_dict(), "corrections": self.corrections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.sources.load_state_dict(state["sources"])
        self.corrections = state["corrections"]

    def _build_sources(self) -> Sources:
        config, recipe, writers = self.config, self.config.recipe, self.writers
        student, settings = writers.student, self._settings()
        if writers.sharded and (recipe.writes or config.predict_with_generate):
            self.copy = RolloutCopy(student, config.device)
            student = self.copy.model
        self._writing_student = student
        writer = StudentWriter(student, writers.teacher, settings) if recipe.writes else None
        texts = self._teacher_texts(student) if recipe.completions == "teacher" else None
        return Sources(recipe, writer, config.seed, config.replay_share, texts, writers.share)

    def _settings(self) -> WritingSettings:
        config, recipe = self.config, self.config.recipe
        return WritingSettings(
            end_tokens=self.writers.end_tokens,
            max_completion_length=config.max_completion_length,
            max_length=self.writers.max_length,
            batch_size=config.rollout_batch_size,
            drafter=config.rollout_drafter,
            draft_budget=config.rollout_draft_budget,
            rounds=config.scrg_rounds,
            do_sample=recipe.do_sample,
            temperature=config.rollout_temperature,
            interleave_top_k=recipe.interleave_top_k,
        )

    def _greedy(self, limit: int | None = None) -> WritingSettings:
        """Settings of texts that depend on weights and prompt alone."""
        settings = self._settings()
        return replace(
            settings,
            max_completion_length=limit or settings.max_completion_length,
            drafter="prompt-lookup" if self.config.rollout_drafter else None,
            rounds=1,
            do_sample=False,
            interleave_top_k=0,
        )

    def _teacher_texts(self, student: Any) -> TeacherTexts:
        """The teacher's likeliest texts, kept in a file of each process."""
        settings = self._greedy()
        writer = StudentWriter(self.writers.teacher, student, settings)
        made_by = {
            "teacher": self.config.teacher_model_name_or_path,
            "revision": self.config.teacher_model_revision,
            "max_completion_length": settings.max_completion_length,
            "max_length": settings.max_length,
            "end_tokens": list(settings.end_tokens),
        }
        path = self._text_file()
        return TeacherTexts(lambda p: [t.tokens for t in writer.write(p).texts], path, made_by)

    def _text_file(self) -> Path:
        folder, rank = Path(str(self.config.output_dir)), self.writers.rank
        file = Path(self.config.teacher_text_file or folder / "teacher_text.jsonl")
        return file.with_name(f"{file.stem}-{rank}{file.suffix}") if rank else file


def _counted(writing: Writing) -> metrics.Sums:
    """What was written, replaced and revised, as sums."""
    found = metrics.scrg_sums(writing.counts)
    if writing.texts:
        found |= {"rollout/tokens": float(writing.written_tokens)}
        found |= {"rollout/texts": float(len(writing.texts))}
        found |= {"skd.judged": float(writing.judged), "skd.replaced": float(writing.replaced)}
    return found
