"""The paired bootstrap: seeded, centred, and honest about a tie."""

import random
import statistics

import pytest

from retort.errors import ConfigurationError
from retort.evaluate.significance import bootstrap, paired_bootstrap


def _scores(gain: float, spread: float, n: int = 60) -> tuple[list[float], list[float]]:
    draw = random.Random(7)
    first = [draw.gauss(20, 8) for _ in range(n)]
    return first, [x + draw.gauss(gain, spread) for x in first]


def test_a_clear_gain_is_separable_although_prompts_differ_widely():
    first, second = _scores(gain=2.0, spread=1.0)
    result = paired_bootstrap(first, second, samples=2000)
    assert result.low < result.difference < result.high
    assert result.separable and result.p_value < 0.01


def test_the_interval_is_that_of_the_normal_approximation():
    first, second = _scores(gain=1.0, spread=3.0, n=200)
    result = paired_bootstrap(first, second, samples=5000)
    gains = [b - a for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert result.difference == pytest.approx(statistics.fmean(gains))
    assert result.low == pytest.approx(result.difference - 1.96 * error, abs=0.15 * error)
    assert result.high == pytest.approx(result.difference + 1.96 * error, abs=0.15 * error)


def test_no_gain_is_not_separable():
    first, second = _scores(gain=0.0, spread=3.0)
    result = paired_bootstrap(first, second, samples=2000)
    assert not result.separable and result.p_value > 0.05


def test_equal_systems_have_p_value_one():
    result = paired_bootstrap([1.0, 2.0], [1.0, 2.0], samples=100)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_a_seed_fixes_the_result_and_another_seed_does_not():
    first, second = _scores(1.0, 3.0)
    runs = [paired_bootstrap(first, second, samples=500, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_swapping_the_systems_mirrors_the_difference():
    first, second = _scores(1.0, 3.0)
    there = paired_bootstrap(first, second, samples=500)
    back = paired_bootstrap(second, first, samples=500)
    assert back.difference == pytest.approx(-there.difference)
    assert back.high == pytest.approx(-there.low, abs=0.1)


@pytest.mark.parametrize("pair", [([1.0], [1.0, 2.0]), ([], [])])
def test_unpaired_scores_are_refused(pair):
    with pytest.raises(ConfigurationError, match="same prompts"):
        paired_bootstrap(*pair)


def test_a_confidence_of_one_is_refused():
    with pytest.raises(ConfigurationError, match="confidence"):
        paired_bootstrap([1.0], [2.0], confidence=1.0)


def test_a_bootstrap_of_the_mean_is_the_paired_one():
    first, second = [0.1, 0.5, 0.2, 0.9], [0.2, 0.4, 0.6, 0.8]
    gains = [b - a for a, b in zip(first, second, strict=True)]
    found = bootstrap(lambda chosen: sum(gains[i] for i in chosen) / len(chosen), 4, samples=200)
    assert found == paired_bootstrap(first, second, samples=200)
    with pytest.raises(ConfigurationError, match="at least one prompt"):
        bootstrap(lambda _: 0.0, 0)
