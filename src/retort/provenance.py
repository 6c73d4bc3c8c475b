"""What produced an output, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from retort.disk import writing
from retort.errors import ConfigurationError

_PACKAGES = ("retort-lm", "torch", "transformers", "accelerate", "datasets", "safetensors")
_SECRET = re.compile(r"--[\w-]*(key|token|secret|password)", re.IGNORECASE)


@dataclass(frozen=True)
class Provenance:
    """The record that every run and every table leaves beside its output.

    Attributes:
        arguments: the resolved arguments of the run, as JSON values.
        seeds: every seed that was used, by its purpose.
        versions: installed version of each library that decides the numbers.
        commit: git commit of the source tree, ``None`` when installed from a wheel; a trailing
            ``+changes`` says that the tree differed from that commit.
        platform: operating system, processor, Python, number of cores.
        time: UTC start time, ISO 8601.
        command: the command line; keys, tokens and passwords are replaced by ``***``.
    """

    arguments: Mapping[str, Any]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    commit: str | None
    platform: Mapping[str, str | int]
    time: str
    command: list[str] = field(default_factory=list)

    @classmethod
    def collect(
        cls, arguments: Mapping[str, Any] | None = None, seeds: Mapping[str, int] | None = None
    ) -> Provenance:
        """Record the present process; no library is imported for it."""
        return cls(
            arguments=dict(arguments or {}),
            seeds=dict(seeds or {}),
            versions=versions(),
            commit=_commit(Path(__file__).resolve().parents[2]),
            platform=_platform(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            command=[Path(sys.argv[0]).name, *_without_secrets(sys.argv[1:])],
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """``--api-key KEY``, ``--hub_token=TOKEN`` and their like without their values."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = _SECRET.fullmatch(name) is not None
        shown.append("***" if hide else f"{name}=***" if secret and equals else argument)
        hide = secret and not equals and not hide
    return shown


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Installed version of each package by its metadata, without importing it."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as JSON so that a reader sees the old file or the new one, never a part.

    Returns:
        The path written. Values that JSON does not know are written as text.
    """

    def write(file: TextIO) -> None:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")

    return write_whole(path, write)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` in UTF-8, whole or not at all."""

    def write(file: TextIO) -> None:
        file.write(text)

    return write_whole(path, write)


def write_whole(path: str | Path, write: Callable[[TextIO], None]) -> Path:
    """Let ``write`` fill a file beside ``path``, bring it to disk, then rename it into place."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file in a device's place
        raise ConfigurationError(f"{path} is not a regular file; name another output")
    with writing(path):
        _replace(path, write)
    return path


def _replace(path: Path, write: Callable[[TextIO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        # A text of a run may hold half a surrogate pair; it is written as "?" and loses no run.
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _platform() -> dict[str, str | int]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(root: Path) -> str | None:
    """Commit of the checkout at ``root``; a wheel inside someone else's repository has none."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
