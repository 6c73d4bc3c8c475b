"""Bars begin at zero and are as long as their values."""

import re

import pytest

from retort.report.bars import Bar, BarPlot, draw


def _widths(drawn):
    return [float(w) for w in re.findall(r'class="bar"[^>]*width="([^"]*)"', drawn)]


def test_lengths_are_proportional_from_zero():
    plot = BarPlot("k", "T", "H.", [("g", [Bar("a", 50.0, 0), Bar("b", 100.0, 1)])])
    short, long = _widths(draw(plot))
    assert short / long == pytest.approx(0.5)


def test_groups_share_one_scale():
    groups = [("1", [Bar("a", 1.0, 1)]), ("2", [Bar("a", 4.0, 1)])]
    first, second = _widths(draw(BarPlot("k", "T", "H.", groups)))
    assert first / second == pytest.approx(0.25)


def test_a_full_bar_can_be_given():
    (width,) = _widths(draw(BarPlot("k", "T", "H.", [("", [Bar("a", 0.25, 1)])], full=1.0)))
    assert width == pytest.approx(93.0)


def test_a_missing_value_says_so_and_has_no_bar():
    drawn = draw(BarPlot("k", "T", "H.", [("", [Bar("a", None, 1), Bar("b", 0.0, 1)])]))
    assert _widths(drawn) == [0.0, 0.0] and drawn.count("not measured") == 2  # drawn and described


def test_the_baseline_marks_the_other_bars():
    bars = [Bar("plain", 10.0, 0), Bar("b", 20.0, 1), Bar("c", 5.0, 2)]
    assert draw(BarPlot("k", "T", "H.", [("", bars)])).count('class="baseline"') == 2
    assert 'class="baseline"' not in draw(BarPlot("k", "T", "H.", [("", bars[1:])]))
