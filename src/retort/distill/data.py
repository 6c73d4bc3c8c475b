"""Rows of a dataset, read and turned into ids, with errors that name the row and the column.

Rows are TRL's: ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` (text or chat
messages), ``{"text": ...}``, which is learned from its second token on by methods that write
nothing, or, [ours], ``{"prompt": ..., "reference": ...}``, where a list of references counts by
its first. How one row becomes ids is in `retort.distill.encoding`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.distill.encoding import Encoding, encoded, first_answer
from retort.errors import ConfigurationError
from retort.train.rows import load_named, named_file, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

COLUMNS = ("messages", "prompt", "completion", "reference", "text")
"""Columns that are read; all others are ignored."""


@dataclass(frozen=True)
class Example:
    """A tokenised row; ``index`` is its place in the dataset, from 0."""

    index: int
    prompt_ids: list[int]
    completion_ids: list[int]


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Rows of a JSONL or Parquet file, a folder of such files, or a dataset of the hub.

    JSONL is read into memory, row by row, so that errors name the row; everything else goes to
    `datasets.load_dataset`. Raises ConfigurationError when there is no such data, or it is empty.
    """
    path = named_file(name, split)
    rows = _read_jsonl(path) if path is not None else load_named(name, split, config)
    if not len(rows):
        raise ConfigurationError(f"{name} is empty: give at least one row")
    return rows


def tokenize(rows: Any, encoding: Encoding, num_proc: int | None = None) -> Dataset:
    """Columns ``index``, ``prompt_ids`` and ``completion_ids`` of a `Dataset` or a list of rows.

    Raises ConfigurationError for missing columns, and naming row (counted from 1) and column for
    an empty or missing value, or a prompt that leaves no room within ``max_length`` (with
    `skip_long_prompts` such rows are left out, and counted in a warning).
    """
    from datasets import Dataset

    if not hasattr(rows, "__len__"):
        raise ConfigurationError(
            f"{encoding.origin} is a stream: its rows are counted before training, so load it whole"
        )
    if not len(rows):
        raise ConfigurationError(f"{encoding.origin} is empty: give at least one row")
    if not isinstance(rows, Dataset):
        rows = _table(rows, encoding.origin)
    _check_columns(rows.column_names, encoding)
    made = rows.map(
        lambda row, index: encoded(row, index, encoding),
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        load_from_cache_file=False,  # a cache keyed by a tokenizer's pickle is seldom hit
    )
    return _without_skipped(made, encoding) if encoding.skip_long_prompts else made


def collate(features: Sequence[dict[str, Any]]) -> dict[str, list[Example]]:
    """A batch as the trainer's data loader hands it on: examples, not yet tensors."""
    return {"examples": [Example(**feature) for feature in features]}


def _read_jsonl(path: Path) -> Dataset:
    return _table(read_jsonl(path), path.name)


def _table(rows: Sequence[Any], origin: str) -> Dataset:
    """The columns that are read, of all rows, whichever has them."""
    from datasets import Dataset

    if strange := next((row for row in rows if not isinstance(row, Mapping)), None):
        raise ConfigurationError(f"{origin}: expected rows with named columns, got {strange!r:.60}")
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    if rows and not columns:
        raise ConfigurationError(_missing(origin, sorted(rows[0])))
    plain = [{c: first_answer(row.get(c)) for c in columns} for row in rows]
    _check_alike(plain, origin)
    try:
        return Dataset.from_list(plain)
    except (ValueError, TypeError) as error:  # pyarrow's are of both kinds
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{origin}: the rows make no table ({reason})") from error


def _check_alike(rows: Sequence[dict[str, Any]], origin: str) -> None:
    """Refuse columns that are text in one row and messages in another, or neither."""
    kinds: dict[str, type] = {}
    contents: dict[tuple[str, str], type] = {}
    for number, row in enumerate(rows, start=1):
        for column, value in row.items():
            if value is None:
                continue
            messages = isinstance(value, list) and all(isinstance(v, dict) for v in value)
            if not (isinstance(value, str) or messages):
                raise ConfigurationError(
                    f"{origin}, row {number}: column {column!r} must be text or chat messages"
                )
            if kinds.setdefault(column, type(value)) is not type(value):
                raise ConfigurationError(
                    f"{origin}, row {number}: column {column!r} is text in some rows and chat "
                    "messages in others; make them alike"
                )
            for name, kind in _parts_of(value) if messages else ():
                if contents.setdefault((column, name), kind) is not kind:
                    raise ConfigurationError(
                        f"{origin}, row {number}: {name!r} in column {column!r} is of another type "
                        "than in the rows before; make them alike"
                    )


def _parts_of(messages: Any) -> Iterator[tuple[str, type]]:
    """Name and type of everything in ``messages``; numbers are of one type."""
    for message in messages:
        for name, value in message.items():
            if value is not None:
                yield name, float if type(value) is int else type(value)


def _check_columns(names: Sequence[str], encoding: Encoding) -> None:
    if "text" in names and not {"messages", "prompt"} & set(names):
        if encoding.whole:
            return
        raise ConfigurationError(
            f"{encoding.origin} has rows of 'text', and this method writes after a prompt: give "
            "'prompt', or choose sft, kd or another method without student or teacher text"
        )
    has_prompt = "messages" in names or "prompt" in names
    answers = {"messages", "completion", "reference"} & set(names)
    if not has_prompt or (encoding.completion and not answers):
        raise ConfigurationError(_missing(encoding.origin, names))


def _missing(origin: str, names: Sequence[str]) -> str:
    return (
        f"{origin} has the columns {list(names)}: rows need 'messages', or 'prompt' with "
        "'completion' (or 'reference'), or 'text'"
    )


def _without_skipped(rows: Dataset, encoding: Encoding) -> Dataset:
    kept = [i for i, ids in enumerate(rows["prompt_ids"]) if ids]
    if not kept:
        raise ConfigurationError(
            f"{encoding.origin}: every prompt is longer than max_length={encoding.max_length}"
        )
    if len(kept) < len(rows):
        count = len(rows) - len(kept)
        logger.warning("%s: %d of %d rows left out, too long", encoding.origin, count, len(rows))
    return rows.select(kept)
