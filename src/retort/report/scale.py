"""Axes: round tick values, a linear scale from data to pixels, and numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from retort.report.html import NOT_MEASURED

_LARGEST, _SMALLEST = 1e300, 1e-300


@dataclass(frozen=True)
class Scale:
    """Linear map from ``[low, high]`` to ``[start, end]`` pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value, rounded to a tenth so that pages stay small."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def drawable(value: float | int) -> float:
    """``value`` as an axis can show it: what nears a float's limits is infinite, or 0."""
    try:
        shown = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    if abs(shown) > _LARGEST:
        return math.copysign(math.inf, shown)
    return 0.0 if 0 < abs(shown) < _SMALLEST else shown


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values (1, 2, 2.5 or 5 times a power of ten) inside ``[low, high]``."""
    if not high > low:
        return [low]
    step = _round_step((high - low) / max(1, count - 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = 2 - math.floor(math.log10(step))
    return [round(i * step, decimals) for i in range(first, last + 1)]


def widen(low: float, high: float, count: int = 5) -> tuple[float, float]:
    """The range grown to whole ticks, so that no line touches the frame; a flat one gets room."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / max(1, count - 1))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for people: ``digits`` significant digits, thousands apart, None as not measured."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if isinstance(value, int) or not value or size >= 10 ** (digits - 1):
        text = f"{round(size):,}" if size < 1e7 or isinstance(value, int) else f"{size:.2e}"
    elif size < 1e-4:
        text = f"{size:.{digits - 1}e}"
    else:
        text = f"{size:.{digits - 1 - math.floor(math.log10(size))}f}"
    return f"−{text}" if value < 0 else text


def tick_text(value: float) -> str:
    """A tick's label: as short as the value allows."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:,.10g}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent; None as not measured."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)) * power
