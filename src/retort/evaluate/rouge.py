"""ROUGE-L F-measure as the distillation papers report it.

MiniLLM, DistiLLM and the papers that compare with them score with Google's ``rouge-score``
package, its own tokenizer, ``rougeL`` (one longest common subsequence over the whole text, no
sentence split), **with the Porter stemmer on** (``use_stemmer=True``), take the best reference
of each prompt, average over prompts and multiply by 100. So does this module.
"""

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


def rouge_l_scores(predictions: Sequence[str], references: Sequence[References]) -> list[float]:
    """ROUGE-L F in [0, 100] of each text, in order; pass these to `paired_bootstrap`.

    Raises `ConfigurationError` if the two sequences differ in length.
    """
    if len(predictions) != len(references):
        raise ConfigurationError(
            f"{len(predictions)} texts but {len(references)} references: give one entry (a text "
            "or a list of texts) for each prediction"
        )
    return [rouge_l(text, refs) for text, refs in zip(predictions, references, strict=True)]


def mean_rouge_l(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Mean ROUGE-L F in [0, 100], the number in the papers' tables.

    Raises `ConfigurationError` for no texts or unequal lengths.
    """
    scores = rouge_l_scores(predictions, references)
    if not scores:
        raise ConfigurationError("mean_rouge_l needs at least one text, got none")
    return sum(scores) / len(scores)
