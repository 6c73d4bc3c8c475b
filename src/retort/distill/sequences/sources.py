"""Where the sequences of a training step come from: dataset, student, replay buffer.

Every choice is drawn from (seed, optimiser step, place in the dataset), so that a resumed run makes
the same ones, whatever else used random numbers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.request import SamplingParams
from retort.distill.batch import TrainingSequence
from retort.distill.data import Example
from retort.distill.presets import Preset
from retort.distill.sequences.replay import ReplayBuffer
from retort.distill.sequences.scrg import Correction, Counts, Reviser, Text


@dataclass(frozen=True)
class WritingSettings:
    """How the student writes.

    Attributes:
        end_tokens: ids that end a text.
        max_completion_length: N; ``max_length`` bounds prompt + completion.
        batch_size: rows written at once, and held for revision.
        drafter, draft_budget: fixed speculation, which never changes the text.
        rounds: SCRG's corrections of a text.
    """

    end_tokens: tuple[int, ...]
    max_completion_length: int
    max_length: int
    batch_size: int = 16
    drafter: str | None = None
    draft_budget: int = 4
    rounds: int = 1


@dataclass
class Writing:
    """Texts that the student wrote, in the order of the prompts, and what revision did to them."""

    texts: list[Text] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    written_tokens: int = 0
    teacher_seconds: float = 0.0


class StudentWriter:
    """Greedy completions of the student on the decode engine, revised by the teacher if asked.

    The engine is made anew for each call: the weights have changed, and nothing is left over
    that a resumed run would lack.
    """

    def __init__(self, student: Any, teacher: Any, settings: WritingSettings) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self._banned = _beyond(student, teacher)

    def write(self, prompts: Sequence[list[int]], revise: bool) -> Writing:
        """Complete ``prompts``; with ``revise`` a batch is revised before the next is written."""
        settings, writing = self.settings, Writing()
        with Engine(
            self.student,
            drafter=settings.drafter,
            max_batch_size=settings.batch_size,
            draft_budget=settings.draft_budget,
            tape="completion" if revise else "draft",
        ) as engine:
            for start in range(0, len(prompts), settings.batch_size):
                texts = self._write(engine, prompts[start : start + settings.batch_size])
                writing.written_tokens += sum(len(text.tokens) for text in texts)
                if revise:
                    self._revise(engine, texts, writing)
                for text in texts:
                    engine.release(text.request_id)
                writing.texts += texts
        return writing

    def _write(self, engine: Engine, prompts: Sequence[list[int]]) -> list[Text]:
        texts = {}
        for prompt in prompts:
            limit = self.limit(prompt)
            params = SamplingParams(
                max_new_tokens=limit,
                eos_token_id=list(self.settings.end_tokens),
                logit_bias=self._banned,
            )
            rid = engine.add_request(prompt, params, hold=True)
            texts[rid] = Text(rid, list(prompt), [], limit)
        while engine.has_unfinished():
            for output in engine.step():
                texts[output.request_id].tokens = list(output.token_ids)
        return list(texts.values())

    def limit(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow ``prompt``."""
        settings = self.settings
        return min(settings.max_completion_length, settings.max_length - len(prompt))

    def _revise(self, engine: Engine, texts: list[Text], writing: Writing) -> None:
        # Scoring reads many tokens at once, where packing the weights first would not pay.
        teacher = PackedModel(self.teacher, cpu_backend="torch")
        reviser = Reviser(engine, teacher, self.settings.end_tokens, self.settings.rounds)
        writing.corrections += reviser.revise(texts)
        writing.counts += reviser.counts
        writing.teacher_seconds += reviser.teacher_seconds
        teacher.close()


class Sources:
    """Chooses the sequences of an optimiser step.

    Args:
        recipe: which streams there are, and the student's share of the distilled one.
        writer: None where the student writes nothing.
        buffer: earlier student texts; ``replay_share`` of the student's sequences come from it.
    """

    def __init__(
        self,
        recipe: Preset,
        writer: StudentWriter | None,
        seed: int,
        buffer: ReplayBuffer | None = None,
        replay_share: float = 0.0,
    ) -> None:
        self.recipe, self.writer, self.seed = recipe, writer, seed
        self.buffer = ReplayBuffer(0) if buffer is None else buffer  # an empty one is false
        self.replay_share = replay_share

    def draw(
        self, window: Sequence[Sequence[Example]], step: int, revise: bool
    ) -> tuple[list[list[TrainingSequence]], Writing]:
        """Sequences of each batch of an accumulation window, and what the student wrote for it."""
        examples = [example for batch in window for example in batch]
        draws = [random.Random(f"{self.seed}/{step}/{example.index}") for example in examples]
        chosen = [self._choose(draw) for draw in draws]
        pairs = zip(examples, chosen, strict=True)
        asked = [example.prompt_ids for example, source in pairs if source == "student"]
        writing = self.writer.write(asked, revise) if self.writer and asked else Writing()
        fresh = iter(writing.texts)
        made = [
            self._sequences(example, source, draw, fresh)
            for example, source, draw in zip(examples, chosen, draws, strict=True)
        ]
        for text in writing.texts:
            self.buffer.add(text.prompt, text.tokens)
        rest = iter(made)
        return [[s for _ in batch for s in next(rest)] for batch in window], writing

    def _choose(self, draw: random.Random) -> str:
        """Source of one distilled sequence; "" where nothing is distilled."""
        student, replay = draw.random(), draw.random()
        if not self.recipe.distils:
            return ""
        if student >= self.recipe.lmbda:
            return "dataset"
        return "replay" if replay < self.replay_share and len(self.buffer) else "student"

    def _sequences(
        self, example: Example, source: str, draw: random.Random, fresh: Any
    ) -> list[TrainingSequence]:
        """The supervised and the distilled sequence of an example; one row where they are one."""
        supervised, own = self.recipe.sft_weight > 0, source == "dataset"
        made = []
        if supervised or own:
            made.append(
                TrainingSequence(example.prompt_ids, example.completion_ids, supervised, own)
            )
        if source == "student":
            text = next(fresh)
            made.append(TrainingSequence(text.prompt, text.tokens, False, True, source))
        elif source == "replay":
            prompt, completion = self.buffer.sample(draw)
            made.append(TrainingSequence(prompt, completion, False, True, source))
        return made


def source_shares(window: Sequence[Sequence[TrainingSequence]]) -> Counter[str]:
    """How many distilled sequences (all, where none is) came from each source."""
    sequences = [s for batch in window for s in batch]
    return Counter(s.source for s in sequences if s.distilled) or Counter(
        s.source for s in sequences
    )


def _beyond(student: Any, teacher: Any) -> dict[int, float] | None:
    """A bias that forbids ids which the teacher's smaller vocabulary lacks."""
    if teacher is None:
        return None
    ours, theirs = (m.config.get_text_config().vocab_size for m in (student, teacher))
    return {token: float("-inf") for token in range(theirs, ours)} or None
