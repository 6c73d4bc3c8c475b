"""Results to a Markdown table and an SVG plot, with mean ± standard deviation over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from retort.provenance import write_text

Key = tuple[str, str, str]
TITLES = {"wikitext2": "WikiText-2", "tinyshakespeare": "Tiny Shakespeare", "mqar": "MQAR"}


def read(results: Path, grid: bool) -> list[dict[str, Any]]:
    """All finished cells, of the grids or of the comparison."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(results.glob("*-s*.json"))]
    return [r for r in found if r["cell"]["grid"] is grid]


def best_rate(results: Path, corpus: str, family: str, variant: str) -> float:
    """The learning rate with the lowest loss on the tuning texts."""
    losses = {
        r["cell"]["learning_rate"]: r["evaluation"]["eval_loss"]
        for r in read(results, grid=True)
        if _key(r) == (corpus, family, variant)
    }
    return min(losses, key=lambda rate: losses[rate])


def write(results: Path) -> None:
    """``table.md`` and ``plot.svg`` beside the results."""
    rows = grouped(read(results, grid=False))
    parts = [_table(corpus, rows) for corpus in TITLES if any(k[0] == corpus for k in rows)]
    text = "\n".join([*parts, _grids(read(results, grid=True))])
    write_text(results / "table.md", text or "No cell is finished yet.\n")
    if rows:
        write_text(results / "plot.svg", plot(rows))


def grouped(results: Sequence[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Seeds of each corpus, family and variant."""
    found: defaultdict[Key, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        found[_key(result)].append(result)
    return dict(found)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation (n − 1), the mean alone where there is one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _key(result: dict[str, Any]) -> Key:
    cell = result["cell"]
    return cell["corpus"], cell["family"], cell["variant"]


def _table(corpus: str, rows: dict[Key, list[dict[str, Any]]]) -> str:
    names = ("accuracy", "loss") if corpus == "mqar" else ("perplexity", "bits per byte")
    head = ["family", "variant", "width", "parameters", "lr", "seeds", *names, "Δ loss to m0"]
    head.append("CPU ms a step")
    lines = [f"### {TITLES[corpus]}", "", _line(head), _line(["---"] * len(head))]
    for (_, family, variant), runs in sorted(r for r in rows.items() if r[0][0] == corpus):
        base = rows.get((corpus, family, "m0"), [])
        lines.append(_line([family, variant, *_cells(corpus, runs, base)]))
    return "\n".join([*lines, ""])


def _cells(corpus: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[str]:
    evaluations = [r["evaluation"] for r in runs]
    first, second = (
        ("accuracy", "eval_loss") if corpus == "mqar" else ("eval_perplexity", "eval_bits_per_byte")
    )
    model = runs[0]["model"]
    return [
        str(model["hidden_size"]),
        f"{model['parameters']:,}",
        f"{runs[0]['cell']['learning_rate']:g}",
        str(len(runs)),
        spread([e[first] for e in evaluations], 3 if corpus == "mqar" else 2),
        spread([e[second] for e in evaluations], 4),
        _difference(runs, base),
        f"{1000 * mean(r['training']['cpu_seconds_a_step'] for r in runs):.0f}",
    ]


def _difference(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Difference of the loss to the base's, seed by seed."""
    theirs = {r["cell"]["seed"]: r["evaluation"]["eval_loss"] for r in base}
    seeds = [(r["cell"]["seed"], r["evaluation"]["eval_loss"]) for r in runs]
    paired = [loss - theirs[seed] for seed, loss in seeds if seed in theirs]
    return spread(paired, 4) if paired else ""


def _grids(results: list[dict[str, Any]]) -> str:
    rates = sorted({r["cell"]["learning_rate"] for r in results})
    head = ["corpus", "family", "variant", *(f"{rate:g}" for rate in rates)]
    lines = ["### Learning rates: loss on the tuning texts, shorter runs", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for key, runs in sorted(grouped(results).items()):
        losses = {r["cell"]["learning_rate"]: r["evaluation"]["eval_loss"] for r in runs}
        shown = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        lines.append(_line([*key, *shown]))
    return "\n".join([*lines, ""])


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def plot(rows: dict[Key, list[dict[str, Any]]]) -> str:
    """Loss of each variant: a dot a seed, a bar for mean ± standard deviation, as SVG."""
    panels = sorted({key[:2] for key in rows}, key=lambda k: (list(TITLES).index(k[0]), k[1]))
    parts = [_panel(panel, rows, 20 + 230 * i) for i, panel in enumerate(panels)]
    size = 230 * len(panels) + 20
    style = "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} 300" role="img">'
        f"<title>Evaluation loss (nats a token), lower is better</title><style>{style}</style>"
        f'<rect width="{size}" height="300" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _panel(panel: tuple[str, str], rows: dict[Key, list[dict[str, Any]]], left: float) -> str:
    variants = sorted(key[2] for key in rows if key[:2] == panel)
    losses = {v: [r["evaluation"]["eval_loss"] for r in rows[(*panel, v)]] for v in variants}
    every = [loss for values in losses.values() for loss in values]
    low, high = min(every), max(every)
    room = (high - low) * 0.15 or 0.05
    low, high = low - room, high + room

    def y(value: float) -> float:
        return round(250 - 200 * (value - low) / (high - low), 1)

    parts = [f'<text class="t" x="{left}" y="20">{TITLES[panel[0]]}, {panel[1]}</text>']
    for value in (low + room, high - room):
        parts.append(f'<text x="{left}" y="{y(value) + 4}">{value:.3f}</text>')
    for i, variant in enumerate(variants):
        x = left + 55 + i * (150 / max(len(variants), 1))
        parts.append(f'<text x="{x - 8}" y="275">{variant}</text>')
        parts += [
            f'<circle cx="{x}" cy="{y(v)}" r="4" fill="#2b6cb0" fill-opacity=".6"/>'
            for v in losses[variant]
        ]
        if len(losses[variant]) > 1:
            middle, sd = mean(losses[variant]), stdev(losses[variant])
            ends = f'y1="{y(middle - sd)}" y2="{y(middle + sd)}"'
            parts.append(f'<line x1="{x + 9}" x2="{x + 9}" {ends} stroke="#222"/>')
            at = f'y1="{y(middle)}" y2="{y(middle)}"'
            parts.append(f'<line x1="{x + 5}" x2="{x + 13}" {at} stroke="#222"/>')
    return "".join(parts)
