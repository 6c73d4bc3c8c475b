"""The rows a loss works on, and the sums it returns.

N rows are the predicted tokens of all sequences, one after another (padding and prompt left out
by the caller). Row n holds the prediction *of* `targets[n]`, so labels and spans are shifted
together, once, before the losses see them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor

from retort.distill.signals import Signal, log_probabilities
from retort.errors import ConfigurationError

IGNORED = -100
"""Target of a row that is not to be counted (Hugging Face's convention for labels)."""


@dataclass
class TokenRows:
    """Student logits [N, V_s] beside the teacher's signal of the same rows.

    targets: int64 [N], IGNORED where a row does not count. pairs: bool [N] or None, true at n
    where rows n and n + 1 are neighbours in one span (see `retort.distill.spans`).
    """

    student_logits: Tensor
    targets: Tensor
    signal: Signal | None = None
    pairs: Tensor | None = None
    temperature: float = 1.0

    @property
    def counted(self) -> Tensor:
        """Bool [N]: rows that enter sums and counts."""
        return self.targets != IGNORED

    @property
    def width(self) -> int:
        """The vocabulary shared by teacher and student, W = min(V_t, V_s)."""
        return min(self.student_logits.shape[-1], self._teacher().vocab_size)

    @cached_property
    def teacher(self) -> Tensor:
        """The teacher's log-probabilities [N, W] at the temperature, without gradient."""
        return self._teacher().log_probs(self.width, self.temperature)

    @cached_property
    def student(self) -> Tensor:
        """The student's log-probabilities [N, W] at the temperature."""
        return log_probabilities(self.student_logits, self.width, self.temperature)

    @cached_property
    def support(self) -> Tensor | None:
        """Ids [N, K] that the signal knows one by one, or None if it knows all."""
        return self._teacher().support(self.width)

    def _teacher(self) -> Signal:
        if self.signal is None:
            raise ConfigurationError("This loss compares with a teacher: pass a teacher signal.")
        return self.signal


@dataclass
class TermSum:
    """A term summed over its rows: divide `total` by the *global* count of the optimiser step.

    total: scalar with gradient. count: scalar, tokens or span pairs. stats: sums over the same
    rows, without gradient, to be divided by `count` as well.
    """

    total: Tensor
    count: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: TermSum) -> TermSum:
        stats = {name: value + other.stats[name] for name, value in self.stats.items()}
        return TermSum(self.total + other.total, self.count + other.count, stats)

    def mean(self) -> Tensor:
        """total / count, 0 where nothing was counted; right within one process only."""
        return self.total / self.count.clamp_min(1)


class Term(Protocol):
    """One loss term (or metric): named, and summed over rows."""

    name: str

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums the term over the rows that count."""
