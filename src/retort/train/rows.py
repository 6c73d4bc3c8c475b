"""Reading rows of a data set: JSONL by ourselves, so that errors name the row; else `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.errors import ConfigurationError

if TYPE_CHECKING:
    from datasets import Dataset


def named_file(name: str, split: str = "train", suffix: str = ".jsonl") -> Path | None:
    """The file that ``name`` is, where it ends in ``suffix``, else None.

    Raises ConfigurationError when a file of a kind that we read is not there, or a single file
    is asked for another split than "train".
    """
    path = Path(name).expanduser()
    if path.suffix in (suffix, ".jsonl", ".json", ".parquet") and not path.is_file():
        raise ConfigurationError(f"dataset_name: there is no file {name}")
    if path.suffix != suffix:
        return None
    if split != "train":
        raise ConfigurationError(
            f"{name} is one file and has no split {split!r}: leave the split out"
        )
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file. Raises ConfigurationError naming the row that is none."""
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows writes a mark before the first row
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_parsed(line, f"{path.name}, row {number}"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path.name} is not UTF-8 text: {error.reason}") from error
    return rows


def load_named(name: str, split: str, config: str | None = None) -> Dataset:
    """A JSON or Parquet file, a folder, a data set on disk, or one of the hub."""
    path = Path(name).expanduser()
    from datasets import load_dataset, load_from_disk

    try:
        if path.suffix in (".json", ".parquet"):
            kind = path.suffix[1:]
            return load_dataset(kind, data_files={split: str(path)}, split=split)
        if (path / "state.json").is_file():
            return load_from_disk(str(path))
        return load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except Exception as error:  # datasets raises whatever its readers raise
        text = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConfigurationError(f"cannot read the dataset {name!r}: {text}") from error


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once_each)
        if "\\ud" in line.lower():  # half a surrogate pair, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{where}: a lone surrogate is no Unicode text; check how the text was decoded"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ConfigurationError(f"{where}: expected an object with named columns")
    return row


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two, one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} twice")
    return made
