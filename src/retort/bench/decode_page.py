"""Results of ``retort bench decode`` as one HTML page: a plot and a table for each prompt set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from retort.bench.page import document
from retort.report.bars import Bar, BarPlot, draw
from retort.report.html import Markup, element, table

_HEAD = (
    "batch",
    "arm",
    "tokens/s",
    "ratio",
    "95 %",
    "a step",
    "padding",
    "accepted",
    "rows drafted for",
    "prompts s",
    "equal",
)


def page(results: Sequence[dict[str, Any]], peers: Mapping[str, Any] | None = None) -> str:
    """The page as text; ``results`` and the settings of ``peers`` are as the JSON file has them."""
    parts = [
        _section(category, [r for r in results if r["category"] == category])
        for category in dict.fromkeys(r["category"] for r in results)
    ]
    if peers:
        told = [(name, json.dumps(settings)) for name, settings in peers.items()]
        parts.append(table(("peer", "settings"), told, "Other engines, as they were set"))
    return document("Retort: decoding speed", parts)


def _section(category: str | None, rows: Sequence[dict[str, Any]]) -> Markup:
    return element(
        "section",
        element("h2", f"Prompts: {category or 'all'}"),
        _plot(category, rows),
        table(_HEAD, [_cells(r) for r in rows], f"All arms; {rows[0]['arm']} is the baseline"),
    )


def _plot(category: str | None, rows: Sequence[dict[str, Any]]) -> Markup:
    """Tokens a second by batch size; the first arm is the baseline of its group."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    groups = [
        (
            f"Batch {size}",
            [
                Bar(r["arm"], r["tokens_per_second"], arms.index(r["arm"]))
                for r in rows
                if r["batch_size"] == size
            ],
        )
        for size in dict.fromkeys(r["batch_size"] for r in rows)
    ]
    return draw(BarPlot(f"speed-{category}", "Tokens a second", "more is better", groups))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["batch_size"]),
        row["arm"],
        f"{row['tokens_per_second']:.0f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}",
        f"{row['tokens_per_step']:.2f}",
        f"{row['padding_share']:.0%}",
        f"{row['accepted_tokens']} / {row['draft_tokens']}",
        f"{row['drafted_rows']} of {row['prompts']}",
        f"{row['prefill_seconds']:.2f}",
        "yes" if row["equal_to_plain"] else "no",
    )
