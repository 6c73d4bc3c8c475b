"""The verdicts follow from the numbers, good or bad."""

import pytest

from retort.report import DecodingRow
from retort.report.decoding import decoding_section, sentences, speed_ratio
from tests.report.sample_run import DECODING
from tests.report.test_html import parse

PLAIN = DecodingRow("plain", 8, tokens_per_second=100.0)


def test_a_budget_that_fell_to_zero_is_said():
    (told,) = [text for text in sentences(DECODING) if "budget" in text]
    assert "unpadded (student)" in told and "draft budget fell to 0" in told and "0.0200" in told


@pytest.mark.parametrize(
    ("row", "gave_up"),
    [
        (DecodingRow("unpadded (student)", 8, mean_draft_length=0.0), True),
        (DecodingRow("unpadded (student)", 8, draft_tokens=0), True),
        (DecodingRow("unpadded (student)", 8, mean_draft_length=0.5), False),
        (DecodingRow("unpadded (student)", 8, draft_tokens=12), False),
        (DecodingRow("unpadded (student)", 8), False),  # not measured is not zero
        (DecodingRow("plain", 8, draft_tokens=0, mean_draft_length=0.0), False),
    ],
)
def test_when_a_budget_counts_as_zero(row, gave_up):
    assert row.gave_up_drafting is gave_up
    assert any("fell to 0" in text for text in sentences([row])) is gave_up


@pytest.mark.parametrize(
    ("speed", "words"),
    [(50.0, "slower than plain decoding: 0.500 ×"), (100.2, "as fast as"), (150.0, "faster than")],
)
def test_speed_in_words(speed, words):
    row = DecodingRow("padded", 8, tokens_per_second=speed)
    assert any(words in text for text in sentences([PLAIN, row]))


def test_speeds_are_compared_at_the_same_batch_size_only():
    row = DecodingRow("padded", 4, tokens_per_second=50.0)
    assert speed_ratio(row, [PLAIN, row]) is None and sentences([PLAIN, row]) == []


def test_unequal_outputs_are_said_and_unknown_ones_are_not():
    assert any("other tokens" in t for t in sentences([DecodingRow("a", 8, outputs_equal=False)]))
    assert sentences([DecodingRow("a", 8)]) == []


def test_missing_numbers_are_not_measured():
    text = parse(decoding_section([DecodingRow("new arm", 2)])).text
    assert text.count("not measured") >= 8
    assert "not measured" in decoding_section([])


def test_the_table_holds_what_was_measured_and_notes():
    text = parse(decoding_section([*DECODING, DecodingRow("x", 8, note="with a caveat")])).text
    assert "83 of 1,204" in text and "41.0 %" in text and "with a caveat" in text
