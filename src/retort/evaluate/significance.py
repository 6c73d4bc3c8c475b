"""Is one run better than another, or is it luck? Paired bootstrap over prompts.

The difference of two systems on the same prompts is resampled with replacement (Efron and
Tibshirani 1993; for text systems Koehn 2004). Only the standard library is used, so that a seed
gives the same interval with every version of numpy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retort.errors import ConfigurationError


@dataclass(frozen=True)
class BootstrapResult:
    """Mean of ``second − first`` with a percentile interval ``[low, high]`` at ``confidence``.

    ``p_value`` is two-sided: twice the share of resamples on the other side of zero (at least
    1 / ``samples``, since a finite number of resamples proves no zero).
    """

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float
    pairs: int
    samples: int

    @property
    def separable(self) -> bool:
        """Whether the interval leaves out zero; "not separable" is a valid result."""
        return self.low > 0.0 or self.high < 0.0


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Compare two systems by their scores on the same prompts, in the same order.

    Raises `ConfigurationError` for unequal or empty scores and for a confidence outside (0, 1).
    """
    if len(first) != len(second) or not first:
        raise ConfigurationError(
            f"a paired comparison needs the same prompts in both runs, got {len(first)} and "
            f"{len(second)} scores"
        )
    gains = [b - a for a, b in zip(first, second, strict=True)]

    def mean(chosen: Sequence[int]) -> float:
        return sum(gains[i] for i in chosen) / len(chosen)

    return bootstrap(mean, len(gains), samples, confidence, seed)


def bootstrap(
    difference: Callable[[Sequence[int]], float],
    n: int,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Resample ``n`` prompts: ``difference`` is given the indices (some several times, some never).

    For differences that are no mean over prompts. Raises `ConfigurationError` without prompts and
    for a confidence outside (0, 1).
    """
    _check(n, samples, confidence)
    draw = random.Random(seed)
    means = sorted(difference(draw.choices(range(n), k=n)) for _ in range(samples))
    tail = (1.0 - confidence) / 2.0
    return BootstrapResult(
        difference=difference(range(n)),
        low=means[round(tail * (samples - 1))],
        high=means[round((1.0 - tail) * (samples - 1))],
        p_value=_two_sided(means),
        confidence=confidence,
        pairs=n,
        samples=samples,
    )


def _two_sided(means: list[float]) -> float:
    below = sum(mean <= 0.0 for mean in means)
    above = sum(mean >= 0.0 for mean in means)
    return min(1.0, 2.0 * max(min(below, above), 0.5) / len(means))


def _check(n: int, samples: int, confidence: float) -> None:
    if not n:
        raise ConfigurationError("a comparison needs at least one prompt, got none")
    if samples < 1 or not 0.0 < confidence < 1.0:
        raise ConfigurationError(
            f"samples must be 1 or more and confidence inside (0, 1), got {samples}, {confidence}"
        )
