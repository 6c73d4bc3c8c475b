"""Where the sequences of a training step come from: dataset, teacher, student, replay buffer.

Every choice is drawn from (seed, optimiser step, place in the dataset), so that a resumed run makes
the same ones, whatever else used random numbers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from retort.distill.batch import TrainingSequence
from retort.distill.data import Example
from retort.distill.presets import Preset
from retort.distill.sequences.replay import ReplayBuffer
from retort.distill.sequences.schedule import AdaptiveShare
from retort.distill.sequences.scrg import Text
from retort.distill.sequences.teacher_text import TeacherTexts
from retort.distill.sequences.writers import StudentWriter, Writing


class Sources:
    """Chooses the sequences of an optimiser step.

    Args:
        recipe: which streams there are, and the student's share of the distilled one.
        writer: None where the student writes nothing.
        replay_share: share of the student's sequences that come from the buffer.
        teacher_texts: None where no teacher's text is learned from.
        share: gives the items of all processes for one's own; called once in each `draw` that may
            write, so that every process holds the same buffer.

    Attributes:
        buffer: earlier student texts.
        schedule: φ, which moves only where the recipe's share is "adaptive".
    """

    def __init__(
        self,
        recipe: Preset,
        writer: StudentWriter | None,
        seed: int,
        replay_share: float = 0.0,
        teacher_texts: TeacherTexts | None = None,
        share: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.recipe, self.writer, self.seed = recipe, writer, seed
        self.replay_share, self.teacher_texts, self.share = replay_share, teacher_texts, share
        self.buffer = ReplayBuffer(recipe.replay_buffer_size)
        self.schedule = AdaptiveShare()

    def draw(
        self,
        window: Sequence[Sequence[Example]],
        step: int,
        revise: bool,
        progress: float = 0.0,
    ) -> tuple[list[list[TrainingSequence]], Writing]:
        """Sequences of each batch of an accumulation window, and what the student wrote for it.

        step: optimiser steps done; progress: their share of all steps.
        """
        examples = [example for batch in window for example in batch]
        draws = [random.Random(f"{self.seed}/{step}/{example.index}") for example in examples]
        whole = self._for_all(step, progress)
        chosen = [whole or self._choose(draw) for draw in draws]
        writing = self._written(examples, chosen, draws, revise)
        fresh, offline = iter(writing.texts), self._offline(examples)
        made = [
            self._sequences(text, source, draw, fresh)
            for text, source, draw in zip(offline, chosen, draws, strict=True)
        ]
        pairs = zip(examples, chosen, strict=True)
        self._remember([e.index for e, source in pairs if source == "student"], writing.texts)
        rest = iter(made)
        return [[s for _ in batch for s in next(rest)] for batch in window], writing

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a JSON checkpoint; teacher texts have a file of their own."""
        return {"buffer": self.buffer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.buffer.load_state_dict(state["buffer"])
        self.schedule.load_state_dict(state["schedule"])

    def _for_all(self, step: int, progress: float) -> str:
        """The scheduler's choice, which holds for every sequence of the step; else ""."""
        if not self.recipe.adaptive:
            return ""
        r = random.Random(f"{self.seed}/{step}/r").random()  # the same in every process
        return self.schedule.choose(r, progress, self.buffer.is_full)

    def _remember(self, indices: Sequence[int], texts: Sequence[Text]) -> None:
        """Keep what all processes wrote, in the dataset's order, whoever wrote it."""
        if self.writer is None or not self.buffer.capacity:
            return
        written = [(i, t.prompt, t.tokens) for i, t in zip(indices, texts, strict=True)]
        for _, prompt, completion in sorted(self.share(written)):
            self.buffer.add(prompt, completion)

    def _choose(self, draw: random.Random) -> str:
        """Source of one distilled sequence; "" where nothing is distilled."""
        student, replay = draw.random(), draw.random()
        if not self.recipe.distils:
            return ""
        if student >= float(self.recipe.lmbda):
            return "dataset"
        return "replay" if replay < self.replay_share and len(self.buffer) else "student"

    def _written(
        self,
        examples: Sequence[Example],
        chosen: Sequence[str],
        draws: Sequence[random.Random],
        revise: bool,
    ) -> Writing:
        asked = [i for i, source in enumerate(chosen) if source == "student"]
        if self.writer is None or not asked:
            return Writing()
        prompts = [examples[i].prompt_ids for i in asked]
        return self.writer.write(prompts, revise, [draws[i].getrandbits(62) for i in asked])

    def _offline(self, examples: Sequence[Example]) -> list[TrainingSequence]:
        """What the student did not write, an example each; empty where no stream reads it."""
        texts = [e.completion_ids for e in examples]
        source = self.recipe.completions
        if self.teacher_texts is not None:
            texts = self.teacher_texts.of([e.prompt_ids for e in examples])
        supervised = self.recipe.sft_weight > 0
        return [
            TrainingSequence(example.prompt_ids, text, supervised, False, source)
            for example, text in zip(examples, texts, strict=True)
        ]

    def _sequences(
        self, offline: TrainingSequence, source: str, draw: random.Random, fresh: Iterator[Text]
    ) -> list[TrainingSequence]:
        """The sequences of an example; supervised and distilled text is one row where it is one."""
        contrast = bool(self.recipe.contrast)
        made = []
        if contrast or source == "dataset":
            made.append(replace(offline, distilled=True))
        elif offline.supervised:
            made.append(offline)
        own = {"supervised": False, "distilled": not contrast, "contrasted": contrast}
        if source == "student":
            text = next(fresh)
            made.append(TrainingSequence(text.prompt, text.tokens, source=source, **own))
        elif source == "replay":
            prompt, completion = self.buffer.sample(draw)
            made.append(TrainingSequence(prompt, completion, source=source, **own))
        return made


def source_shares(window: Sequence[Sequence[TrainingSequence]]) -> Counter[str]:
    """How many compared sequences (all, where none is) came from each source."""
    sequences = [s for batch in window for s in batch]
    return Counter(s.source for s in sequences if s.distilled or s.contrasted) or Counter(
        s.source for s in sequences
    )
