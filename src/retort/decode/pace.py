"""How many prompt tokens a step may read while rows decode, so that these hardly notice.

A step that decodes R tokens takes D(R); n prompt tokens beside them add about c·n seconds [our
model: past the knee of T(tokens) a pass is linear, and what attention adds grows slowly]. Both are
learnt from live steps, and n is the largest with D(rows) + c·n ≤ stretch · D(rows). Drafts count
among a step's tokens and not among its rows: steps that they make longer leave no more room.
"""

from __future__ import annotations

import math

from retort.decode.cost import StepCost
from retort.errors import ConfigurationError

_LEAST = 4  # a prompt is read, however slow its tokens are
_NEW = 0.3  # weight of the newest step in c
_JUMP = 2.0  # most by which one step's tokens may seem slower or faster than those before


class PrefillPace:
    """Sizes of prompt slices from the clock.

    Args:
        most: prompt tokens of a step where no row decodes, and never more.
        stretch: how much longer a step of decoding rows may take for reading prompts; None reads
            ``most`` tokens whatever rows decode.

    Raises:
        ConfigurationError: a stretch that is not above 1.
    """

    def __init__(self, most: int, stretch: float | None = None) -> None:
        number = isinstance(stretch, (int, float)) and not isinstance(stretch, bool)
        if stretch is not None and not (number and math.isfinite(stretch) and stretch > 1):
            raise ConfigurationError(
                f"prefill_stretch={stretch!r} must be a number above 1, or None for no bound"
            )
        self._most, self._stretch = most, stretch
        self._steps = StepCost()
        self._per_token: float | None = None

    def slice(self, rows: int) -> int:
        """Prompt tokens for a step in which ``rows`` rows decode."""
        if self._stretch is None or not rows:
            return self._most
        if not self._steps.seconds_at or self._per_token is None:
            return min(self._most, 4 * _LEAST)  # nothing is known yet
        room = (self._stretch - 1) * self._steps.seconds(rows) / self._per_token
        return min(self._most, max(_LEAST, int(room)))

    def observe(self, decoded: int, prompt_tokens: int, seconds: float) -> None:
        """A step over ``decoded`` tokens, drafts included, and prompt tokens took so long."""
        if not decoded:
            return
        if not prompt_tokens:
            self._steps.record(decoded, seconds)
            return
        if not self._steps.seconds_at:
            return
        added = max(seconds - self._steps.seconds(decoded), 1e-9) / prompt_tokens
        known = added if self._per_token is None else self._per_token
        seen = min(max(added, known / _JUMP), known * _JUMP)  # a hiccup is not the prompt's
        self._per_token = (1 - _NEW) * known + _NEW * seen
