"""The student before and after training: a bar pair a metric, and a table with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from retort.report import bars
from retort.report.bars import Bar, BarPlot
from retort.report.html import NOT_MEASURED, Markup, element, missing, section, table
from retort.report.records import EvaluationRow
from retort.report.scale import number

KNOWN: dict[str, tuple[str, str]] = {
    "rouge_l": ("ROUGE-L against the teacher", "F-measure with stemming, 0 to 100."),
    "acceptance": ("Acceptance α", "Expected share of drafts that the teacher accepts, 0 to 1."),
    "perplexity": ("Perplexity", "exp of the mean −log p a token."),
}
_HEAD = ("metric", "before", "after", "change", "95 % interval of the change", "reference", "note")


def evaluation_section(rows: Sequence[EvaluationRow]) -> Markup:
    """One plot a metric; the three known metrics are named as not measured where they lack."""
    measured = {row.metric for row in rows}
    lacking = [title for key, (title, _) in KNOWN.items() if key not in measured]
    if not rows:
        return section("evaluation", "Before and after", *map(missing, lacking))
    plots = [_plot(i, row) for i, row in enumerate(rows)]
    return section(
        "evaluation",
        "Before and after",
        element("div", plots, class_="grid-plots"),
        [missing(title) for title in lacking],
        table(
            _HEAD, [_cells(row) for row in rows], "The student before and after training", (1, 6)
        ),
    )


def title_of(row: EvaluationRow) -> str:
    """The metric's name on the page."""
    return KNOWN.get(row.metric, (row.metric, ""))[0]


def _plot(index: int, row: EvaluationRow) -> Markup:
    better = "Higher is better." if row.higher_is_better else "Lower is better."
    hint = f"{KNOWN.get(row.metric, ('', ''))[1]} {better} The mark is the value before.".strip()
    drawn = [Bar("before training", row.before, 0), Bar("after training", row.after, 1)]
    if row.reference is not None:
        drawn.append(Bar("teacher", row.reference, 2))
    return bars.draw(BarPlot(f"evaluation-{index}", title_of(row), hint, [("", drawn)]))


def _cells(row: EvaluationRow) -> list[str]:
    change = None if row.before is None or row.after is None else row.after - row.before
    reference = "–" if row.reference is None else number(row.reference)
    values = [number(row.before), number(row.after), number(change), _interval(row), reference]
    return [title_of(row), *values, row.note]


def _interval(row: EvaluationRow) -> str:
    if row.low is None or row.high is None:
        return NOT_MEASURED
    text = f"{number(row.low)} to {number(row.high)}"
    return text if row.low > 0 or row.high < 0 else f"{text}: not separable"
