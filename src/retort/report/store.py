"""Records of a run as files in its folder, and back.

``training.jsonl``: one `TrainingRecord` a line, appended while training. ``provenance.json``: one
`retort.provenance.Provenance`. ``heading.json``: one `Heading`. ``decoding.json``,
``evaluation.json``, ``samples.json``, ``corrections.json``: lists of the records of that name.

Without ``training.jsonl`` the log of the newest ``trainer_state.json`` (transformers' Trainer) is
read. NaN and infinities are written as Python's json does. Lists are written beside and renamed.
"""

from __future__ import annotations

import json
import types
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from retort.errors import ConfigurationError
from retort.provenance import Provenance, write_json, write_text
from retort.report.records import (
    Correction,
    DecodingRow,
    EvaluationRow,
    Heading,
    RunRecords,
    Sample,
    TrainingRecord,
)

R = TypeVar("R")
TRAINING = "training.jsonl"
_LAST_STEP = 1 << 53
SINGLE: dict[str, type] = {"provenance": Provenance, "heading": Heading}
LISTS: dict[str, type] = {
    "decoding": DecodingRow,
    "evaluation": EvaluationRow,
    "samples": Sample,
    "corrections": Correction,
}


def append_training(folder: str | Path, record: TrainingRecord) -> None:
    """Add one line to ``training.jsonl``; a line cut short by a killed run is dropped first."""
    path = Path(folder) / TRAINING
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def save(folder: str | Path, records: RunRecords) -> None:
    """Write every non-empty part of ``records`` to its file, replacing the file as a whole."""
    folder = Path(folder)
    if records.training:
        lines = (json.dumps(record) + "\n" for record in records.training)
        write_text(folder / TRAINING, "".join(lines))
    for name in LISTS:
        if rows := getattr(records, name):
            write_json(folder / f"{name}.json", [asdict(row) for row in rows])
    for name in SINGLE:
        if (record := getattr(records, name)) not in (None, Heading()):
            write_json(folder / f"{name}.json", asdict(record))


def load(folder: str | Path) -> RunRecords:
    """Read a run's records.

    Raises `ConfigurationError` if the folder is missing or holds no record, or naming the file and
    the row or key that does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigurationError(f"no run folder at {folder}; give the output_dir of a run")
    parts: dict[str, Any] = {name: _rows(folder, name, kind) for name, kind in LISTS.items()}
    parts["training"] = read_training(folder)
    for name, kind in SINGLE.items():
        if (path := folder / f"{name}.json").is_file():
            parts[name] = _record(kind, _json(path), path.name)
    records = RunRecords(**parts)
    if records == RunRecords():
        raise ConfigurationError(
            f"{folder} holds no records ({TRAINING}, {', '.join(f'{n}.json' for n in LISTS)}); "
            "give the output_dir of a run that has logged at least once"
        )
    return records


def read_training(folder: Path) -> list[TrainingRecord]:
    """The training log in step order, one record a step.

    Records of one step are merged. Where the steps go back, a run was resumed from a checkpoint,
    and what the killed run had logged from there on no longer belongs to the run.
    """
    merged: dict[int, TrainingRecord] = {}
    last = -1
    for where, record in _raw_training(folder):
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, bool) or not isinstance(step, int) or abs(step) > _LAST_STEP:
            raise ConfigurationError(f'{where}: a training record needs an integer "step"')
        if step < last:
            merged = {s: r for s, r in merged.items() if s < step}
        merged[step] = merged.get(step, {}) | record
        last = step
    return list(merged.values())


def _raw_training(folder: Path) -> list[tuple[str, Any]]:
    path = folder / TRAINING
    if path.is_file():
        complete, _, _cut_short = _text(path).rpartition("\n")
        lines = enumerate(complete.split("\n"), start=1)
        named = [(f"{TRAINING}, line {n}", line) for n, line in lines if line.strip()]
        return [(where, _parse(line, where)) for where, line in named]
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found = sorted((path for path in states if path.is_file()), key=_checkpoint_step)
    state = _json(found[-1]) if found else {"log_history": []}
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ConfigurationError("trainer_state.json: it has no list 'log_history'")
    return [(f"trainer_state.json, log {n}", record) for n, record in enumerate(history)]


def _checkpoint_step(state: Path) -> float:
    """Order of ``trainer_state.json`` files; one in the run's own folder is the final one."""
    number = state.parent.name.rpartition("checkpoint-")[2]
    return int(number) if "checkpoint-" in state.parent.name and number.isdigit() else float("inf")


def _rows(folder: Path, name: str, kind: type[R]) -> list[R]:
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    rows = _json(path)
    if not isinstance(rows, list):
        raise ConfigurationError(f"{path.name}: expected a list of records")
    return [_record(kind, row, f"{path.name}, row {i}") for i, row in enumerate(rows)]


def _record(kind: type[R], data: Any, where: str) -> R:
    """Build a record of ``kind``; unknown, missing and wrongly typed keys are named."""
    if not isinstance(data, dict):
        raise ConfigurationError(f"{where}: expected a record with named values")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known):
        raise ConfigurationError(f"{where}: unknown key {unknown[0]!r}; known: {sorted(known)}")
    for key, value in data.items():
        if not _fits(value, hints[key]):
            raise ConfigurationError(f"{where}: {key!r} has the wrong type: {value!r:.60}")
    try:
        return kind(**data)
    except (TypeError, ConfigurationError) as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type that a record's field declares."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _json(path: Path) -> Any:
    return _parse(_text(path), path.name)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path.name}: not UTF-8 text ({error.reason})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: not valid JSON ({error})") from None
