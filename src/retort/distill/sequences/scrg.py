"""SCRG: sequence correction and re-generation (MGSR, arXiv 2407.10068, section 3.1).

The student writes y greedily. ŷ_t = argmax of the teacher's prediction of y_t; an *error* is a
position with y_t ≠ ŷ_t (up to and including the first end token). j is the error with the largest
KL(teacher ‖ student); y_j becomes ŷ_j and the student goes on writing from there.

Nothing before j is computed again: the student's row is rewound on the engine, the teacher's in
its own row cache, and both read tokens from position j on only (see `Counts`). The student's
distributions come from one packed pass over its completion, on the engine's own row rewound to
the prompt: the engine keeps no logits, and holding N × V of them for every row while it writes
would cost more memory than that pass costs time.

[ours] No error: the text is kept and counted. ŷ_j an end token: the text is cut there. j is the
last place that `limit` leaves: corrected, nothing regenerated. A text that stopped before
`limit` may grow after its correction, and a wrong end token is an error like any other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from retort.decode.engine import Engine
from retort.decode.outputs import require_whole
from retort.decode.packed import PackedModel
from retort.distill.losses.divergence import forward_kl
from retort.distill.signals import log_probabilities


@dataclass
class Text:
    """A text that the student wrote, in a held row of the engine where it is to be corrected.

    ``limit`` is N; ``tokens`` end with an end token unless the limit came first.
    """

    request_id: str
    prompt: list[int]
    tokens: list[int]
    limit: int


@dataclass(frozen=True)
class Correction:
    """``tokens[position]`` became ``replacement``; ``regenerated`` is what followed it.

    ``divergence`` is KL(teacher ‖ student) there, in nats.
    """

    prompt: list[int]
    tokens: list[int]
    position: int
    replacement: int
    regenerated: list[int]
    divergence: float


@dataclass
class Counts:
    """What a revision did; tokens are those that went through a model's forward.

    ``teacher_tokens`` and ``student_score_tokens`` judge the text as written (prompt included
    for the teacher); ``teacher_rescored_tokens`` and ``student_rescored_tokens`` judge the new
    suffix; ``student_rewritten_tokens`` wrote it. ``nll_before`` and ``nll_after`` are sums over
    ``tokens_before`` and ``tokens_after`` tokens of −log p under the teacher; ``nll_change`` and
    ``nll_change_squared`` are sums over texts of how much a text's mean changed.
    """

    texts: int = 0
    without_error: int = 0
    corrected: int = 0
    regenerated_tokens: int = 0
    teacher_tokens: int = 0
    teacher_rescored_tokens: int = 0
    student_score_tokens: int = 0
    student_rescored_tokens: int = 0
    student_rewritten_tokens: int = 0
    nll_before: float = 0.0
    nll_after: float = 0.0
    tokens_before: int = 0
    tokens_after: int = 0
    nll_change: float = 0.0
    nll_change_squared: float = 0.0

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class _Judged:
    """A text with what the teacher says of it, one entry a token."""

    text: Text
    teacher_row: int
    best: list[int] = field(default_factory=list)  # ŷ
    best_nll: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    scored: int = 0  # tokens judged so far

    def worst_error(self) -> int | None:
        """j, None without an error; the first of equals."""
        tokens = self.text.tokens
        errors = [t for t, (y, best) in enumerate(zip(tokens, self.best, strict=True)) if y != best]
        return max(errors, key=lambda t: (self.kl[t], -t), default=None)

    def truncate(self, position: int, replacement: int) -> None:
        """Put the teacher's token at ``position`` and forget what stood after it."""
        self.text.tokens = [*self.text.tokens[:position], replacement]
        self.nll[position:] = [self.best_nll[position]]
        for values in (self.best, self.best_nll, self.kl):
            del values[position + 1 :]
        self.scored = position + 1


class Reviser:
    """Revises texts that lie in held rows of ``engine``, whose model is the student.

    Args:
        engine: built with ``tape="completion"``.
        teacher: the teacher's packed model; its rows are opened and freed here.
        end_tokens: ids that end a text.
        rounds: corrections of each text (the paper: 1).
        score_tokens: most logits rows of a scoring pass, unless one text alone has more.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: PackedModel,
        end_tokens: Sequence[int],
        rounds: int = 1,
        score_tokens: int = 256,
    ) -> None:
        self.engine, self.teacher = engine, teacher
        self.end_tokens, self.rounds, self.score_tokens = set(end_tokens), rounds, score_tokens
        self.width = min(_vocabulary(engine.model), _vocabulary(teacher.model))
        self.counts = Counts()
        self.teacher_seconds = 0.0

    def revise(self, texts: Sequence[Text]) -> list[Correction]:
        """Correct ``texts`` in place and return what was changed, in no particular order."""
        judged = [_Judged(text, self.teacher.add_row()) for text in texts]
        try:
            self._judge(judged, with_student=True)
            before = self._count_before(judged)
            corrections = self._rounds(judged)
            self._count_after(judged, before)
        finally:
            for each in judged:
                self.teacher.free_row(each.teacher_row)
        return corrections

    def _rounds(self, judged: list[_Judged]) -> list[Correction]:
        corrections: list[Correction] = []
        for number in range(self.rounds):
            found = [(each, j) for each in judged if (j := each.worst_error()) is not None]
            if not found:
                break
            corrections += self._correct(found)
            self._judge([each for each, _ in found], with_student=number + 1 < self.rounds)
        return corrections

    def _correct(self, found: list[tuple[_Judged, int]]) -> list[Correction]:
        before = [(list(each.text.tokens), each.kl[j]) for each, j in found]
        for each, j in found:
            each.truncate(j, each.best[j])
        self._rewrite([each.text for each, _ in found])
        made = [
            Correction(
                prompt=each.text.prompt,
                tokens=tokens,
                position=j,
                replacement=each.text.tokens[j],
                regenerated=each.text.tokens[j + 1 :],
                divergence=divergence,
            )
            for (each, j), (tokens, divergence) in zip(found, before, strict=True)
        ]
        self.counts.corrected += len(made)
        self.counts.regenerated_tokens += sum(len(c.regenerated) for c in made)
        return made

    def _rewrite(self, texts: Sequence[Text]) -> None:
        """Let the student go on after the last token of each text that may still grow."""
        waiting: dict[str, Text] = {}
        for text in texts:
            room = text.limit - len(text.tokens)
            if room > 0 and text.tokens[-1] not in self.end_tokens:
                kept = len(text.prompt) + len(text.tokens) - 1
                self.engine.rewind(text.request_id, kept, text.tokens[-1:], max_new_tokens=room)
                waiting[text.request_id] = text
        started = self.engine.target.forward_tokens
        while waiting:
            for output in require_whole(self.engine.step()):
                waiting.pop(output.request_id).tokens = list(output.token_ids)
        self.counts.student_rewritten_tokens += self.engine.target.forward_tokens - started

    # Judging

    def _judge(self, judged: Sequence[_Judged], with_student: bool) -> None:
        """Bring every text's entries up to its last token; only tokens not yet judged are read."""
        first = all(each.scored == 0 for each in judged)
        for group in self._groups(judged):
            teacher = self._score(self.teacher, [(e.teacher_row, e) for e in group], first)
            rows = [(self.engine.row(e.text.request_id), e) for e in group] if with_student else []
            student = self._score(self.engine.target, rows, first) if rows else [None] * len(group)
            for each, p, q in zip(group, teacher, student, strict=True):
                _extend(each, p, q, self.width)

    def _groups(self, judged: Sequence[_Judged]) -> Iterator[list[_Judged]]:
        group: list[_Judged] = []
        size = 0
        for each in judged:
            new = len(each.text.tokens) - each.scored
            if group and size + new > self.score_tokens:
                yield group
                group, size = [], 0
            if new:
                group.append(each)
                size += new
        if group:
            yield group

    def _score(
        self, packed: PackedModel, rows: Sequence[tuple[int, _Judged]], first: bool
    ) -> Sequence[Tensor]:
        """Logits ``[n, V]`` of each text's tokens that are not judged yet."""
        feeds, keep = [], []
        for row, each in rows:
            sequence = [*each.text.prompt, *each.text.tokens]
            start = len(each.text.prompt) + each.scored - 1
            packed.rewind(row, min(start, packed.length(row)))
            feeds.append((row, sequence[packed.length(row) : -1]))
            keep.append(len(each.text.tokens) - each.scored)
        before, started = packed.forward_tokens, time.perf_counter()
        logits = packed.forward(feeds, keep)
        if packed is self.teacher:
            self.teacher_seconds += time.perf_counter() - started
        self._count_scored(packed is self.teacher, first, packed.forward_tokens - before)
        return logits.split(keep)

    def _count_scored(self, by_teacher: bool, first: bool, tokens: int) -> None:
        who = "teacher" if by_teacher else "student"
        what = ("tokens" if by_teacher else "score_tokens") if first else "rescored_tokens"
        name = f"{who}_{what}"
        setattr(self.counts, name, getattr(self.counts, name) + tokens)

    def _count_before(self, judged: Sequence[_Judged]) -> list[float]:
        """Returns the mean −log p of each text."""
        self.counts.texts += len(judged)
        self.counts.without_error += sum(each.worst_error() is None for each in judged)
        self.counts.nll_before += sum(sum(each.nll) for each in judged)
        self.counts.tokens_before += sum(len(each.nll) for each in judged)
        return [fmean(each.nll) for each in judged]

    def _count_after(self, judged: Sequence[_Judged], before: Sequence[float]) -> None:
        self.counts.nll_after += sum(sum(each.nll) for each in judged)
        self.counts.tokens_after += sum(len(each.nll) for each in judged)
        changes = [fmean(e.nll) - old for e, old in zip(judged, before, strict=True)]
        self.counts.nll_change += sum(changes)
        self.counts.nll_change_squared += sum(change**2 for change in changes)


def _extend(each: _Judged, teacher: Tensor, student: Tensor | None, width: int) -> None:
    """Append the judgement of the tokens from ``scored`` on; without a student their KL is 0."""
    tokens = torch.tensor(each.text.tokens[each.scored :], device=teacher.device)
    p = log_probabilities(teacher, width)
    best = p.max(-1)
    each.best += best.indices.tolist()
    each.best_nll += (-best.values).tolist()
    each.nll += (-p.gather(1, tokens[:, None])[:, 0]).tolist()
    if student is None:
        each.kl += [0.0] * len(p)
    else:
        each.kl += forward_kl(p, log_probabilities(student.to(p.device), width)).tolist()
    each.scored = len(each.text.tokens)


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size
