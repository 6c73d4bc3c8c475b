"""Line plots as inline SVG, with bands, reference lines, a legend and a table of the same data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from retort.report.html import Markup, details, element, table
from retort.report.scale import Scale, number, tick_text, ticks, widen

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 50, 366, 10, 186
MAX_POINTS, MAX_TABLE_ROWS = 400, 40
Point = tuple[int, float]


@dataclass(frozen=True)
class Series:
    """A named line over (step, value); ``band`` holds (step, low, high) shaded behind it."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[int, float, float]] = ()

    def text(self, value: float | None) -> str:
        """A value of this line for people; counts that were logged as floats show as counts."""
        if value is not None and all(v == v // 1 for _, v in self.points):
            return number(int(value))
        return number(value)


@dataclass(frozen=True)
class LinePlot:
    """One plot over training steps. ``references`` are (value, label) horizontal lines."""

    key: str
    title: str
    hint: str
    series: Sequence[Series]
    references: Sequence[tuple[float, str]] = ()
    y_range: tuple[float, float] | None = None


def draw(plot: LinePlot) -> Markup:
    """The plot as a ``<figure>``: heading with the last value, legend, SVG, table of the data."""
    lost = sum(not math.isfinite(value) for s in plot.series for _, value in s.points)
    gaps = f" Values that were not finite leave gaps: {lost}." if lost else ""
    alone = plot.series[0] if len(plot.series) == 1 else None
    return element(
        "figure",
        element(
            "figcaption",
            element("h4", plot.title),
            element("span", "last ", element("b", alone.text(alone.points[-1][1])))
            if alone
            else None,
            element("p", plot.hint + gaps, class_="hint"),
        ),
        None if alone else _legend(plot),
        _svg(plot),
        details("Data as a table", _table(plot)),
        class_="card plot",
    )


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about ``limit`` points: the lowest and highest of each stretch, so spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [p for p in stretch if math.isfinite(p[1])] or stretch[:1]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(ends | {p for p in stretch if not math.isfinite(p[1])})
    return kept


def _svg(plot: LinePlot) -> Markup:
    series = [Series(s.name, thin(s.points), s.band) for s in plot.series]
    x, y = _scales(plot, series)
    title, desc = f"{plot.key}-title", f"{plot.key}-desc"
    return element(
        "svg",
        element("title", plot.title, id=title),
        element("desc", _describe(plot), id=desc),
        _axes(x, y),
        [_band(s, i, x, y) for i, s in enumerate(series, start=1) if s.band],
        [_line(s, i, x, y) for i, s in enumerate(series, start=1)],
        [_reference(y, value, label) for value, label in plot.references],
        element("line", class_="cursor", y1=TOP, y2=BOTTOM, hidden=True),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{title} {desc}",
        data_hover=_hover_data(series, x, y),
    )


def _scales(plot: LinePlot, series: Sequence[Series]) -> tuple[Scale, Scale]:
    steps = [step for s in series for step, _ in s.points]
    low_step, high_step = min(steps), max(steps)
    if low_step == high_step:
        low_step, high_step = low_step - 1, high_step + 1
    values = [v for s in series for _, v in s.points]
    values += chain.from_iterable((low, high) for s in series for _, low, high in s.band)
    values += [value for value, _ in plot.references]
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = plot.y_range or widen(min(finite), max(finite))
    return Scale(low_step, high_step, LEFT, RIGHT), Scale(low, high, BOTTOM, TOP)


def _axes(x: Scale, y: Scale) -> Markup:
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(element("line", class_="grid", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        parts.append(element("text", tick_text(value), class_="ytick", x=LEFT - 7, y=at + 4))
    for value in ticks(x.low, x.high, 6):
        if value == round(value):
            at = x(value)
            parts.append(element("line", class_="axis", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 4))
            parts.append(element("text", tick_text(value), class_="xtick", x=at, y=BOTTOM + 18))
    parts.append(element("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    middle = (LEFT + RIGHT) / 2
    parts.append(element("text", "training step", class_="xtick", x=middle, y=BOTTOM + 35))
    return element("g", parts, aria_hidden="true")


def _line(series: Series, index: int, x: Scale, y: Scale) -> Markup:
    """The line, broken at values that are not finite; points that stand alone become dots."""
    runs: list[list[Point]] = [[]]
    for step, value in series.points:
        if math.isfinite(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    path = "".join(
        "M" + "L".join(f"{x(step)} {y(value)}" for step, value in run) for run in runs if run[1:]
    )
    alone = [run[0] for run in runs if not run[1:]] + [run[-1] for run in runs[-1:] if run[1:]]
    dots = [element("circle", cx=x(step), cy=y(value), r=3) for step, value in alone]
    line = element("path", class_="line", d=path) if path else None
    return element("g", line, dots, class_=f"series s{index}")


def _band(series: Series, index: int, x: Scale, y: Scale) -> Markup:
    there = [f"{x(step)} {y(high)}" for step, _, high in series.band]
    back = [f"{x(step)} {y(low)}" for step, low, _ in reversed(series.band)]
    return element("path", class_=f"band s{index}", d="M" + "L".join(there + back) + "Z")


def _reference(y: Scale, value: float, label: str) -> Markup:
    at = y(value)
    return element(
        "g",
        element("line", class_="reference", x1=LEFT, x2=RIGHT, y1=at, y2=at),
        element("text", label, class_="reference", x=RIGHT, y=at - 5 if at > TOP + 20 else at + 14),
    )


def _legend(plot: LinePlot) -> Markup:
    """Names beside their colours, with the last value of each line."""
    items = [
        element(
            "li",
            element("i", class_=f"key s{i}", aria_hidden="true"),
            f"{s.name} ",
            element("b", s.text(s.points[-1][1])),
        )
        for i, s in enumerate(plot.series, start=1)
    ]
    return element("ul", items, class_="legend")


def _hover_data(series: Sequence[Series], x: Scale, y: Scale) -> str:
    """What the page's script shows under the pointer: pixels and texts, a column a step."""
    columns: dict[int, dict[int, float]] = {}
    for i, s in enumerate(series):
        for step, value in s.points:
            columns.setdefault(step, {})[i] = value
    shown = [
        [x(step), step, [[i, series[i].text(v)] for i, v in sorted(columns[step].items())]]
        for step in sorted(columns)
    ]
    data = {"names": [s.name for s in series], "columns": shown}
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _describe(plot: LinePlot) -> str:
    """One sentence for people who do not see the plot."""
    parts = [
        f"{s.name} from {number(s.points[0][1])} at step {s.points[0][0]:,} "
        f"to {number(s.points[-1][1])} at step {s.points[-1][0]:,}"
        for s in plot.series
    ]
    return f"{'; '.join(parts)}. {plot.hint}"


def _table(plot: LinePlot) -> Markup:
    values = [dict(s.points) for s in plot.series]
    bands = [{step: (low, high) for step, low, high in s.band} for s in plot.series]
    steps = sorted(set().union(*values))
    every = math.ceil(len(steps) / MAX_TABLE_ROWS)
    kept = sorted({*steps[::every], steps[-1]})
    part = f", every {every}th record" if every > 1 else ""

    def cell(i: int, step: int) -> str:
        text = plot.series[i].text(values[i].get(step))
        low_high = bands[i].get(step)
        return f"{text} ({number(low_high[0])} to {number(low_high[1])})" if low_high else text

    rows = [[f"{step:,}", *(cell(i, step) for i in range(len(values)))] for step in kept]
    return table(["step", *(s.name for s in plot.series)], rows, f"{plot.title}{part}")
