"""Many runs on many data sets: a cell for each pair, kept by hash, and a table out of them.

A cell is judged once: its file is named by a hash of the model's files, the data, the teacher and
the settings. A killed evaluation goes on at the first cell that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retort.errors import ConfigurationError
from retort.manifest import model_hashes, sha256
from retort.provenance import Provenance, write_json
from retort.train.rows import read_jsonl

VERSION = 3
"""Of what a cell holds; cells of another one are judged again."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How every cell is judged.

    Attributes:
        max_new_tokens: most tokens of an answer.
        max_prompts: the first prompts of a set; None takes all.
        as_chat: prompts go through the chat template.
        draft_length: drafts a step where tokens a step are measured.
        seed: of the sampled texts for exposure bias.
    """

    max_new_tokens: int = 128
    max_prompts: int | None = None
    as_chat: bool = False
    draft_length: int = 4
    seed: int = 0


def read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises ConfigurationError naming the row that cannot be judged."""
    if not path.is_file():
        raise ConfigurationError(f"--data: there is no file {path}")
    rows = read_jsonl(path)[:limit]
    if not rows:
        raise ConfigurationError(f"{path.name} is empty: give at least one row")
    for number, row in enumerate(rows, 1):
        if (fault := _row_fault(row)) is not None:
            raise ConfigurationError(f"{path.name}, row {number}: {fault}")
    return rows


def _row_fault(row: dict[str, Any]) -> str | None:
    """What keeps a row from being judged."""
    if not (row.get("prompt") or row.get("text")):
        return "needs 'prompt' or 'text'"
    for name in "prompt", "text":
        if row.get(name) and not isinstance(row[name], str):
            return f"{name!r} must be text"
    reference = row.get("reference") or row.get("completion")
    listed = reference if isinstance(reference, list) else [reference or ""]
    if not all(isinstance(text, str) for text in listed):
        return "'reference' must be text, or a list of texts"
    return None


def run_seed(run: str) -> int | None:
    """The training seed that a run's folder records, None where it records none."""
    try:
        seeds = json.loads((Path(run) / "provenance.json").read_text("utf-8"))["seeds"]
        return int(seeds["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cell_hash(model: Path, data: Path, teacher: Path | None, settings: EvaluationSettings) -> str:
    """Hash of everything that a cell depends on."""
    parts: dict[str, Any] = {"data": sha256(data), "settings": asdict(settings), "version": VERSION}
    for name, folder in ("model", model), ("teacher", teacher):
        parts[name] = None if folder is None else model_hashes(folder)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def evaluate_runs(
    runs: Sequence[str],
    data: Sequence[Path],
    output: Path,
    settings: EvaluationSettings,
    teacher: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Judge every run on every set and return the table; cells lie in ``output/cells``.

    ``runs`` are run folders, zoo names or hub ids. Raises ConfigurationError, before any model is
    loaded, for data or a run that is not there, and for runs or sets of one name.
    """
    from retort.evaluate.cells import Judge
    from retort.models import zoo

    for what, names in ("run", list(runs)), ("data set", [path.stem for path in data]):
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice or not names:
            raise ConfigurationError(f"each {what} once, at least one: {twice or 'none is given'}")
    rows = {path: read_rows(path, settings.max_prompts) for path in data}
    folders = {run: zoo.resolve(run) for run in runs}
    guide = None if teacher is None else zoo.resolve(teacher)
    cells = []
    for run, folder in folders.items():
        judge = Judge(folder, guide, settings)
        for path in data:
            name = cell_hash(folder, path, guide, settings)
            file = output / "cells" / f"{name}.json"
            if (found := _judged(file)) is None:
                say(f"{run} on {path.stem}")
                found = judge.judge(rows[path])
                write_json(file, found)
            cells.append(
                {"run": run, "seed": run_seed(run), "dataset": path.stem, "cell": name, **found}
            )
        judge.close()
    record = Provenance.collect({**asdict(settings), "runs": list(runs)}, {"seed": settings.seed})
    return {"cells": cells, "teacher": teacher, "provenance": record.to_dict()}


def _judged(file: Path) -> dict[str, Any] | None:
    """A cell that was judged before; None for one that is missing or damaged."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(found, dict) or "prompts" not in found:
        return None
    whole = all(isinstance(found.get(name), dict) for name in ("metrics", "scored", "scores"))
    return found if whole else None
