"""Horizontal bar plots as inline SVG: a name, its value, and a bar from zero, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retort.report.html import Markup, element
from retort.report.scale import Scale, number

WIDTH, LEFT, RIGHT = 380, 4, 376
ROW, BAR, GROUP_HEAD = 38, 12, 28


@dataclass(frozen=True)
class Bar:
    """One bar; ``style`` is 0 for the baseline and 1, 2, … for colours of the page's palette.

    ``text`` replaces the value's own digits.
    """

    name: str
    value: float | None
    style: int
    text: str = ""

    @property
    def shown(self) -> str:
        """The value as written beside the bar."""
        return self.text or number(self.value)


@dataclass(frozen=True)
class BarPlot:
    """Groups of bars on one scale from zero; a mark across each bar shows its group's baseline.

    A group is a heading ("" for none) and its bars; the baseline is the bar of style 0.
    ``full`` is the value of a full bar, by default the largest one.
    """

    key: str
    title: str
    hint: str
    groups: Sequence[tuple[str, Sequence[Bar]]]
    full: float | None = None


def draw(plot: BarPlot) -> Markup:
    """The plot as a ``<figure>``. Its values are written beside the bars and need no table."""
    values = [b.value for _, bars in plot.groups for b in bars if b.value is not None]
    scale = Scale(0.0, plot.full or max([*values, 0.0]) or 1.0, LEFT, RIGHT)
    parts, top = [], 0
    for heading, bars in plot.groups:
        drawn, top = _group(heading, bars, scale, top)
        parts.append(drawn)
    title, desc = f"{plot.key}-title", f"{plot.key}-desc"
    return element(
        "figure",
        element("figcaption", element("h4", plot.title), element("p", plot.hint, class_="hint")),
        element(
            "svg",
            element("title", plot.title, id=title),
            element("desc", _describe(plot), id=desc),
            parts,
            viewBox=f"0 0 {WIDTH} {top + 4}",
            role="img",
            aria_labelledby=f"{title} {desc}",
        ),
        class_="card plot",
    )


def _group(heading: str, bars: Sequence[Bar], scale: Scale, top: int) -> tuple[Markup, int]:
    """One group drawn from ``top`` down, and where the next one starts."""
    parts: list[Markup] = []
    if heading:
        parts.append(element("text", heading, class_="group", x=LEFT, y=top + 17))
        top += GROUP_HEAD
    baseline = next((b.value for b in bars if b.style == 0 and b.value), None)
    for bar in bars:
        parts.append(_bar(bar, scale, top))
        if baseline is not None and bar.style:
            at, y = scale(baseline), top + 19
            parts.append(element("line", class_="baseline", x1=at, x2=at, y1=y - 3, y2=y + BAR + 3))
        top += ROW
    return element("g", parts), top + 6


def _bar(bar: Bar, scale: Scale, top: int) -> Markup:
    width = max(1.0, scale(bar.value) - LEFT) if bar.value else 0.0
    return element(
        "g",
        element("text", bar.name, x=LEFT, y=top + 13),
        element("text", bar.shown, class_="value", x=RIGHT, y=top + 13),
        element("rect", class_="track", x=LEFT, y=top + 19, width=RIGHT - LEFT, height=BAR, rx=3),
        element("rect", class_="bar", x=LEFT, y=top + 19, width=round(width, 1), height=BAR, rx=3),
        class_=f"series s{bar.style}",
    )


def _describe(plot: BarPlot) -> str:
    told = [", ".join(f"{bar.name}: {bar.shown}" for bar in bars) for _, bars in plot.groups]
    headed = [
        f"{head}: {text}" if head else text
        for (head, _), text in zip(plot.groups, told, strict=True)
    ]
    return f"{'; '.join(headed)}. {plot.hint}"
