"""What a metric makes of the scores of its rows: one definition for its value and its interval.

A score is a number, or a pair (sum, tokens) where longer rows count more, or for exposure bias the
divergences of a row's two texts (see `retort.evaluate.exposure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Statistic = Callable[[Sequence[int]], float]
"""A metric over chosen rows, given by their indices; some may be chosen several times."""


def mean(scores: Sequence[float]) -> Statistic:
    """Every row counts the same."""
    return lambda chosen: sum(scores[i] for i in chosen) / len(chosen)


def ratio(scores: Sequence[Sequence[float]]) -> Statistic:
    """Σ sum / Σ tokens: every token counts the same."""
    return lambda chosen: sum(scores[i][0] for i in chosen) / sum(scores[i][1] for i in chosen)


def exponential(scores: Sequence[Sequence[float]]) -> Statistic:
    """exp of `ratio`: a perplexity out of sums of −log p."""
    per_token = ratio(scores)

    def value(chosen: Sequence[int]) -> float:
        nll = per_token(chosen)
        return math.exp(nll) if nll < 700 else math.inf

    return value


def excess(scores: Sequence[Sequence[Sequence[float]]]) -> Statistic:
    """Excess accumulated error out of each row's (own, oracle) divergences."""
    from retort.evaluate.exposure import Divergences, excess_error

    own, oracle = (Divergences([row[which] for row in scores]) for which in (0, 1))
    return lambda chosen: excess_error(own.mean(chosen), oracle.mean(chosen)).excess


STATISTICS: dict[str, Callable[[Any], Statistic]] = {
    "rouge_l": mean,
    "exact_match": mean,
    "perplexity": exponential,
    "reference_perplexity": exponential,
    "acceptance": ratio,
    "exposure_bias": excess,
    "tokens_per_step": ratio,
}
"""Metrics that are compared. Distinct n-grams are not: a row drawn twice repeats its own."""

LOWER_IS_BETTER = ("perplexity", "reference_perplexity", "exposure_bias")


def value_of(metric: str, scores: Sequence[Any]) -> float:
    """The metric over all of ``scores``."""
    return STATISTICS[metric](scores)(range(len(scores)))
