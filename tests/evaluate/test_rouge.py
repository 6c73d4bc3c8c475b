"""ROUGE-L against values worked out by hand."""

import pytest

from retort.errors import ConfigurationError
from retort.evaluate.rouge import mean_rouge_l, rouge_l, rouge_l_scores


def test_f_measure_of_a_case_worked_out_by_hand():
    # LCS("the cat sat", "the cat on the mat") = "the cat": P = 2/3, R = 2/5, F = 0.5
    assert rouge_l("the cat sat", "the cat on the mat") == pytest.approx(50.0)


def test_the_porter_stemmer_is_on():
    assert rouge_l("running dogs", "run dog") == pytest.approx(100.0)


def test_the_best_reference_counts_whatever_its_place():
    references = ["nothing alike", "a small red fox", "other words"]
    assert rouge_l("a small red fox", references) == pytest.approx(100.0)
    assert rouge_l("a small red fox", references[::2]) == 0.0


def test_an_empty_text_scores_zero():
    assert rouge_l("", "something") == 0.0


def test_scores_keep_the_order_and_the_mean_is_theirs():
    scores = rouge_l_scores(["one two", "three"], ["one two", ["four", "five"]])
    assert scores == pytest.approx([100.0, 0.0])
    assert mean_rouge_l(["one two", "three"], ["one two", "four"]) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rouge_l("a", []), "at least one reference"),
        (lambda: rouge_l_scores(["a"], ["b", "c"]), "1 texts but 2 references"),
        (lambda: mean_rouge_l([], []), "at least one text"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()
