"""A few prompts answered by the teacher, and by the student before and after training.

The report shows them side by side. Texts are greedy: nothing is drawn at random, so that a run ends
in the same weights with and without them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.distill.sequences.scrg import Correction
from retort.distill.sequences.writers import Writing
from retort.distill.teachers import AdapterOffTeacher
from retort.errors import RetortError
from retort.provenance import write_json

if TYPE_CHECKING:
    from retort.distill.trainer import DistillTrainer

logger = logging.getLogger(__name__)

SAMPLES = "samples.json"
Record = dict[str, Any]
"""The fields of a `retort.report.Sample`."""


class Samples:
    """Writes `SAMPLES` into the run's folder, before training and again at its end.

    The prompts are the first of the evaluation set, or of the training set where there is none.
    A run that goes on reads again what was written before training. What a model cannot write is
    left out with a warning.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer
        self.path = Path(str(trainer.args.output_dir)) / SAMPLES

    def begin(self, step: int) -> None:
        """Write what teacher and student say before training; a run that goes on has it."""
        prompts = self._prompts()
        if step or not prompts:
            return
        note = f"At most {self._limit} tokens each."
        records: list[Record] = [{"prompt": self._text(p), "note": note} for p in prompts]
        for record, text in zip(records, self._texts(self._taught, prompts), strict=True):
            record["teacher"] = text
        for record, text in zip(records, self._texts(self._written, prompts), strict=True):
            record["before"] = text
        self._save(records)

    def end(self) -> None:
        """Add what the trained student says, and where SCRG would correct it."""
        prompts = self._prompts()
        if not prompts:
            return
        known = {record["prompt"]: record for record in self._stored()}
        revise = self.trainer.config.recipe.scrg
        writing = self._tried(lambda: self._written(prompts, revise)) or Writing()
        after = {tuple(text.prompt): {"after": self._text(text.tokens)} for text in writing.texts}
        after |= {tuple(c.prompt): self._corrected(c) for c in writing.corrections}
        named = [(self._text(prompt), after.get(tuple(prompt), {})) for prompt in prompts]
        self._save([known.get(text, {"prompt": text}) | more for text, more in named])

    @property
    def _limit(self) -> int:
        return self.trainer.config.report_sample_tokens

    def _prompts(self) -> list[list[int]]:
        """The prompts' ids; none where samples are off or no process holds a whole student."""
        run = self.trainer
        if not run.rollouts.writes_whole:
            return []
        given = run.eval_dataset
        rows: Any = next(iter(given.values())) if isinstance(given, dict) else given
        rows = run.train_dataset if rows is None else rows
        count = min(run.config.report_samples, len(rows))
        return [list(rows[i]["prompt_ids"]) for i in range(count)]

    def _written(self, prompts: Sequence[list[int]], revise: bool = False) -> Writing:
        run = self.trainer
        return run.rollouts.answer(prompts, run._bare_student(), self._limit, revise)

    def _taught(self, prompts: Sequence[list[int]]) -> Writing:
        """The teacher's texts; none of a teacher that is the student without its adapter."""
        teacher = self.trainer.teacher
        if isinstance(teacher, AdapterOffTeacher) or getattr(teacher, "model", None) is None:
            return Writing()
        return self.trainer.rollouts.teach(prompts, self._limit)

    def _texts(
        self, write: Callable[[Sequence[list[int]]], Writing], prompts: Sequence[list[int]]
    ) -> list[str | None]:
        writing = self._tried(lambda: write(prompts))
        texts = [] if writing is None else writing.texts
        return [self._text(text.tokens) for text in texts] or [None] * len(prompts)

    def _tried(self, write: Callable[[], Writing]) -> Writing | None:
        try:
            return write()
        except RetortError as error:
            logger.warning("%s lacks a text (%s); report_samples=0 writes none", SAMPLES, error)
            return None

    def _corrected(self, made: Correction) -> Record:
        """The student's own text, with the place that SCRG would correct."""
        text = self._text(made.tokens)
        ends = made.position, made.position + 1
        places = sorted(_shared(text, self._text(made.tokens[:end])) for end in ends)
        replacement = self.trainer.tokens.decode([made.replacement])
        return {"after": text, "marked": places, "replacement": replacement}

    def _text(self, ids: Sequence[int]) -> str:
        return self.trainer.tokens.decode(ids, skip_special_tokens=True)

    def _stored(self) -> list[Record]:
        """Records of this run from before; none where the file is missing or damaged."""
        try:
            found = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return []
        listed = found if isinstance(found, list) else []
        return [record for record in listed if isinstance(record, dict) and "prompt" in record]

    def _save(self, records: Sequence[Record]) -> None:
        if self.trainer.is_world_process_zero():
            write_json(self.path, list(records))


def _shared(left: str, right: str) -> int:
    """Characters at which both begin alike; half a character's tokens read otherwise."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
