"""Coverage, width and the change by revision are logged with a band, which the report draws."""

import math
from statistics import stdev

import pytest

from retort.distill import metrics
from retort.distill.sequences.scrg import Counts


def test_the_band_of_coverage_is_one_standard_deviation():
    values = [0.9, 0.98, 0.95]
    sums = {"dac.total": 1.0, "dac.count": 3.0, "dac.full_kl": 1.0, "dac.hidden_kl": 0.0}
    sums |= {"dac.lower": 0.0, "dac.upper": 3.0, "dac.widened": 0.0}
    for name in ("coverage", "width"):
        sums[f"dac.{name}"] = sum(values)
        sums[f"dac.{name}_squared"] = sum(v * v for v in values)
    found = metrics.term_means(sums)
    mean = sum(values) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 3)
    assert found["dac/coverage_low"] == pytest.approx(mean - deviation)
    assert found["dac/coverage_high"] == pytest.approx(mean + deviation)
    del sums["dac.coverage_squared"]  # a checkpoint from before
    assert "dac/coverage_low" not in metrics.term_means(sums)


def test_the_change_by_revision_has_a_paired_interval():
    changes = [0.5, -1.0, 0.25, -0.75, -0.5]
    counts = Counts(
        texts=5,
        tokens_before=9,
        tokens_after=9,
        nll_change=sum(changes),
        nll_change_squared=sum(c * c for c in changes),
    )
    found = metrics.numbers(metrics.scrg_sums(counts))
    margin = 1.96 * stdev(changes) / 5**0.5
    assert found["scrg/nll_change"] == pytest.approx(-0.3)
    assert found["scrg/nll_change_low"] == pytest.approx(-0.3 - margin)
    assert found["scrg/nll_change_high"] == pytest.approx(-0.3 + margin)
    one = metrics.numbers(metrics.scrg_sums(Counts(texts=1, tokens_before=1, nll_change=0.5)))
    assert "scrg/nll_change" in one and "scrg/nll_change_low" not in one
