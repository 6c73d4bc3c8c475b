"""Ticks are round and inside; numbers keep three digits."""

import math
import random
from itertools import pairwise

import pytest

from retort.report.scale import Scale, number, percent, ticks, widen


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (1, 120, [50, 100]),
        (-3, 3, [-2, 0, 2]),
        (5, 5, [5]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == expected


def test_ticks_lie_inside_and_are_evenly_spaced_for_any_range():
    draw = random.Random(0)
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 6)
        high = low + max(1e-6, abs(low) * 1e-5) * 10 ** draw.uniform(0, 6)
        found = ticks(low, high)
        room = (high - low) * 1e-6
        assert all(low - room <= t <= high + room for t in found)
        gaps = [b - a for a, b in pairwise(found)]
        assert all(g == pytest.approx(gaps[0], rel=1e-3) for g in gaps)
        wide = widen(low, high)
        assert wide[0] <= low + room and wide[1] >= high - room
        assert 2 <= len(ticks(*wide)) <= 7


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-9])
def test_a_flat_line_gets_room(value):
    low, high = widen(value, value)
    assert low < value < high


def test_scale_maps_ends_and_middle():
    scale = Scale(0, 10, 100, 0)
    assert [scale(v) for v in (0, 5, 10)] == [100, 50, 0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (999.6, "1,000"),
        (48211.0, "48,211"),
        (1234567, "1,234,567"),
        (0.142, "0.142"),
        (0.021, "0.0210"),
        (3e-7, "3.00e-07"),
        (2.5e9, "2.50e+09"),
        (-47999.2, "−47,999"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_percent():
    assert percent(0.41) == "41.0 %"
    assert percent(None) == "not measured"
