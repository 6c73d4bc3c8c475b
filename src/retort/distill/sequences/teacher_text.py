"""Texts that the teacher writes, once each, for sequence-level distillation (arXiv 1606.07947).

They are kept in a JSONL file, so that a resumed run, another epoch and other runs (methods,
seeds, learning rates) read them instead of writing them again. Runs may share it at one time: it is
locked while it is read and while texts are added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.disk import writing
from retort.errors import ConfigurationError
from retort.train.checkpoint import held

Ids = list[int]
Write = Callable[[Sequence[Ids]], Sequence[Ids]]
"""Completions of prompts, in order; each at least one token."""


class TeacherTexts:
    """Completions by prompt, written by ``write`` when they are first asked for.

    Args:
        write: how the teacher writes.
        path: the file that keeps them; None keeps them in memory only.
        made_by: what they depend on (teacher, limits), its file's first line.

    Raises:
        ConfigurationError: the file was made by something else, or a line of it is damaged.
    """

    def __init__(self, write: Write, path: Path | None, made_by: Mapping[str, Any]) -> None:
        self._write, self._path, self._made_by = write, path, dict(made_by)
        self._known: dict[tuple[int, ...], Ids] = {}
        if path is not None and path.is_file():
            with held(path):
                self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def of(self, prompts: Sequence[Ids]) -> list[Ids]:
        """The completion of each prompt; those that are not known yet are written together."""
        asked = dict.fromkeys(map(tuple, prompts))
        new = [list(prompt) for prompt in asked if prompt not in self._known]
        if new:
            made = [list(text) for text in self._write(new)]
            self._known |= {tuple(p): text for p, text in zip(new, made, strict=True)}
            self._append(new, made)
        return [self._known[tuple(prompt)] for prompt in prompts]

    def _append(self, prompts: Sequence[Ids], texts: Sequence[Ids]) -> None:
        if self._path is None:
            return
        pairs = zip(prompts, texts, strict=True)
        rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
        with writing(self._path), held(self._path):
            lines: list[Mapping[str, Any]] = [] if self._path.exists() else [self._made_by]
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in [*lines, *rows]))
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        *lines, rest = content.split(b"\n")  # a killed process may leave half a line
        if not lines and json.dumps(self._made_by).encode().startswith(rest):
            path.unlink()
            return
        self._check(_first(lines))
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                self._known[tuple(row["prompt"])] = list(row["completion"])
            except (ValueError, KeyError, TypeError):
                raise ConfigurationError(
                    f"{path}, line {number} is no teacher text: delete the file to write it again"
                ) from None
        os.truncate(path, len(content) - len(rest))  # not before all of it is known to be ours

    def _check(self, found: Mapping[str, Any]) -> None:
        for name, value in self._made_by.items():
            if found.get(name) != value:
                raise ConfigurationError(
                    f"{self._path} was made with {name}={found.get(name)!r}, this run has "
                    f"{value!r}: choose another teacher_text_file, or the same arguments"
                )


def _first(lines: Sequence[bytes]) -> dict[str, Any]:
    """The first line's object; nothing of ours where it is none."""
    try:
        found = json.loads(lines[0])
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}
