"""Every logged metric is on the page: in a plot if known, in a table if not."""

import math

import pytest

from retort.distill.metrics import scrg_numbers, scrg_sums
from retort.distill.objective import Objective
from retort.distill.presets import PRESETS
from retort.distill.sequences.scrg import Counts
from retort.report.metrics import GROUPS, canonical
from retort.report.scale import drawable
from retort.report.training import collect, total, training_section
from tests.distill.toys import config, tokenizer
from tests.report import sample_run
from tests.report.test_html import parse

FORWARDED = ("scrg/student_", "scrg/teacher_")  # tokens by who read them: in the table


def _titles(records):
    parsed = parse(training_section(records))
    return [a["aria-labelledby"].split("-title")[0] for tag, a in parsed.tags if tag == "svg"]


def test_only_what_exists_is_plotted():
    assert _titles([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]) == ["loss"]


def test_the_sample_run_fills_every_plot_it_has_metrics_for():
    keys = [panel.key for group in GROUPS for panel in group.panels]
    without = {"divergence", "rouge", "distinct", "dac-dual", "phi", "skd"}
    assert _titles(sample_run.training()) == [key for key in keys if key not in without]


def test_scores_of_held_out_answers_have_plots():
    logged = {"step": 1, "eval_rouge_l": 12.0, "eval_distinct_1": 0.5, "eval_distinct_2": 0.75}
    assert _titles([logged]) == ["rouge", "distinct"]
    assert "Other metrics" not in parse(training_section([logged])).text


def test_unknown_metrics_are_in_a_table():
    text = parse(training_section([{"step": 1, "my_metric": 0.25}])).text
    assert "Other metrics" in text and "my_metric" in text and "0.250" in text
    assert "epoch" in parse(training_section(sample_run.training())).text


def test_names_with_a_prefix_or_suffix_are_known():
    assert {canonical(n) for n in ("sft", "loss/sft", "sft_loss", "train/sft_loss")} == {"sft"}
    assert canonical("loss") == "loss" and canonical("eval_loss") == "eval_loss"


def test_what_is_not_a_number_is_no_metric():
    assert collect([{"step": 1, "a": "text", "b": None, "c": True, "d": 2}]) == {"d": [(1, 2.0)]}


def test_totals_skip_what_is_not_finite_and_tell_zero_from_missing():
    columns = collect(
        [{"step": 1, "n": 2, "z": 0}, {"step": 2, "n": math.nan}, {"step": 3, "n": 3}]
    )
    assert total(columns, "n") == 5 and total(columns, "z") == 0 and total(columns, "x") is None


def test_a_metric_with_low_and_high_gets_a_band_and_no_row_in_the_table():
    record = {"acceptance": 0.5, "acceptance_low": 0.4, "acceptance_high": 0.6}
    drawn = training_section([record | {"step": 1}, record | {"step": 2}])
    assert 'class="band s1"' in drawn and "Other metrics" not in drawn


def test_bounds_are_drawn_as_a_band_between_two_lines():
    records = [{"step": s, "dac/lower": 0.1, "dac/upper": 0.9} for s in (1, 2)]
    drawn = training_section(records)
    assert 'class="band s1"' in drawn and "band: lower" in drawn and "band: upper" in drawn


def test_sources_under_the_prefix_are_drawn_together():
    records = [{"step": s, "source/replay": 0.2, "source/dataset": 0.8} for s in (1, 2)]
    assert _titles(records) == ["sources"]
    assert "replay" in parse(training_section(records)).text


def test_more_lines_than_colours_go_to_the_table():
    records = [{"step": 1} | {f"source/{i}": 0.1 for i in range(9)}]
    text = parse(training_section(records)).text
    assert "source/8" in text and "source/2" not in text


def test_corrections_and_phases_are_summed_in_words():
    records = [
        {"step": 1, "scrg/corrected": 3, "scrg/regenerated_tokens": 40, "time/rollout": 3.0},
        {"step": 2, "scrg/corrected": 4, "scrg/regenerated_tokens": 50, "time/train": 1.0},
    ]
    text = parse(training_section(records)).text
    assert "corrections: 7" in text and "after them: 90" in text
    assert "rollout 75.0 %, train 25.0 %" in text


def test_no_log_is_not_measured():
    assert "not measured" in training_section([])
    assert "corrections: not measured" in training_section([{"step": 1, "loss": 2.0}])


@pytest.mark.parametrize("method", PRESETS)
def test_every_term_that_a_method_logs_has_a_plot(tmp_path, method):
    names = [*Objective(config(tmp_path, method=method), tokenizer()).weights, "acceptance"]
    counts = Counts(texts=2, tokens_before=4, tokens_after=4, corrected=1, nll_change_squared=1.0)
    names += [n for n in scrg_numbers(scrg_sums(counts)) if not n.startswith(FORWARDED)]
    names += ["phi", "skd/replaced", "source/student", "time/rollout", "time/teacher"]
    record = dict.fromkeys(names, 0.5)
    drawn = training_section([record | {"step": 1}, record | {"step": 2}])
    assert "Other metrics" not in drawn


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 5e-324, 10**400, -(10**400)])
def test_values_at_the_limits_of_a_float_are_drawn_or_leave_a_gap(value):
    shown = training_section([{"step": 1, "loss": value}, {"step": 2, "loss": -value}])
    assert "<svg" in shown and ("leave gaps: 2" in shown) == (abs(value) > 1)


def test_what_is_not_a_number_stays_so():
    assert math.isnan(drawable(math.nan)) and drawable(-math.inf) == -math.inf
    assert drawable(1e-299) == 1e-299 and drawable(3) == 3.0
