"""How long each row's draft may be: all rows' draft positions compete for one step's time.

Verifying n tokens takes T(n), flat up to a knee and then rising; a draft position is worth the
probability that it survives. Speculation pays while expected tokens a second grow, and what trying
may lose is bounded [our choice; EMS-SD drafts a fixed length]. Budgets see only what was known
before the tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Protocol

from retort.decode.acceptance import Acceptance
from retort.decode.cost import PassCost, StepCost
from retort.errors import ConfigurationError

_SLOWER = 1.1  # of plain passes: more than they scatter


@dataclass(frozen=True)
class Candidate:
    """A row that may be drafted for.

    Attributes:
        row: its request.
        drafter: the name of its drafter.
        wanted: the longest draft that it could use.
        passes: the draft is yet to be made by passes of a model, so that its time counts.
        match: on how many tokens of the row's end a copied draft rests; 0 where none was copied.
        left: tokens that the row may still get, where all rows are waited for together and no
            other row waits for a place; None where every row's tokens are worth the same.
    """

    row: str
    drafter: str = ""
    wanted: int = 0
    passes: bool = False
    match: int = 0
    left: int | None = None


class DraftBudget(Protocol):
    """Gives every decoding row a draft length and learns from what came of it."""

    max_draft: int

    def allocate(self, candidates: Sequence[Candidate]) -> list[int]:
        """Draft lengths of all decoding rows, each at most what is wanted."""
        ...

    def observe(self, row: str, drafter: str, drafted: int, accepted: int, match: int = 0) -> None:
        """A draft of ``row`` was verified."""
        ...

    def time_step(self, rows: int, tokens: int, seconds: float) -> None:
        """A pass over ``tokens`` tokens of ``rows`` decoding rows took ``seconds``."""
        ...

    def time_draft(self, drafter: str, seconds: float) -> None:
        """A pass of the drafter over one token a row took ``seconds``."""
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

    def observe(self, row: str, drafter: str, drafted: int, accepted: int, match: int = 0) -> None:
        """Nothing to learn."""

    def time_step(self, rows: int, tokens: int, seconds: float) -> None:
        """Nothing to learn."""

    def time_draft(self, drafter: str, seconds: float) -> None:
        """Nothing to learn."""

    def release(self, row: str) -> None:
        """Nothing was kept."""


@dataclass
class AutoBudget:
    """Maximise expected tokens a second over the whole step, 0 drafts included.

    Args:
        max_draft: longest draft of a row.
        margin: by how much the expected gain of drafting must exceed its cost.
        acceptance: the probability of each draft position, learnt by drafter and row.
        cost: what a pass of the target takes, plain and with drafts.
        exploring: share of the time that drafting may lose against plain decoding in the long run.
        credit_steps: plain steps' worth of time that it may lose at once, e.g. in the beginning.
    """

    max_draft: int = 10
    margin: float = 1.2
    acceptance: Acceptance = field(default_factory=Acceptance)
    cost: PassCost = field(default_factory=PassCost)
    exploring: float = 0.01
    credit_steps: float = 8.0
    draft_seconds: dict[str, float] = field(default_factory=dict)
    _credit: float | None = field(default=None, repr=False)
    _believed: dict[int, float] = field(default_factory=dict, repr=False)
    _worth: dict[str, float] = field(default_factory=dict, repr=False)

    def allocate(self, candidates: Sequence[Candidate]) -> list[int]:
        """Best prefix of all draft positions, sorted by the probability that they survive."""
        if self.cost.plain_is_due(len(candidates)):
            return [0] * len(candidates)
        plain = self.cost.seconds(len(candidates))
        shares = worth(candidates, plain, self.cost.seconds(1))
        each = plain / max(len(candidates), 1)
        self._worth = {c.row: each * s for c, s in zip(candidates, shares, strict=True)}
        self._accrue(plain, len(candidates))
        gains = sorted(
            (-survival * share, depth, i)
            for i, (c, share) in enumerate(zip(candidates, shares, strict=True))
            for depth, survival in enumerate(self._survival(c), 1)
        )
        best, seconds = self._best_prefix(candidates, gains)
        lengths = [0] * len(candidates)
        if best and self._spend(seconds - plain):
            self._believed[len(candidates)] = plain
            for _, _, i in gains[:best]:
                lengths[i] += 1
        elif gains:
            self.acceptance.regain(candidates)
            self.cost.regain(len(candidates))
        return lengths

    def observe(self, row: str, drafter: str, drafted: int, accepted: int, match: int = 0) -> None:
        """Learn from each position that was judged; accepted tokens earn what they saved."""
        self.acceptance.observe(row, drafter, match, drafted, accepted)
        if self._credit is not None:
            self._credit += accepted * self._worth.get(row, 0.0)

    def time_step(self, rows: int, tokens: int, seconds: float) -> None:
        """Learn what a pass takes; drafts that cost more than was paid for are paid now."""
        drafts = tokens - rows
        if drafts and self._credit is not None:
            self._credit -= seconds - self.cost.seconds(rows, drafts)
        self.cost.record(rows, drafts, seconds)

    def time_draft(self, drafter: str, seconds: float) -> None:
        """Learn what one drafting pass costs."""
        known = self.draft_seconds.get(drafter, seconds)
        self.draft_seconds[drafter] = 0.8 * known + 0.2 * seconds

    def release(self, row: str) -> None:
        """Forget a finished row; what it taught about its drafter stays."""
        self.acceptance.release(row)

    def _survival(self, c: Candidate) -> list[float]:
        """For each position of a row's draft, the probability that it is accepted."""
        depths = range(min(c.wanted, self.max_draft))
        chances = (self.acceptance.chance(c.row, c.drafter, c.match, d) for d in depths)
        return list(accumulate(chances, mul))

    def _best_prefix(
        self, candidates: Sequence[Candidate], gains: Sequence[tuple]
    ) -> tuple[int, float]:
        """How many of the positions to draft, and the seconds of such a step."""
        plain = len(candidates)
        alone = self.cost.seconds(plain)
        best, best_seconds, best_rate = 0, alone, plain / alone
        expected, depths = float(plain), dict[str, int]()
        for m, (negative, depth, i) in enumerate(gains, 1):
            expected -= negative
            if candidates[i].passes:
                depths[candidates[i].drafter] = max(depths.get(candidates[i].drafter, 0), depth)
            drafting = sum(self._draft_seconds(name) * d for name, d in depths.items())
            seconds = self.cost.seconds(plain, m) + drafting
            pays = expected / plain - 1 > self.margin * (seconds / alone - 1)
            if pays and expected / seconds > best_rate:
                best, best_seconds, best_rate = m, seconds, expected / seconds
        return best, best_seconds

    def _draft_seconds(self, drafter: str) -> float:
        return self.draft_seconds.get(drafter, 0.0)

    def _accrue(self, plain: float, rows: int) -> None:
        """Another step's share of time to lose, up to ``credit_steps`` plain steps.

        Where plain passes prove slower than was believed while drafts used the credit up, the
        machine had slowed down and drafts were blamed for it: they get half of it back.
        """
        most = self.credit_steps * plain
        credit = most if self._credit is None else self._credit + self.exploring * plain
        if credit <= 0 and plain > _SLOWER * self._believed.get(rows, plain):
            credit, self._believed[rows] = most / 2, plain
        self._credit = min(credit, most)

    def _spend(self, seconds: float) -> bool:
        """Pay for a draft before it is verified; no when the credit is used up."""
        if self._credit is None or self._credit <= 0:
            return False
        self._credit -= seconds
        return True


def worth(candidates: Sequence[Candidate], together: float, alone: float) -> list[float]:
    """What an accepted token of each row is worth, relative to a token of a plain pass.

    Where rows come and go, or each has a reader of its own, all are worth 1. Where the batch is
    waited for as a whole, a row that ends before others leaves only the small difference between
    a pass with it and one without, and only the last one saves whole passes. Which row will be
    last is guessed from what each has left [our choice: in proportion to its 8th power, so that
    equal rows are worth 1 and one with a tenth more to go about twice as much as the others].

    Args:
        together, alone: seconds of a plain pass of all these rows, and of one row.
    """
    count = len(candidates)
    left = [c.left for c in candidates if c.left is not None]
    if count < 2 or len(left) < count:
        return [1.0] * count
    powers = [(max(n, 1) / max(*left, 1)) ** 8 for n in left]
    each, beside = together / count, max(together - alone, 0.0) / (count - 1)
    last = [p / sum(powers) for p in powers]
    return [(p * alone + (1 - p) * beside) / each for p in last]


class CountBudget(AutoBudget):
    """`AutoBudget` that never looks at a clock: the same requests get the same draft lengths.

    A pass over n tokens costs 1 + n/16, and one of a draft model 1/8 [our choice: reading the
    weights takes as long as computing 16 tokens, and draft models are an eighth as large].
    """

    def __init__(self, max_draft: int = 7) -> None:
        passes = StepCost({1: 1 + 1 / 16, 513: 1 + 513 / 16})
        super().__init__(max_draft, cost=PassCost(passes, hope=0.0))

    def time_step(self, rows: int, tokens: int, seconds: float) -> None:
        """The cost is fixed."""

    def time_draft(self, drafter: str, seconds: float) -> None:
        """The cost is fixed."""

    def _draft_seconds(self, drafter: str) -> float:
        return 1 / 8


def build_budget(draft_budget: int | str | DraftBudget) -> DraftBudget:
    """``"auto"``, ``"counts"``, a fixed length, or a budget of the user's own.

    Raises:
        ConfigurationError: neither of these.
    """
    if draft_budget == "auto":
        return AutoBudget()
    if draft_budget == "counts":
        return CountBudget()
    if type(draft_budget) is int and draft_budget >= 0:
        return FixedBudget(draft_budget)
    if isinstance(draft_budget, (int, str)) or not hasattr(draft_budget, "allocate"):
        raise ConfigurationError(
            f"draft_budget={draft_budget!r} is wrong: give 'auto', 'counts' or a whole number, "
            "0 or more"
        )
    return draft_budget
