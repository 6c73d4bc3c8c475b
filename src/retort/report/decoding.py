"""The decoding part of the page: tokens a second of each arm, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from retort.report import bars
from retort.report.bars import Bar, BarPlot
from retort.report.html import NOT_MEASURED, Markup, element, missing, section, table
from retort.report.records import DecodingRow
from retort.report.scale import number, percent

_HEAD = (
    "arm",
    "batch",
    "tokens/s",
    "tokens a step",
    "mean draft length",
    "drafts accepted",
    "padding",
    "outputs equal",
    "tokens",
    "seconds",
)
_PLOTS = (
    ("tokens_per_second", "Tokens per second", "Of all rows together. The mark is plain decoding."),
    (
        "tokens_per_step",
        "Tokens per step",
        "Gained by a row in a step. The mark is plain decoding.",
    ),
    ("padding_share", "Padding", "Share of the computed positions that hold no token."),
)


def decoding_section(rows: Sequence[DecodingRow]) -> Markup:
    """Bars, verdicts and the table of all measured numbers."""
    if not rows:
        return section("decoding", "Decoding", missing("Decoding speed"))
    noted = any(row.note for row in rows)
    cells = [[*_cells(row), row.note] if noted else _cells(row) for row in rows]
    verdicts = [element("li", text) for text in sentences(rows)]
    return section(
        "decoding",
        "Decoding",
        element("ul", verdicts, class_="verdicts"),
        element("div", [_plot(*kind, rows) for kind in _PLOTS], class_="grid-plots"),
        table(
            [*_HEAD, "note"] if noted else _HEAD, cells, "Decoding, as measured", (1, len(_HEAD))
        ),
    )


def baseline(row: DecodingRow, rows: Sequence[DecodingRow]) -> DecodingRow | None:
    """The plain arm at the row's batch size, if it was measured."""
    same = (other for other in rows if other.batch_size == row.batch_size)
    return next((other for other in same if other.arm.startswith("plain")), None)


def speed_ratio(row: DecodingRow, rows: Sequence[DecodingRow]) -> float | None:
    """Tokens a second over those of plain decoding at the same batch size."""
    base = baseline(row, rows)
    if base is None or base is row or not base.tokens_per_second or row.tokens_per_second is None:
        return None
    return row.tokens_per_second / base.tokens_per_second


def sentences(rows: Sequence[DecodingRow]) -> list[str]:
    """What each arm did beside plain decoding; losses and a draft budget of 0 are said outright."""
    told = []
    for row in rows:
        told += [text for text in (_speed(row, rows), _budget(row), _equality(row)) if text]
    return told


def _speed(row: DecodingRow, rows: Sequence[DecodingRow]) -> str:
    ratio = speed_ratio(row, rows)
    if ratio is None:
        return ""
    verdict = "slower than" if ratio < 0.995 else "as fast as" if ratio <= 1.005 else "faster than"
    return f"{_name(row)} was {verdict} plain decoding: {number(ratio)} × its tokens a second."


def _budget(row: DecodingRow) -> str:
    if not row.gave_up_drafting:
        return ""
    return (
        f"{_name(row)}: speculation did not pay, so the draft budget fell to 0 (mean draft length "
        f"{number(row.mean_draft_length)}, {number(row.draft_tokens)} draft tokens in all)."
    )


def _equality(row: DecodingRow) -> str:
    if row.outputs_equal is not False:
        return ""
    return f"{_name(row)} wrote other tokens than plain decoding."


def _name(row: DecodingRow) -> str:
    return f"At batch {row.batch_size}, {row.arm}"


def _plot(value: str, title: str, hint: str, rows: Sequence[DecodingRow]) -> Markup:
    arms = list(dict.fromkeys(row.arm for row in rows if not row.arm.startswith("plain")))
    styles = {arm: 1 + i % 6 for i, arm in enumerate(arms)}
    groups = []
    for size in dict.fromkeys(row.batch_size for row in rows):
        mine = [row for row in rows if row.batch_size == size]
        drawn = [_bar(row, value, styles.get(row.arm, 0)) for row in mine]
        groups.append((f"batch {size}", drawn))
    full = 1.0 if value == "padding_share" else None
    return bars.draw(BarPlot(f"decoding-{value}", title, hint, groups, full))


def _bar(row: DecodingRow, value: str, style: int) -> Bar:
    found: float | None = getattr(row, value)
    return Bar(row.arm, found, style, percent(found) if value == "padding_share" else "")


def _cells(row: DecodingRow) -> list[str]:
    equal = NOT_MEASURED if row.outputs_equal is None else "yes" if row.outputs_equal else "NO"
    return [
        row.arm,
        str(row.batch_size),
        number(row.tokens_per_second),
        number(row.tokens_per_step),
        number(row.mean_draft_length),
        _accepted(row),
        percent(row.padding_share),
        equal,
        number(row.tokens),
        number(row.seconds),
    ]


def _accepted(row: DecodingRow) -> str:
    if row.accepted_tokens is None or row.draft_tokens is None:
        return NOT_MEASURED
    if not row.draft_tokens:
        return "no drafts"
    return f"{row.accepted_tokens:,} of {row.draft_tokens:,}"
