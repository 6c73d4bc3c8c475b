"""The first screen of the page: four results of the run, each measured or said not to be."""

from __future__ import annotations

from collections.abc import Sequence

from retort.report.decoding import speed_ratio
from retort.report.html import NOT_MEASURED, Markup, element
from retort.report.records import DecodingRow, EvaluationRow, RunRecords
from retort.report.scale import number
from retort.report.training import collect, total


def headline(records: RunRecords) -> Markup:
    """Tiles: decoding speed, acceptance, ROUGE-L, corrections."""
    columns = collect(records.training)
    corrected = total(columns, "scrg/corrected")
    tokens = total(columns, "scrg/regenerated_tokens")
    regenerated = f"{tokens:,.0f} tokens regenerated" if tokens is not None else ""
    return element(
        "div",
        _speed_tile(records.decoding),
        _change_tile("Acceptance α", records.evaluation, "acceptance", "of drafts, by the teacher"),
        _change_tile("ROUGE-L", records.evaluation, "rouge_l", "against the teacher's texts"),
        _tile("SCRG corrections", _count(corrected), regenerated),
        class_="tiles",
    )


def _speed_tile(rows: Sequence[DecodingRow]) -> Markup:
    """The fastest arm beside plain decoding, whatever it is; ties go to the first."""
    ratios = [(ratio, row) for row in rows if (ratio := speed_ratio(row, rows)) is not None]
    if not ratios:
        return _tile("Fastest decoding", None, "")
    ratio, best = max(ratios, key=lambda pair: pair[0])
    return _tile(
        "Fastest decoding", f"{number(ratio)} × plain", f"{best.arm}, batch\u00a0{best.batch_size}"
    )


def _change_tile(title: str, rows: Sequence[EvaluationRow], metric: str, detail: str) -> Markup:
    row = next((row for row in rows if row.metric == metric), None)
    if row is None or row.after is None:
        return _tile(title, None, "")
    before = "" if row.before is None else f"{number(row.before)} → "
    return _tile(title, f"{before}{number(row.after)}", detail)


def _tile(title: str, value: str | None, detail: str) -> Markup:
    shown = element("b", value) if value else element("b", NOT_MEASURED, class_="missing")
    return element("div", element("span", title), shown, element("small", detail), class_="tile")


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"
