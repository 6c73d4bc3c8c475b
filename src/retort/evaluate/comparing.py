"""A run against a baseline on every metric, by paired bootstrap over the rows that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retort.errors import ConfigurationError
from retort.evaluate.scores import LOWER_IS_BETTER, STATISTICS
from retort.evaluate.significance import bootstrap


@dataclass(frozen=True)
class Comparison:
    """A run against the baseline on one metric of one set; ``verdict`` says who is better.

    ``prompts`` are the rows that both have a score of.
    """

    run: str
    dataset: str
    metric: str
    difference: float
    low: float
    high: float
    verdict: str
    prompts: int


def compare(table: dict[str, Any], baseline: str) -> list[Comparison]:
    """Every run against ``baseline``, wherever both have scores of the same rows.

    Raises ConfigurationError where ``baseline`` is none of the table's runs.
    """
    known = {(c["run"], c["dataset"]): c["scores"] for c in table["cells"]}
    if not any(run == baseline for run, _ in known):
        raise ConfigurationError(f"--baseline {baseline!r} is none of the runs")
    found = []
    for (run, dataset), scores in known.items():
        base = known[baseline, dataset]
        for metric in scores if run != baseline else ():
            pairs = list(zip(base.get(metric, ()), scores[metric], strict=False))
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            if both:
                found.append(_compared(run, dataset, metric, both))
    return found


def _compared(run: str, dataset: str, metric: str, pairs: Sequence[tuple]) -> Comparison:
    base, ours = (STATISTICS[metric](list(scores)) for scores in zip(*pairs, strict=True))
    result = bootstrap(lambda chosen: ours(chosen) - base(chosen), len(pairs))
    better = (result.difference > 0) != (metric in LOWER_IS_BETTER)
    verdict = ("better" if better else "worse") if result.separable else "not separable"
    numbers = result.difference, result.low, result.high
    return Comparison(run, dataset, metric, *numbers, verdict, len(pairs))
