"""How likely each draft position is to be accepted, learnt while decoding.

A logistic model with two terms [our choice]: one by drafter and level, one by row. The level of a
copied token is the length of the match that it prolongs: a copy that has held for eight tokens
goes on nearly always, one that rests on two does half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retort.decode.budget import Candidate

_TOP = 8
_PRIOR = {0: 0.5, 1: 0.4, 2: 0.55, 3: 0.65, 4: 0.7, 5: 0.75, 6: 0.8, 7: 0.85, 8: 0.9}
"""By level, before anything was seen; those of copies as on instructions with long inputs."""


@dataclass
class Acceptance:
    """Estimates that follow what is observed.

    Args:
        by_drafter, by_row: how far one outcome moves the drafter's level and the row's offset.
        hope: share of the way back to the prior that estimates go in a step without any draft.
    """

    by_drafter: float = 0.1
    by_row: float = 0.3
    hope: float = 0.003
    levels: dict[tuple[str, int], float] = field(default_factory=dict)
    rows: dict[tuple[str, str], float] = field(default_factory=dict)

    def chance(self, row: str, drafter: str, match: int, depth: int) -> float:
        """Probability that position ``depth`` (from 0) is accepted if those before it were."""
        offset = self.rows.get((row, drafter), 0.0)
        return _sigmoid(self._level(drafter, _level(match, depth)) + offset)

    def observe(self, row: str, drafter: str, match: int, drafted: int, accepted: int) -> None:
        """Learn from the accepted positions and the first rejected one."""
        for depth in range(min(drafted, accepted + 1)):
            outcome, level = float(depth < accepted), _level(match, depth)
            known, offset = self._level(drafter, level), self.rows.get((row, drafter), 0.0)
            self.rows[row, drafter] = offset + self.by_row * (outcome - _sigmoid(known + offset))
            self.levels[drafter, level] = known + self.by_drafter * (outcome - _sigmoid(known))

    def regain(self, candidates: Sequence[Candidate]) -> None:
        """Nothing was drafted: rows are tried again in the end, of a model's rows only the best.

        A model reads all that it missed before it drafts again, so that one row tries for all.
        """
        likeliest: dict[str, Candidate] = {}
        for c in (c for c in candidates if c.wanted):
            if not c.passes:
                self._return(c)
            elif self._offset(c) > self._offset(likeliest.get(c.drafter)):
                likeliest[c.drafter] = c
        for c in likeliest.values():
            self._return(c)

    def release(self, row: str) -> None:
        """Forget a finished row."""
        for key in [key for key in self.rows if key[0] == row]:
            del self.rows[key]

    def _level(self, drafter: str, level: int) -> float:
        return self.levels.get((drafter, level), _logit(_PRIOR[level]))

    def _offset(self, c: Candidate | None) -> float:
        return -float("inf") if c is None else self.rows.get((c.row, c.drafter), 0.0)

    def _return(self, c: Candidate) -> None:
        """Move the row's offset so that its first position comes nearer to its prior."""
        level = _level(c.match, 0)
        goal = _logit(_PRIOR[level]) - self._level(c.drafter, level)
        known = self._offset(c)
        self.rows[c.row, c.drafter] = known + self.hope * (goal - known)


def _level(match: int, depth: int) -> int:
    return min(match + depth, _TOP) if match else 0


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def _logit(p: float) -> float:
    return log(p / (1 - p))
