"""Final numbers that match: GSM8K's score of an answer."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` (GSM8K's mark), else the last number of the text."""
    _, mark, after = text.rpartition("####")
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    try:
        return Decimal(chosen.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the final number of the text is the answer's (3.0 is 3), else 0.0; GSM8K's score."""
    found = final_number(prediction)
    return float(found is not None and found == final_number(answer))
