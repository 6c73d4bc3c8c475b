"""What a pass costs by its number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

_LEAST = 0.25
_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)


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


@dataclass
class PassCost:
    """Seconds of a pass in which ``rows`` rows decode and drafts are verified beside.

    Plain passes are timed live, for each number of rows; from the profile, which knows one short
    row only, comes what more tokens *add*, times a factor that passes with drafts teach [our
    choice: a profile taken as it stands underrates what drafts cost beside many long rows].

    Args:
        profile: T(tokens) of one row.
        plain: seconds of plain passes by number of rows.
        factor: what drafts really added, relative to the profile.
        hope: share by which the factor falls in a step without any draft, so that a profile which
            overrates drafts is found out.
    """

    profile: StepCost = field(default_factory=StepCost)
    plain: dict[int, float] = field(default_factory=dict)
    factor: float = 1.0
    hope: float = 0.002

    def seconds(self, rows: int, drafts: int = 0) -> float:
        """Expected seconds."""
        return self._plain(rows) + self.factor * self._added(rows, drafts)

    def record(self, rows: int, drafts: int, seconds: float) -> None:
        """Learn from a pass."""
        plain = self._plain(rows)
        if not drafts:
            ratio = min(max(seconds / plain, 0.5), 2.0)
            self.plain[rows] = plain * (0.85 + 0.15 * ratio) if rows in self.plain else seconds
            return
        added = self._added(rows, drafts)
        seen = min(max((seconds - plain) / added, 0.0), 4.0)
        weight = min(0.1, 0.3 * added / plain)  # where drafts add little, noise says nothing
        self.factor = max(self.factor + weight * (seen - self.factor), _LEAST)

    def regain(self) -> None:
        """Nothing was drafted although it could have been."""
        self.factor = max(self.factor * (1 - self.hope), min(self.factor, 2 * _LEAST))

    def _added(self, rows: int, drafts: int) -> float:
        """By the profile, and at least 0.3 % of a pass a token."""
        alone = self.profile.seconds(rows)
        return max(self.profile.seconds(rows + drafts) - alone, 0.003 * drafts * alone)

    def _plain(self, rows: int) -> float:
        if not self.plain or rows in self.plain:
            return self.plain.get(rows, self.profile.seconds(rows))
        near = min(self.plain, key=lambda known: abs(known - rows))
        other = self.profile.seconds(rows) / self.profile.seconds(near)
        return self.plain[near] * other
