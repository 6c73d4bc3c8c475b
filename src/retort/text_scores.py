"""Scores that need nothing but texts: training logs them, and `evaluate` builds on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from retort.errors import ConfigurationError

References = str | Sequence[str]
"""One reference text, or several of which the best one counts."""


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: not before it is needed

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: References) -> float:
    """ROUGE-L F of one text in [0, 100]: the maximum over its references.

    Raises `ConfigurationError` for an empty list of references. An empty text scores 0.
    """
    listed = [references] if isinstance(references, str) else list(references)
    if not listed:
        raise ConfigurationError("rouge_l needs at least one reference text, got an empty list")
    return max(100.0 * _scorer().score(ref, prediction)["rougeL"].fmeasure for ref in listed)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all (Li et al. 2016), 0 where there are none."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
