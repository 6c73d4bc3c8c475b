"""Before and after, with what was not measured said."""

from retort.report import EvaluationRow
from retort.report.evaluation import evaluation_section
from tests.report.sample_run import EVALUATION
from tests.report.test_html import parse


def test_values_change_and_interval():
    text = parse(evaluation_section(EVALUATION)).text
    for shown in ("ROUGE-L against the teacher", "9.50", "7.90 to 11.2", "0.142", "−47,999"):
        assert shown in text


def test_an_interval_with_zero_is_not_separable():
    text = parse(evaluation_section([EvaluationRow("rouge_l", 1.0, 2.0, low=-1.0, high=3.0)])).text
    assert "not separable" in text


def test_known_metrics_that_lack_are_named():
    text = parse(evaluation_section([EvaluationRow("rouge_l", None, 2.0)])).text
    assert "Acceptance α: not measured." in text and "Perplexity: not measured." in text
    assert parse(evaluation_section([])).text.count("not measured") == 3


def test_other_metrics_keep_their_names_and_direction():
    text = parse(evaluation_section([EvaluationRow("distinct_2", 0.2, 0.4)])).text
    assert "distinct_2" in text and "Higher is better." in text
    lower = EvaluationRow("perplexity", 3.0, 2.0, higher_is_better=False)
    assert "Lower is better." in parse(evaluation_section([lower])).text
