"""ROUGE-L F-measure as the distillation papers report it.

MiniLLM, DistiLLM and the papers that compare with them score with Google's ``rouge-score``
package, its own tokenizer, ``rougeL`` (one longest common subsequence over the whole text, no
sentence split), **with the Porter stemmer on** (``use_stemmer=True``), take the best reference
of each prompt, average over prompts and multiply by 100. So does this module.
"""

from __future__ import annotations

from collections.abc import Sequence

from retort.errors import ConfigurationError
from retort.text_scores import References, rouge_l

__all__ = ["References", "mean_rouge_l", "rouge_l", "rouge_l_scores"]


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
