"""The student's texts, written on the decode engine and corrected by the teacher where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.decode.engine import Engine
from retort.decode.outputs import require_whole
from retort.decode.packed import PackedModel
from retort.decode.params import SamplingParams
from retort.distill.sequences.interleave import BLOCK, Interleaver
from retort.distill.sequences.scrg import Correction, Counts, Reviser, Text
from retort.errors import ConfigurationError


@dataclass(frozen=True)
class WritingSettings:
    """How the student writes.

    Attributes:
        end_tokens: ids that end a text.
        max_completion_length: N; ``max_length`` bounds prompt + completion.
        batch_size: rows written at once; those that the teacher corrects are held together.
        drafter, draft_budget: fixed speculation, which never changes the text.
        rounds: SCRG's corrections of a text.
        do_sample, temperature: draw tokens, from the distribution at this temperature.
        interleave_top_k: K of speculative KD, 0 for none.
    """

    end_tokens: tuple[int, ...]
    max_completion_length: int
    max_length: int
    batch_size: int = 16
    drafter: str | None = None
    draft_budget: int = 4
    rounds: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    interleave_top_k: int = 0


@dataclass
class Writing:
    """Texts that the student wrote, in the order of the prompts, and what was done to them.

    ``judged`` and ``replaced`` count the tokens that speculative KD looked at and changed.
    """

    texts: list[Text] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    written_tokens: int = 0
    judged: int = 0
    replaced: int = 0
    teacher_seconds: float = 0.0


class StudentWriter:
    """Completions of the student on the decode engine, corrected by the teacher if asked.

    The engine is made anew for each call: the weights have changed, and nothing is left over
    that a resumed run would lack. A text depends on weights, prompt and seed alone.

    Args:
        student: the model that writes.
        teacher: bounds the vocabulary, and corrects; None where there is none.

    Raises:
        ConfigurationError: a drafter that the student cannot use.
    """

    def __init__(self, student: Any, teacher: Any, settings: WritingSettings) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self._banned = _beyond(student, teacher)
        self._drafter = load_drafter(settings.drafter, student)

    def write(
        self, prompts: Sequence[list[int]], revise: bool = False, seeds: Sequence[int] | None = None
    ) -> Writing:
        """Complete ``prompts``, each place of the batch refilled as soon as its text has ended.

        Where the teacher corrects (``revise``, or speculative KD), texts are held, and a batch is
        done with before the next is begun. ``seeds`` are the noise of each text where tokens are
        drawn (0 by default).
        """
        corrects, writing = revise or self.settings.interleave_top_k > 0, Writing()
        noise = [0] * len(prompts) if seeds is None else list(seeds)
        size = self.settings.batch_size if corrects else max(len(prompts), 1)
        with self._engine(rewinds=corrects) as engine:
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size], noise[start : start + size]
                texts = self._write(engine, *batch, hold=corrects)
                if self.settings.interleave_top_k:
                    self._interleave(engine, texts, batch[1], writing)
                writing.written_tokens += sum(len(text.tokens) for text in texts)
                if revise:
                    self._revise(engine, texts, writing)
                for text in texts if corrects else ():
                    engine.release(text.request_id)
                writing.texts += texts
        return writing

    def limit(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow ``prompt``."""
        settings = self.settings
        return min(settings.max_completion_length, settings.max_length - len(prompt))

    def _engine(self, rewinds: bool) -> Engine:
        return Engine(
            self.student,
            drafter=self._drafter,
            max_batch_size=self.settings.batch_size,
            draft_budget=self.settings.draft_budget,
            tape="completion" if rewinds else "draft",
        )

    def _write(
        self, engine: Engine, prompts: Sequence[list[int]], seeds: Sequence[int], hold: bool
    ) -> list[Text]:
        settings, texts = self.settings, {}
        for prompt, seed in zip(prompts, seeds, strict=True):
            limit = self.limit(prompt)
            params = SamplingParams(
                max_new_tokens=min(limit, BLOCK) if settings.interleave_top_k else limit,
                eos_token_id=list(settings.end_tokens),
                logit_bias=self._banned,
                do_sample=settings.do_sample,
                temperature=settings.temperature,
                seed=seed,
            )
            rid = engine.add_request(prompt, params, hold=hold)
            texts[rid] = Text(rid, list(prompt), [], limit)
        while engine.has_unfinished():
            for output in require_whole(engine.step()):
                texts[output.request_id].tokens = list(output.token_ids)
        return list(texts.values())

    def _interleave(
        self, engine: Engine, texts: list[Text], seeds: Sequence[int], writing: Writing
    ) -> None:
        settings, teacher = self.settings, PackedModel(self.teacher)
        top_k, ends = settings.interleave_top_k, settings.end_tokens
        made = Interleaver(engine, teacher, ends, top_k, settings.do_sample)
        made.finish(texts, seeds)
        writing.judged += made.judged
        writing.replaced += made.replaced
        writing.teacher_seconds += made.teacher_seconds
        teacher.close()

    def _revise(self, engine: Engine, texts: list[Text], writing: Writing) -> None:
        # Scoring reads many tokens at once, where packing the weights first would not pay.
        teacher = PackedModel(self.teacher, cpu_backend="torch", prepack=False)
        reviser = Reviser(engine, teacher, self.settings.end_tokens, self.settings.rounds)
        writing.corrections += reviser.revise(texts)
        writing.counts += reviser.counts
        writing.teacher_seconds += reviser.teacher_seconds
        teacher.close()


def load_drafter(name: str | None, student: Any) -> Any:
    """What an engine takes as the drafter of ``name``: a model is loaded once, not every step.

    Raises ConfigurationError when its vocabulary is not the student's.
    """
    if name in (None, "none", "prompt-lookup"):
        return name
    from retort.models import zoo

    model = zoo.load_model(name, dtype=student.dtype)
    check_drafter(name, model, student)
    return model.to(student.device).eval().requires_grad_(False)


def check_drafter(name: str | None, drafter: Any, student: Any) -> None:
    """Refuse a drafter of another vocabulary; models, or outlines of them."""
    sizes = [m.config.get_text_config().vocab_size for m in (drafter, student)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"rollout_drafter {name} has a vocabulary of {sizes[0]} tokens and the student one of "
            f"{sizes[1]}: choose 'prompt-lookup' or an earlier checkpoint of the student"
        )


def _beyond(student: Any, teacher: Any) -> dict[int, float] | None:
    """A bias that forbids ids which the teacher's smaller vocabulary lacks."""
    if teacher is None:
        return None
    ours, theirs = (m.config.get_text_config().vocab_size for m in (student, teacher))
    return {token: float("-inf") for token in range(theirs, ours)} or None
