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


@dataclass(frozen=True)
class Candidate:
    """A row that may be drafted for.

    Attributes:
        row: its request.
        drafter: the name of its drafter.
        wanted: the longest draft that it could use.
        passes: the draft is yet to be made by passes of a model, so that its time counts.
    """

    row: str
    drafter: str = ""
    wanted: int = 0
    passes: bool = False


class DraftBudget(Protocol):
    """Gives every decoding row a draft length and learns from what came of it."""

    max_draft: int

    def allocate(self, candidates: Sequence[Candidate]) -> list[int]:
        """Draft lengths of all decoding rows, each at most what is wanted."""
        ...

    def observe(self, row: str, drafter: str, drafted: int, accepted: int) -> None:
        """A draft of ``row`` was verified."""
        ...

    def time_step(self, tokens: int, seconds: float) -> None:
        """A pass over ``tokens`` tokens took ``seconds``."""
        ...

    def time_draft(self, drafter: str, depth: int, seconds: float) -> None:
        """Drafting ``depth`` tokens deep took ``seconds``."""
        ...

    def release(self, row: str) -> None:
        """The row is finished."""
        ...


@dataclass
class FixedBudget:
    """The same draft length for every row at every step; reproducible whatever the clock says."""

    max_draft: int

    def allocate(self, candidates: Sequence[Candidate]) -> list[int]:
        """The fixed length, or less where less is wanted."""
        return [min(self.max_draft, c.wanted) for c in candidates]

    def observe(self, row: str, drafter: str, drafted: int, accepted: int) -> None:
        """Nothing to learn."""

    def time_step(self, tokens: int, seconds: float) -> None:
        """Nothing to learn."""

    def time_draft(self, drafter: str, depth: int, seconds: float) -> None:
        """Nothing to learn."""

    def release(self, row: str) -> None:
        """Nothing was kept."""


@dataclass
class AutoBudget:
    """Maximise expected tokens a second over the whole step, 0 drafts included.

    Acceptance is estimated by row and drafter, as an exponential average that starts from the
    drafter's prior, which follows all its rows.

    Args:
        max_draft: longest draft of a row.
        prior: acceptance expected of a drafter that has not been tried.
        margin: gain over plain decoding below which nothing is drafted.
        hope: how fast the estimates return to the first prior while nothing is drafted, so that
            rows are tried again now and then (at 0.003 a failed drafter costs about 2 % of steps).
        cost: T(tokens) of a pass of the target.
    """

    max_draft: int = 7
    prior: float = 0.5
    margin: float = 1.05
    hope: float = 0.003
    cost: StepCost = field(default_factory=lambda: StepCost())
    acceptance: dict[tuple[str, str], float] = field(default_factory=dict)
    priors: dict[str, float] = field(default_factory=dict)
    draft_seconds: dict[str, float] = field(default_factory=dict)

    def allocate(self, candidates: Sequence[Candidate]) -> list[int]:
        """Best prefix of all draft positions, sorted by the probability that they survive."""
        rates = [self._estimate(c.row, c.drafter) for c in candidates]
        gains = sorted(
            (-(rate**depth), depth, i)
            for i, (rate, c) in enumerate(zip(rates, candidates, strict=True))
            for depth in range(1, min(c.wanted, self.max_draft) + 1)
        )
        lengths = [0] * len(candidates)
        for _, _, i in gains[: self._best_prefix(candidates, gains)]:
            lengths[i] += 1
        if gains and not any(lengths):
            self._regain_hope(candidates)
        return lengths

    def observe(self, row: str, drafter: str, drafted: int, accepted: int) -> None:
        """Move the row's acceptance, and slowly its drafter's prior, by what this draft showed."""
        tried = min(drafted, accepted + 1)
        for outcome in [1.0] * accepted + [0.0] * (tried - accepted):
            known = self._estimate(row, drafter)
            self.acceptance[row, drafter] = known * 0.85 + 0.15 * outcome
            self.priors[drafter] = self._prior(drafter) * 0.98 + 0.02 * outcome

    def time_step(self, tokens: int, seconds: float) -> None:
        """Learn T(tokens)."""
        self.cost.record(tokens, seconds)

    def time_draft(self, drafter: str, depth: int, seconds: float) -> None:
        """Learn what one drafting pass costs."""
        per_pass = seconds / max(depth, 1)
        known = self.draft_seconds.get(drafter, per_pass)
        self.draft_seconds[drafter] = 0.8 * known + 0.2 * per_pass

    def release(self, row: str) -> None:
        """Forget a finished row; what it taught stays in the prior."""
        for key in [key for key in self.acceptance if key[0] == row]:
            del self.acceptance[key]

    def _prior(self, drafter: str) -> float:
        return self.priors.get(drafter, self.prior)

    def _estimate(self, row: str, drafter: str) -> float:
        return self.acceptance.get((row, drafter), self._prior(drafter))

    def _regain_hope(self, candidates: Sequence[Candidate]) -> None:
        for drafter in {c.drafter for c in candidates if c.wanted}:
            prior = self._prior(drafter)
            self.priors[drafter] = prior + self.hope * (self.prior - prior)
        for c in (c for c in candidates if c.wanted):
            known, prior = self._estimate(c.row, c.drafter), self._prior(c.drafter)
            self.acceptance[c.row, c.drafter] = (1 - self.hope) * known + self.hope * prior

    def _best_prefix(self, candidates: Sequence[Candidate], gains: Sequence[tuple]) -> int:
        plain = len(candidates)
        best, best_rate = 0, plain / self.cost.seconds(plain) * self.margin
        expected, depths = float(plain), dict[str, int]()
        for m, (negative, depth, i) in enumerate(gains, 1):
            expected -= negative
            if candidates[i].passes:
                depths[candidates[i].drafter] = max(depths.get(candidates[i].drafter, 0), depth)
            drafting = sum(self._draft_seconds(name) * d for name, d in depths.items())
            rate = expected / (self.cost.seconds(plain + m) + drafting)
            if rate > best_rate:
                best, best_rate = m, rate
        return best

    def _draft_seconds(self, drafter: str) -> float:
        return self.draft_seconds.get(drafter, 0.0)


class CountBudget(AutoBudget):
    """`AutoBudget` that never looks at a clock: the same requests get the same draft lengths.

    A pass over n tokens costs 1 + n/16, and one of a draft model 1/8 [our choice: reading the
    weights takes as long as computing 16 tokens, and draft models are an eighth as large].
    """

    def __init__(self, max_draft: int = 7) -> None:
        super().__init__(max_draft, cost=StepCost({1: 1 + 1 / 16, 513: 1 + 513 / 16}))

    def time_step(self, tokens: int, seconds: float) -> None:
        """The cost is fixed."""

    def time_draft(self, drafter: str, depth: int, seconds: float) -> None:
        """The cost is fixed."""

    def _draft_seconds(self, drafter: str) -> float:
        return 1 / 8


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
    """``"auto"``, ``"counts"``, a fixed length, or a budget of the user's own.

    Raises:
        ConfigurationError: neither of these.
    """
    if draft_budget == "auto":
        return AutoBudget(max_draft)
    if draft_budget == "counts":
        return CountBudget(max_draft)
    if type(draft_budget) is int and draft_budget >= 0:
        return FixedBudget(draft_budget)
    if isinstance(draft_budget, (int, str)) or not hasattr(draft_budget, "allocate"):
        raise ConfigurationError(
            f"draft_budget={draft_budget!r} is wrong: give 'auto', 'counts' or a whole number, "
            "0 or more"
        )
    return draft_budget
