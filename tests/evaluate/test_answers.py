"""Final numbers that match."""

from decimal import Decimal

import pytest

from retort.evaluate.answers import exact_match, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 a day.\n#### 18", "18"),
        ("so the answer is 1,234.50 dollars.", "1234.50"),
        ("from 3 to -7", "-7"),
        ("#### $1,000 in 4 weeks", "1000"),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_values():
    assert exact_match("It is 3.0", "3") == 1 and exact_match("It is 3.1", "3") == 0
    assert exact_match("no idea", "no") == 0
