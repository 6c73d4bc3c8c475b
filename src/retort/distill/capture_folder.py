"""The folder of a capture in the making: claimed, written shard by shard, gone on with, finished.

A shard is written beside and renamed; its hash is noted at once. Another run goes on at the first
shard that is missing or damaged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from retort.errors import ConfigurationError
from retort.manifest import first_fault, read_manifest, sha256, write_manifest
from retort.provenance import Provenance, write_json
from retort.train.checkpoint import LOCK

PROGRESS = "capture.partial.json"
PROVENANCE = "provenance.json"


def is_finished(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a whole capture of these facts is there.

    Raises ConfigurationError for one of other facts, or a damaged one.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return False
    require_same(folder, manifest, facts)
    fault = first_fault(folder, full=True)
    if fault is not None:
        raise ConfigurationError(f"{folder} is damaged: {fault}; delete it and capture again")
    (folder / PROGRESS).unlink(missing_ok=True)
    return True


def begin(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Hashes of the shards that are there; claims an empty folder."""
    before = begun(folder)
    if before is not None:
        require_same(folder, before, facts)
        return before["shards"]
    write_json(folder / PROGRESS, {**facts, "shards": {}})
    return {}


def begun(folder: Path) -> dict[str, Any] | None:
    """What an unfinished capture has noted, None where there is none."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        return {**before, "shards": dict(before["shards"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{path} is damaged: delete {folder}") from error


def require_ours(folder: Path) -> None:
    """Refuse a folder of something else, before anything is put there."""
    if not folder.is_dir() or (folder / PROGRESS).is_file():
        return
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty and holds no capture: name another folder")


def require_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a capture, finished or not, of other facts."""
    for key, value in now.items():
        if before.get(key) != value:
            raise ConfigurationError(
                f"{folder} holds a capture with {key}={before.get(key)!r}, this one has "
                f"{value!r}: name another folder, or give the same inputs"
            )


def is_whole(path: Path, expected: str | None) -> bool:
    """Whether a shard is there with the hash that was noted."""
    return expected is not None and path.is_file() and sha256(path) == expected


def add_shard(
    folder: Path, facts: dict[str, Any], done: dict[str, str], shard: str, tensors: dict
) -> None:
    """Write a shard, then note its hash, in ``done`` too."""
    _write_shard(folder / shard, tensors)
    done[shard] = sha256(folder / shard)
    write_json(folder / PROGRESS, {**facts, "shards": done})


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:  # `save_file` would leave a file of its own when killed
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def finish(folder: Path, facts: dict[str, Any]) -> Path:
    """Put the manifest in the notes' place: the capture is whole."""
    for left in folder.glob(".*.partial"):
        left.unlink()
    provenance = Provenance.collect({k: v for k, v in facts.items() if k != "versions"})
    write_json(folder / PROVENANCE, provenance.to_dict())
    write_manifest(folder, facts, skip=(PROGRESS, PROVENANCE, LOCK))
    (folder / PROGRESS).unlink()
    return folder
