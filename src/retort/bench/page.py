"""A load's summary as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from retort.bench.load import Sample
from retort.bench.summary import Summary, rows
from retort.report.bars import Bar, BarPlot, draw
from retort.report.html import Markup, element, table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d1d1b; background: #f6f6f3 }
table { border-collapse: collapse } caption { text-align: left; font-weight: 600 }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ccc }
td.n { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 26rem; font: 12px system-ui, sans-serif } svg rect { fill: #2b6cb0 }
svg text { fill: currentColor } .hint { color: #555 }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #141413 } .hint { color: #aaa }
}
"""
_BUCKETS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560)


def page(title: str, summary: Summary, samples: Sequence[Sample]) -> str:
    """The page as text."""
    gaps = [1000 * gap for s in samples for gap in s.gaps]
    firsts = [1000 * s.first for s in samples if s.first is not None]
    failed = [f"{s.sent:.1f} s: {s.error}" for s in samples if s.error is not None]
    parts = [
        table(("what", "value"), rows(summary), "Open-loop load, as the clients saw it"),
        _histogram("ttft", "Time to first token", firsts),
        _histogram("itl", "Time between the pieces of a stream", gaps),
        [element("h2", "Errors"), element("ul", [element("li", e) for e in failed])]
        if failed
        else None,
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[Markup | list[Markup] | None]) -> str:
    """A page of the benchmarks' style, as text."""
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        element("title", title),
        Markup(f"<style>{_STYLE}</style>"),
    )
    body = element("main", element("h1", title), parts)
    return Markup("<!doctype html>\n") + element("html", head, element("body", body), lang="en")


def _histogram(key: str, title: str, values: Sequence[float]) -> Markup | None:
    """How many values lie below each bound and above the one before."""
    if not values:
        return None
    bounds = [*_BUCKETS, float("inf")]
    bars, low = [], 0.0
    for high in bounds:
        count = sum(low <= value < high for value in values)
        name = f"{low:.0f} to {high:.0f} ms" if high != float("inf") else f"over {low:.0f} ms"
        bars.append(Bar(name, float(count), 1))
        low = high
    return draw(BarPlot(key, title, f"{len(values)} values", [("", bars)]))
