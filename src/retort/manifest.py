"""Folders whose content is known: a hash for each file, and a stamp that makes checks cheap.

`write_manifest` records the SHA-256 of every file. `first_fault` compares sizes and times with
the stamp of the last full check, and hashes only when they differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from retort.provenance import write_json

MANIFEST = "retort_manifest.json"
STAMP = ".retort_stamp.json"

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_RECORDS = ("provenance", "trainer_state", "corrections", "evaluation", "retort_", ".", "samples")


def write_manifest(
    folder: Path, about: Mapping[str, Any] | None = None, skip: Collection[str] = ()
) -> None:
    """Write the manifest of ``folder`` with the facts ``about`` it, then its stamp.

    Files named in ``skip`` do not belong to the content.
    """
    hashes = {name: sha256(folder / name) for name in _names(folder) if name not in skip}
    write_json(folder / MANIFEST, {**(about or {}), "files": hashes})
    _write_stamp(folder, list(hashes))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``, ``None`` when it is missing or unreadable."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    well_formed = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if well_formed else None


def first_fault(folder: Path, full: bool = False) -> str | None:
    """Say what is wrong with ``folder``, ``None`` when it is as its manifest says.

    Args:
        folder: a folder written with `write_manifest`.
        full: hash every file even where size and times are those of the last full check.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    files: dict[str, str] = manifest["files"]
    if outside := [name for name in files if leaves(name)]:
        return f"its manifest names {outside[0]!r}, which is not in it"
    if not full and _stamp_fits(folder, list(files)):
        return None
    fault = _hash_fault(folder, files)
    # A read-only folder keeps its old stamp and is hashed again next time.
    with contextlib.suppress(OSError):
        if fault is None:
            _write_stamp(folder, list(files))
        else:
            (folder / STAMP).unlink(missing_ok=True)
    return fault


def leaves(name: str) -> bool:
    """Whether ``name``, of a manifest, leads out of the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hashes(folder: Path) -> dict[str, str]:
    """Hashes of what decides a model's texts: weights, configuration, tokenizer."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _MODEL_FILES)
    return {p.name: sha256(p) for p in files if not p.name.startswith(_RECORDS)}


def _hash_fault(folder: Path, files: Mapping[str, str]) -> str | None:
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} does not have the hash of its manifest"
    return None


def _names(folder: Path) -> list[str]:
    known = {MANIFEST, STAMP}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in known)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _facts(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _write_stamp(folder: Path, names: list[str]) -> None:
    facts = {name: _facts(folder / name) for name in names}
    write_json(folder / STAMP, {"manifest": sha256(folder / MANIFEST), "files": facts})


def _stamp_fits(folder: Path, names: list[str]) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        facts = {name: _facts(folder / name) for name in names}
        return stamp == {"manifest": sha256(folder / MANIFEST), "files": facts}
    except (OSError, ValueError):
        return False
