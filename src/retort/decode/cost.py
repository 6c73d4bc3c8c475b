"""What a pass costs by its number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

_LEAST = 0.25
_RECENT = 5  # plain passes of as many rows whose median counts: one that was disturbed does not
_FIRM = 20  # drafts of a pass that say as much of what one takes as all passes before it
_STALE = 16  # passes with drafts after which a plain one is due
_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)


@dataclass
class StepCost:
    """T(tokens), seconds of a pass, learnt from live step times between fixed knots."""

    seconds_at: dict[int, float] = field(default_factory=dict)
    _found: dict[int, float] = field(default_factory=dict, repr=False)

    def learn(self, profile: Mapping[int, float]) -> None:
        """Take over measured times."""
        self.seconds_at |= profile
        self._found.clear()

    def record(self, tokens: int, seconds: float) -> None:
        """Blend a measurement into its knot; the others follow a little, as the machine drifts."""
        self._found.clear()
        knot = _BUCKETS[min(bisect_left(_BUCKETS, tokens), len(_BUCKETS) - 1)]
        if knot not in self.seconds_at:
            self.seconds_at[knot] = seconds
            return
        ratio = min(max(seconds / self.seconds_at[knot], 0.5), 2.0) - 1.0
        for other in self.seconds_at:
            self.seconds_at[other] *= 1 + ratio * (0.15 if other == knot else 0.03)

    def seconds(self, tokens: int) -> float:
        """T by linear interpolation; 1 second flat where nothing was measured."""
        if tokens not in self._found:  # asked for every position of every draft
            self._found[tokens] = self._interpolated(tokens)
        return self._found[tokens]

    def _interpolated(self, tokens: int) -> float:
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

    Plain passes are timed live, for each number of rows, and where every pass has drafts one is due
    now and then: it loses nothing against plain decoding, and what drafts cost is measured against
    it. From the profile, which knows one short row only, comes what more tokens *add*, and passes
    with drafts teach what each of them takes beyond that, for each number of rows: a profile taken
    as it stands underrates what drafts cost beside many long rows, and one of an hour with slow
    memory is flat where tokens cost something in a faster one [our choice].

    Args:
        profile: T(tokens) of one row.
        plain: seconds of plain passes by number of rows, the median of the latest.
        extra: seconds that a draft takes beyond the profile, by number of rows; negative where
            that overrates it. What one row's drafts cost says little of those beside many.
        hope: share of a draft's cost by which ``extra`` falls in a step without any draft, so that
            a profile or a lesson which overrates drafts is found out.
    """

    profile: StepCost = field(default_factory=StepCost)
    plain: dict[int, float] = field(default_factory=dict)
    extra: dict[int, float] = field(default_factory=dict)
    hope: float = 0.002
    _recent: dict[int, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_RECENT)), repr=False
    )
    _since: dict[int, int] = field(default_factory=lambda: defaultdict(int), repr=False)

    def seconds(self, rows: int, drafts: int = 0) -> float:
        """Expected seconds; a draft adds a quarter of its profile and 0.3 % of a pass at least."""
        plain, profiled = self._plain(rows), self._profiled(rows, drafts)
        least = max(_LEAST * profiled, 0.003 * drafts * plain)
        return plain + max(profiled + self._extra(rows) * drafts, least)

    def plain_is_due(self, rows: int) -> bool:
        """Whether what a plain pass of so many rows takes should be seen again; sooner at first."""
        return self._since[rows] >= min(4 * max(len(self._recent[rows]), 1), _STALE)

    def record(self, rows: int, drafts: int, seconds: float) -> None:
        """Learn from a pass."""
        if not drafts:
            self._recent[rows].append(seconds)
            self.plain[rows] = median(self._recent[rows])
            self._since[rows] = 0
            return
        self._since[rows] += 1
        plain, known = self._plain(rows), self._extra(rows)
        seen = (seconds - plain - self._profiled(rows, drafts)) / drafts
        seen = min(max(seen, -plain), plain / drafts)
        self.extra[rows] = known + drafts / (drafts + _FIRM) * (seen - known)

    def regain(self, rows: int) -> None:
        """Nothing was drafted although it could have been."""
        slope, known = self._profiled(rows, 8) / 8, self._extra(rows)
        known -= self.hope * (slope + max(known, 0.0))
        self.extra[rows] = max(known, -0.5 * slope)

    def _extra(self, rows: int) -> float:
        """What a draft takes beyond the profile beside so many rows, or the nearest number seen."""
        if not self.extra or rows in self.extra:
            return self.extra.get(rows, 0.0)
        return self.extra[min(self.extra, key=lambda known: abs(known - rows))]

    def _profiled(self, rows: int, drafts: int) -> float:
        """What the drafts add by the profile."""
        return self.profile.seconds(rows + drafts) - self.profile.seconds(rows)

    def _plain(self, rows: int) -> float:
        if not self.plain or rows in self.plain:
            return self.plain.get(rows, self.profile.seconds(rows))
        near = min(self.plain, key=lambda known: abs(known - rows))
        other = self.profile.seconds(rows) / self.profile.seconds(near)
        return self.plain[near] * other
