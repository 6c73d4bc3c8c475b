"""How long each row's draft may be: all rows' draft positions compete for one step's time.

Verifying n tokens takes T(n), flat up to a knee and then rising; a draft position is worth the
probability that it survives. Speculation pays while expected tokens a second grow [our choice;
EMS-SD drafts a fixed length]. Budgets see only what was known before the tokens were drawn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from retort.errors import ConfigurationError

_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)


class DraftBudget(Protocol):
    """Gives every decoding row a draft length and learns from what came of it."""

    max_draft: int

    def allocate(
        self, rows: Sequence[str], wanted: Sequence[int], drafting: bool, others: int = 0
    ) -> list[int]:
        """Draft lengths of ``rows``, each at most ``wanted``.

        ``drafting`` tells that drafts are yet to be made by a model, so that their time counts;
        ``others`` counts the tokens of other rows in the same pass.
        """
        ...

    def observe(self, row: str, drafted: int, accepted: int) -> None:
        """A draft of ``row`` was verified."""
        ...

    def time_step(self, tokens: int, seconds: float) -> None:
        """A pass over ``tokens`` tokens took ``seconds``."""
        ...

    def time_draft(self, depth: int, seconds: float) -> None:
        """Drafting ``depth`` tokens deep took ``seconds``."""
        ...

    def release(self, row: str) -> None:
        """The row is finished."""
        ...


@dataclass
class FixedBudget:
    """The same draft length for every row at every step; reproducible whatever the clock says."""

    max_draft: int

    def allocate(
        self, rows: Sequence[str], wanted: Sequence[int], drafting: bool, others: int = 0
    ) -> list[int]:
        """The fixed length, or less where less is wanted."""
        return [min(self.max_draft, w) for w in wanted]

    def observe(self, row: str, drafted: int, accepted: int) -> None:
        """Nothing to learn."""

    def time_step(self, tokens: int, seconds: float) -> None:
        """Nothing to learn."""

    def time_draft(self, depth: int, seconds: float) -> None:
        """Nothing to learn."""

    def release(self, row: str) -> None:
        """Nothing was kept."""


@dataclass
class AutoBudget:
    """Maximise expected tokens a second over the whole step, 0 drafts included.

    Args:
        max_draft: longest draft of a row.
        prior: acceptance expected of a row that has not been tried.
        margin: gain over plain decoding below which nothing is drafted.
        hope: how fast the estimates return to the first prior while nothing is drafted, so that
            rows are tried again now and then (at 0.003 a failed drafter costs about 2 % of steps).
    """

    max_draft: int = 7
    prior: float = 0.5
    margin: float = 1.05
    hope: float = 0.003
    cost: StepCost = field(default_factory=lambda: StepCost())
    acceptance: dict[str, float] = field(default_factory=dict)
    draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._first_prior = self.prior

    def allocate(
        self, rows: Sequence[str], wanted: Sequence[int], drafting: bool, others: int = 0
    ) -> list[int]:
        """Best prefix of all draft positions, sorted by the probability that they survive."""
        rates = [self._estimate(row) for row in rows]
        gains = sorted(
            (-(rate**depth), depth, i)
            for i, (rate, want) in enumerate(zip(rates, wanted, strict=True))
            for depth in range(1, min(want, self.max_draft) + 1)
        )
        lengths = [0] * len(rows)
        for _, _, i in gains[: self._best_prefix(len(rows), others, gains, drafting)]:
            lengths[i] += 1
        if gains and not any(lengths):
            self._regain_hope(rows)
        return lengths

    def observe(self, row: str, drafted: int, accepted: int) -> None:
        """Move the row's acceptance, and slowly everyone's prior, by what this draft showed."""
        tried = min(drafted, accepted + 1)
        for outcome in [1.0] * accepted + [0.0] * (tried - accepted):
            self.acceptance[row] = self._estimate(row) * 0.85 + 0.15 * outcome
            self.prior = self.prior * 0.98 + 0.02 * outcome

    def time_step(self, tokens: int, seconds: float) -> None:
        """Learn T(tokens)."""
        self.cost.record(tokens, seconds)

    def time_draft(self, depth: int, seconds: float) -> None:
        """Learn what one drafting pass costs."""
        per_pass = seconds / max(depth, 1)
        self.draft_seconds = 0.8 * self.draft_seconds + 0.2 * per_pass or per_pass

    def release(self, row: str) -> None:
        """Forget a finished row; what it taught stays in the prior."""
        self.acceptance.pop(row, None)

    def _estimate(self, row: str) -> float:
        return self.acceptance.get(row, self.prior)

    def _regain_hope(self, rows: Sequence[str]) -> None:
        self.prior += self.hope * (self._first_prior - self.prior)
        for row in rows:
            self.acceptance[row] = (1 - self.hope) * self._estimate(row) + self.hope * self.prior

    def _best_prefix(self, rows: int, others: int, gains: Sequence[tuple], drafting: bool) -> int:
        draft_seconds = self.draft_seconds if drafting else 0.0
        plain = rows + others
        best, best_rate = 0, plain / self.cost.seconds(plain) * self.margin
        expected, depth = float(plain), 0
        for m, (negative, level, _) in enumerate(gains, 1):
            expected -= negative
            depth = max(depth, level)
            rate = expected / (self.cost.seconds(plain + m) + depth * draft_seconds)
            if rate > best_rate:
                best, best_rate = m, rate
        return best


@dataclass
class StepCost:
    """T(tokens), seconds of a pass, learnt from live step times between fixed knots."""

    seconds_at: dict[int, float] = field(default_factory=dict)

    def record(self, tokens: int, seconds: float) -> None:
        """Blend a measurement into its knot; the others follow a little, as the machine drifts."""
        knot = _BUCKETS[min(bisect_left(_BUCKETS, tokens), len(_BUCKETS) - 1)]
        if knot not in self.seconds_at:
            self.seconds_at[knot] = seconds
            return
        ratio = min(max(seconds / self.seconds_at[knot], 0.5), 2.0) - 1.0
        for other in self.seconds_at:
            self.seconds_at[other] *= 1 + ratio * (0.15 if other == knot else 0.03)

    def seconds(self, tokens: int) -> float:
        """T by linear interpolation; 1 second flat where nothing was measured."""
        knots = sorted(self.seconds_at)
        if not knots:
            return 1.0
        at = min(max(bisect_left(knots, tokens), 1), len(knots) - 1)
        if at < 1 or tokens <= knots[0]:
            return self.seconds_at[knots[0]]
        lo, hi = knots[at - 1], knots[at]
        slope = (self.seconds_at[hi] - self.seconds_at[lo]) / (hi - lo)
        return self.seconds_at[lo] + max(slope, 0.0) * (tokens - lo)


def build_budget(draft_budget: int | str | DraftBudget, max_draft: int = 7) -> DraftBudget:
    """``"auto"``, a fixed length, or a budget of the user's own.

    Raises:
        ConfigurationError: neither of these.
    """
    if draft_budget == "auto":
        return AutoBudget(max_draft)
    if isinstance(draft_budget, int) and draft_budget >= 0:
        return FixedBudget(draft_budget)
    if isinstance(draft_budget, (str, int)):
        raise ConfigurationError(
            f"draft_budget={draft_budget!r} is wrong: give 'auto' or a whole number of at least 0"
        )
    return draft_budget
