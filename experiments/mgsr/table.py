"""One table out of the finished cells.

    python experiments/mgsr/table.py experiments/mgsr/results > experiments/mgsr/results/TABLE.md
    python experiments/mgsr/table.py experiments/mgsr/results/other-rate experiments/mgsr/results
    python experiments/mgsr/table.py results/half-tokens results/other-rate sft

Mean ± standard deviation over seeds of the five-set average, each set's mean, and the paired
bootstrap of every method's scores against mgsr's on the same prompts and seeds; the names are links
to the cells' records. Another folder's records, or another label's, are the reference where they
are named. Below stand what each part of mgsr adds to those before it, and the joint claim, where
they were measured.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from settings import SETS

from retort.evaluate.significance import paired_bootstrap

Records = dict[str, list[dict[str, Any]]]
REFERENCE = "mgsr"
PARTS = ("ablation none", "ablation scrg", "ablation scrg+dac", REFERENCE)


def markdown(results: Path, against: Path | None = None, reference: str = REFERENCE) -> str:
    """The tables of all cells in ``results`` that were tested, and of the joint claim.

    Differences are to the records of ``reference`` in the folder ``against`` (default: the same).
    """
    groups = load(results)
    theirs = groups if against is None else load(against)
    head = ["run", "seeds", "rate", "average", *SETS, f"difference to {reference} [95 %]"]
    text = _table(head, [row(label, groups[label], theirs.get(reference, [])) for label in groups])
    if all(label in groups for label in PARTS):
        text += "\n" + parts_table(groups)
    for path in sorted(results.glob("joint-*.json")):
        text += "\n" + joint_table(path)
    return text


def parts_table(groups: Records) -> str:
    """What each part adds to the ones before it."""
    pairs = pairwise(PARTS)
    rows = [[new, old, difference(groups[new], groups[old])] for old, new in pairs]
    return _table(["run", "against", "difference [95 %]"], rows)


def joint_table(path: Path) -> str:
    """The DenseRetNet students as the teacher's drafters."""
    found = json.loads(path.read_text("utf-8"))["joint"]
    head = ["drafter of the teacher", "acceptance α", "agreement", "break-even α", "step cost"]
    head += ["tokens a step", "tokens/s", "times the teacher alone [95 %]"]
    rows = [_joint_row(label, arm) for label, arm in found["arms"].items()]
    return (
        f"{found['draft']} drafts a step, one row at a time, texts of one length, equal to the "
        f"teacher's own ([record]({path.name}))\n\n" + _table(head, rows)
    )


def _joint_row(label: str, arm: dict[str, Any]) -> list[str]:
    names = ("acceptance", "agreement", "break_even")
    low, high = arm["ratio_95"]
    return [
        label,
        *("–" if arm.get(name) is None else f"{arm[name]:.3f}" for name in names),
        f"{arm['step_cost']:.2f}",
        f"{arm['tokens_per_step']:.2f}",
        f"{arm['tokens_per_second']:.1f}",
        f"{arm['ratio']:.2f} [{low:.2f}, {high:.2f}]",
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def load(results: Path) -> Records:
    """Tested cells by label; teacher and base student stand first."""
    groups: Records = defaultdict(list)
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if "tests" in record:
            groups[label_of(record)].append(record)
    first = ["teacher", "base"]
    return {k: groups[k] for k in sorted(groups, key=lambda k: (k not in first, k))}


def label_of(record: dict[str, Any]) -> str:
    """What the row is called: the method for the main table, else the stage too."""
    stage, label = record["stage"], record["label"]
    if stage in ("teacher", "base"):
        return stage
    return label if stage in ("main", "other") else f"{stage} {label}"


def row(label: str, records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[str]:
    """Cells of one line of the table."""
    averages = [r["tests"]["average"] for r in records]
    spread = f" ± {stdev(averages):.2f}" if len(averages) > 1 else ""
    sets = [mean(r["tests"]["sets"][name]["mean"] for r in records) for name in SETS]
    rates = sorted({f"{r['learning_rate']:g}" for r in records})
    return [
        label,
        " ".join(f"[{r['seed']}]({r['cell']}.json)" for r in records),
        ", ".join(rates),
        f"{mean(averages):.2f}{spread}",
        *(f"{value:.2f}" for value in sets),
        difference(records, reference),
    ]


def difference(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Paired bootstrap over prompts, each the mean of the seeds that both have.

    A prompt's seeds are drawn together: they share what is hard about the prompt. Sets weigh by
    their prompts.
    """
    ours, theirs = by_seed(reference), by_seed(records)
    shared = [seed for seed in theirs if seed in ours and ours[seed] is not theirs[seed]]
    if not shared:
        return "–"
    found = paired_bootstrap(*(prompt_means([runs[s] for s in shared]) for runs in (ours, theirs)))
    verdict = "" if found.separable else ", not separable"
    return f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{verdict}"


def by_seed(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A label's records."""
    return {record["seed"]: record for record in records}


def prompt_means(records: list[dict[str, Any]]) -> list[float]:
    """Each prompt's mean score over some seeds."""
    return [mean(each) for each in zip(*map(scores, records), strict=True)]


def scores(record: dict[str, Any]) -> list[float]:
    """All prompts' scores in a fixed order."""
    return [score for name in SETS for score in record["tests"]["sets"][name]["scores"]]


if __name__ == "__main__":
    print(markdown(*map(Path, sys.argv[1:3]), *sys.argv[3:4]), end="")
