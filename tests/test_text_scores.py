"""Scores of texts alone; ROUGE-L has its tests in tests/evaluate."""

from retort.text_scores import distinct_n


def test_distinct_n_counts_by_hand():
    assert distinct_n(["a b a b", "b"], 1) == 2 / 5
    assert distinct_n(["a b a b", "b"], 2) == 2 / 3
    assert distinct_n(["b"], 2) == 0
