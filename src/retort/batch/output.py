"""The output file of a batch: whole rows are appended, and a run that was killed goes on there."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

from retort.batch.rows import asked, key
from retort.errors import ConfigurationError
from retort.provenance import Provenance, write_json

_SYNC_SECONDS = 5.0


class Sink(Protocol):
    """Takes output rows."""

    done: Mapping[str, str]

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """No more rows come."""
        ...


class StandardOutput:
    """Rows on standard output; nothing can be taken up again there."""

    done: Mapping[str, str] = MappingProxyType({})

    def write(self, row: Mapping[str, Any]) -> None:
        """Print one row and let it go."""
        sys.stdout.buffer.write(_line(row))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Nothing to do."""


class OutputFile:
    """A JSON Lines file that grows row by row.

    The options of a run lie beside it; a file that was made with others, or by something else, is
    not touched. One run at a time holds it.

    Args:
        path: the file; its folder must exist.
        options: what must be equal for a run to go on.
        arguments: for the provenance record.
        overwrite: begin anew, whatever is there.

    Raises:
        ConfigurationError: the file cannot be written, is another run's, or is in use.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        arguments: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self._file = _open(path)
        self._record = path.with_name(path.name + ".provenance.json")
        self._synced = time.monotonic()
        try:
            if overwrite:
                self._file.truncate(0)
            size = self._file.seek(0, os.SEEK_END)
            if size:
                self._check(options)
            self.done: Mapping[str, str] = self._read() if size else {}
            record = Provenance.collect({**arguments, "resumes_with": dict(options)})
            write_json(self._record, record.to_dict())
        except BaseException:
            self._file.close()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row with a single write.

        Raises:
            ConfigurationError: the disk is full or gone; rows before this one are safe.
        """
        try:
            data = _line(row)
            while data:  # a file without buffers may take a part
                data = data[self._file.write(data) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {self.path}: {error.strerror}; the rows before are there, and the "
                "same command goes on after them"
            ) from None

    def close(self) -> None:
        """Bring the rows to disk and let the file go."""
        try:
            self._sync()
        finally:
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _check(self, options: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._record.read_text("utf-8"))["arguments"]["resumes_with"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigurationError(
                f"{self.path} exists and was not written by `retort generate`: name another "
                "--output, or replace it with --overwrite"
            ) from None
        now = json.loads(json.dumps(dict(options), default=str))
        if changed := [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]:
            name = changed[0]
            raise ConfigurationError(
                f"{self.path} was begun with {name}={before.get(name)!r}, now it is "
                f"{now.get(name)!r}: name another --output, or begin anew with --overwrite"
            )

    def _read(self) -> dict[str, str]:
        """Ids of the rows that are there, with hashes of their prompts.

        A last line without its end is cut off.
        """
        self._file.seek(0)
        found, whole = dict[str, str](), 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            found |= _known(self.path, number, line)
        self._file.truncate(whole)
        return found


def _open(path: Path) -> BinaryIO:
    special = path.exists() and not path.is_file()
    if special or not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--output {path}: it must be a file in a folder that exists")
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise ConfigurationError(f"--output {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigurationError(f"--output {path} is being written by another run") from None
    return file


def _known(path: Path, number: int, line: bytes) -> dict[str, str]:
    """A row's id, with the hash of its prompt where it has one."""
    try:
        row = json.loads(line)
        if "custom_id" in row:
            return {key(row["custom_id"]): row["id"].removeprefix("batch-")}
        return {key(row["id"]): asked(row["prompt"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigurationError(
            f"{path} line {number} is not an output row: name another --output, or begin anew "
            "with --overwrite"
        ) from None


def _line(row: Mapping[str, Any]) -> bytes:
    """A row in UTF-8; one whose id holds half a surrogate pair in ASCII, so that it is found."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()
