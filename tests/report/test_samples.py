"""Texts side by side and the corrected token."""

import re

import pytest

from retort.errors import ConfigurationError
from retort.report import Correction, Sample
from retort.report.samples import corrections_section, samples_section, visible
from tests.report.sample_run import CORRECTIONS, SAMPLES
from tests.report.test_html import HOSTILE, parse


def test_the_corrected_token_is_marked_in_its_place():
    drawn = corrections_section(CORRECTIONS[:1])
    assert "because of the<del>␣sun</del><span" in drawn
    assert "because of the<ins>␣yeast</ins><span" in drawn
    assert re.search(r'class="dropped">, and the sun<', drawn)
    assert re.search(r'class="new">, which makes gas out of sugar<', drawn)
    assert "token 6 of 10, step 84, KL 6.31 nats there" in drawn


def test_the_token_that_would_be_corrected_is_marked_in_the_students_text():
    sample = Sample("p", after="one two, three", marked=[3, 7], replacement="\n")
    assert "one<del>␣two</del><ins>⏎</ins>, three" in samples_section([sample])
    for marked in ([3], [7, 3], [-1, 2], [3, 15]):
        with pytest.raises(ConfigurationError, match="marked"):
            Sample("p", after="one two, three", marked=marked)


def test_white_space_tokens_can_be_seen():
    assert visible("\n") == "⏎" and visible(" a") == "␣a" and visible("") == "∅"


def test_hostile_texts_stay_texts():
    samples = samples_section([Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)])
    corrected = corrections_section([Correction(HOSTILE, [HOSTILE] * 3, 1, HOSTILE, HOSTILE)])
    for section in (samples, corrected):
        tags = {tag for tag, _ in parse(section).tags}
        assert not tags & {"script", "img"}
        assert "alert(1)" in parse(section).text


def test_missing_and_empty_texts_differ():
    text = parse(samples_section([Sample("p", teacher="", before=None, after="x")])).text
    assert "(empty)" in text and "not measured" in text


def test_a_long_list_is_cut_and_says_so():
    text = parse(samples_section(SAMPLES[:1] * 30)).text
    assert "The first 24 of 30 are shown." in text


def test_nothing_is_not_measured():
    assert "not measured" in samples_section([]) and "not measured" in corrections_section([])
