"""Automatic budgets whose costs are written down, not timed."""

import math

from retort.decode.acceptance import Acceptance
from retort.decode.budget import AutoBudget, Candidate
from retort.decode.cost import PassCost, StepCost


def budget_with(flat_until, slope, prior=0.5, **options):
    """A pass takes a second up to ``flat_until`` tokens, ``slope`` more for each one beyond."""
    cost = StepCost({n: 1.0 + slope * max(0, n - flat_until) for n in (1, 4, 8, 16, 32, 64, 128)})
    return AutoBudget(
        cost=PassCost(cost),
        acceptance=Acceptance(levels={("d", 0): math.log(prior / (1 - prior))}),
        **options,
    )


def give(budget, rows, wanted, passes=False, match=0):
    """Lengths of rows that share one drafter."""
    pairs = zip(rows, wanted, strict=True)
    return budget.allocate([Candidate(row, "d", want, passes, match) for row, want in pairs])
