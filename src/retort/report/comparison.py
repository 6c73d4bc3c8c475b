"""A page for many runs: a table a data set, verdicts against a baseline, texts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retort.provenance import Provenance, write_text
from retort.report.html import Markup, details, element, section, table
from retort.report.page import fill
from retort.report.provenance import provenance_section
from retort.report.scale import number

MAX_TEXTS = 8


def build_comparison(
    found: dict[str, Any], comparisons: Sequence[dict[str, Any]], path: str | Path
) -> Path:
    """Write the page of a table of `retort.evaluate.runs` and return its path."""
    sets = list(dict.fromkeys(cell["dataset"] for cell in found["cells"]))
    parts = [_dataset(name, found["cells"], comparisons) for name in sets]
    body = element(
        "main",
        element("header", element("h1", "Runs compared"), element("p", _lead(found))),
        parts,
        provenance_section(Provenance(**found["provenance"])),
    )
    return write_text(path, fill("Runs compared", Markup(body)))


def _lead(found: dict[str, Any]) -> str:
    runs = len({cell["run"] for cell in found["cells"]})
    teacher = f" The teacher is {found['teacher']}." if found["teacher"] else ""
    return f"{runs} runs; intervals are 95 %, paired bootstrap over prompts.{teacher}"


def _dataset(name: str, cells: Sequence[dict], comparisons: Sequence[dict]) -> Markup:
    mine = [cell for cell in cells if cell["dataset"] == name]
    metrics = list(dict.fromkeys(m for cell in mine for m in cell["metrics"]))
    rows = [_row(cell, metrics, comparisons) for cell in mine]
    head = ["run", "seed", "prompts", *metrics]
    shown = table(head, rows, f"{name}: every number with its verdict", (2, len(head)))
    return section(f"set-{name}", name, shown, _texts(mine))


def _row(cell: dict, metrics: Sequence[str], comparisons: Sequence[dict]) -> list[Any]:
    run, seed = cell["run"], cell["seed"]
    link = element("a", run, href=f"cells/{cell['cell']}.json")
    values = [_value(cell, metric, comparisons) for metric in metrics]
    return [link, "not recorded" if seed is None else str(seed), str(cell["prompts"]), *values]


def _value(cell: dict, metric: str, comparisons: Sequence[dict]) -> Markup:
    """A number that links to its run's cell and seed, and how it compares."""
    shown = number(cell["metrics"].get(metric))
    seed = "not recorded" if cell["seed"] is None else cell["seed"]
    link = element(
        "a", shown, href=f"cells/{cell['cell']}.json", title=f"run {cell['run']}, seed {seed}"
    )
    notes = [_left_out(cell, metric), _verdict(cell, metric, comparisons)]
    return element("span", link, [[element("br"), element("small", n)] for n in notes if n])


def _left_out(cell: dict, metric: str) -> str:
    """Of how many rows a number is, where it is not of all."""
    scored, prompts = cell["scored"].get(metric, 0), cell["prompts"]
    return f"of {scored} of {prompts} rows" if 0 < scored < prompts else ""


def _verdict(cell: dict, metric: str, comparisons: Sequence[dict]) -> str:
    place = (cell["run"], cell["dataset"], metric)
    for c in comparisons:
        if (c["run"], c["dataset"], c["metric"]) == place:
            return f"{c['verdict']} ({number(c['low'])} to {number(c['high'])})"
    return ""


def _texts(cells: Sequence[dict]) -> Markup | None:
    """The first texts of all runs, prompt by prompt."""
    written = [cell for cell in cells if cell.get("texts")]
    count = min([MAX_TEXTS, *(len(cell["texts"]) for cell in written)]) if written else 0
    if not count:
        return None
    rows = [[str(i + 1), *(cell["texts"][i] for cell in written)] for i in range(count)]
    head = ["prompt", *(cell["run"] for cell in written)]
    return details("The first texts", table(head, rows, "Texts side by side", (0, 0)))
