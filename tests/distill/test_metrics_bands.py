"""Coverage and width are logged with their spread over tokens, which the report draws."""

import math

import pytest

from retort.distill import metrics


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
