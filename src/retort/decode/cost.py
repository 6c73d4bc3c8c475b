"""What a pass costs by its number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

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
