"""Prompts from files: one a line of text, or one a row of JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retort.errors import ConfigurationError

Prompt = str | list[int] | list[dict[str, Any]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``.txt`` (one prompt a line, blank lines skipped) or ``.jsonl`` / ``.json`` lines.

    A JSON row holds ``prompt`` (text or messages), ``messages`` or ``text``.

    Raises:
        ConfigurationError: no such file, no prompts in it, or a bad row; the message names it.
    """
    lines = list(enumerate(_read(path).split("\n"), start=1))  # JSON may hold U+2028
    rows = [(number, line) for number, line in lines if line.strip()]
    if not rows:
        raise ConfigurationError(f"{path} holds no prompts; give one a line")
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return [line for _, line in rows]
    return [_parse(path, number, line) for number, line in rows]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{path} line {number} is not JSON: {error}") from error
    from retort.batch.rows import prompt_of

    try:
        return prompt_of(row)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} line {number} {error}") from None
