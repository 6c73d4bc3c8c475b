"""The training part of the page: every logged metric in a plot or, if unknown, in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from retort.report import lines
from retort.report.html import Child, Markup, element, missing, section, table
from retort.report.lines import LinePlot, Point, Series
from retort.report.metrics import GROUPS, Panel, canonical
from retort.report.records import TrainingRecord
from retort.report.scale import drawable, number, percent

Columns = dict[str, list[Point]]
MAX_LINES = 6
_PHASES = ("time/rollout", "time/teacher", "time/train")


def training_section(records: Sequence[TrainingRecord]) -> Markup:
    """All plots of the training log, group by group, and the table of other metrics."""
    columns = collect(records)
    if not columns:
        return section("training", "Training", missing("The training log"))
    used: set[str] = set()
    parts: list[Child] = []
    for group in GROUPS:
        plots = [_plot(panel, columns, used) for panel in group.panels]
        drawn = [lines.draw(plot) for plot in plots if plot]
        if drawn:
            parts += [element("h3", group.title), element("div", drawn, class_="grid-plots")]
    rest = {name: points for name, points in columns.items() if name not in used}
    return section("training", "Training", _summary(columns), parts, _other(rest) if rest else None)


def collect(records: Sequence[TrainingRecord]) -> Columns:
    """(step, value) points of each metric that was ever a number, under its canonical name."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                columns.setdefault(canonical(name), {})[record["step"]] = drawable(value)
    return {name: sorted(points.items()) for name, points in columns.items()}


def total(columns: Columns, metric: str) -> float | None:
    """Sum of a metric over all records, None if it was never measured."""
    points = columns.get(metric)
    return None if not points else sum(v for _, v in points if math.isfinite(v))


def _plot(panel: Panel, columns: Columns, used: set[str]) -> LinePlot | None:
    """The panel's plot, None where nothing of it was logged; adds what it shows to ``used``."""
    wanted = list(panel.lines)
    if panel.prefix:
        named = {metric for metric, _ in wanted}
        more = sorted(m for m in columns if m.startswith(panel.prefix) and m not in named)
        wanted += [(metric, metric.removeprefix(panel.prefix)) for metric in more]
    present = [(m, name) for m, name in wanted if m in columns][:MAX_LINES]
    series = [Series(name, columns[m], _band_of(m, columns, used)) for m, name in present]
    used.update(metric for metric, _ in present)
    for low, high, name in panel.bands:
        series += _between(low, high, name, columns, used)
    if not series:
        return None
    return LinePlot(panel.key, panel.title, panel.hint, series, panel.references, panel.y_range)


def _band_of(metric: str, columns: Columns, used: set[str]) -> list[tuple[int, float, float]]:
    return _band(f"{metric}_low", f"{metric}_high", columns, used)


def _between(low: str, high: str, name: str, columns: Columns, used: set[str]) -> list[Series]:
    """Upper and lower line of a band; the area is drawn with the upper one."""
    area = _band(low, high, columns, used)
    if not area:
        return []
    return [Series(f"{name}: upper", columns[high], area), Series(f"{name}: lower", columns[low])]


def _band(low: str, high: str, columns: Columns, used: set[str]) -> list[tuple[int, float, float]]:
    if low not in columns or high not in columns:
        return []
    used.update((low, high))
    upper = dict(columns[high])
    both = ((step, value, upper[step]) for step, value in columns[low] if step in upper)
    area = [point for point in both if all(map(math.isfinite, point))]
    every = math.ceil(len(area) / lines.MAX_POINTS) or 1
    return area[::every]


def _summary(columns: Columns) -> list[Markup]:
    """Totals in words: steps, corrections, and how the time was spent."""
    steps = max(step for points in columns.values() for step, _ in points)
    corrected = number(_whole(total(columns, "scrg/corrected")))
    tokens = number(_whole(total(columns, "scrg/regenerated_tokens")))
    facts = [
        f"{steps:,} steps were logged. SCRG corrections: {corrected}; tokens regenerated after "
        f"them: {tokens}."
    ]
    spent = [(name.removeprefix("time/"), total(columns, name)) for name in _PHASES]
    known = [(name, seconds) for name, seconds in spent if seconds is not None]
    whole = sum(seconds for _, seconds in known)
    if whole > 0:
        shares = ", ".join(f"{name} {percent(seconds / whole)}" for name, seconds in known)
        facts.append(f"Of {number(whole)} s in these phases: {shares}.")
    return [element("p", fact) for fact in facts]


def _whole(value: float | None) -> int | float | None:
    return int(value) if value is not None and value == int(value) else value


def _other(columns: Columns) -> Markup:
    rows = []
    for name in sorted(columns):
        values = [value for _, value in columns[name]]
        ends = (values[0], values[-1], min(values), max(values))
        rows.append([name, str(len(values)), *(number(value) for value in ends)])
    head = ["metric", "records", "first", "last", "lowest", "highest"]
    return element("div", element("h3", "Other metrics"), table(head, rows, "Other logged metrics"))
