"""Checkpoints that are complete or absent, whatever kills the process.

A checkpoint is filled in a hidden sibling folder, given a manifest with the hash of every file,
brought to disk, and renamed. Resuming takes the newest folder whose files match its manifest, and
refuses one that brings what is not ours (see `foreign`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from retort.errors import ConfigurationError
from retort.manifest import first_fault, write_manifest
from retort.train.foreign import refuse_strange, refuse_unreadable

logger = logging.getLogger(__name__)

STATE = "run_state.json"
TENSORS = "run_state.safetensors"
LOCK = ".lock"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial"
_SCHEDULER = "scheduler.pt"


def newest(folder: str | Path, full: bool = True) -> Path | None:
    """The newest complete checkpoint in ``folder``; broken ones are passed over with a warning.

    Without ``full`` files that look as they did when they were hashed are not hashed again. Raises
    ConfigurationError for one that brings what is not ours.
    """
    for path in sorted(_all(Path(folder)), key=step_of, reverse=True):
        fault = _fault(path, full)
        if fault is None:
            return path
        logger.warning("%s is not complete (%s); an older one is looked for", path, fault)
    return None


def require(path: str | Path, full: bool = True) -> Path:
    """``path`` if it is a complete checkpoint (see `newest`).

    Raises ConfigurationError naming the fault.
    """
    fault = _fault(Path(path), full)
    if fault is not None:
        raise ConfigurationError(f"cannot resume from {path}: {fault}")
    return Path(path)


def step_of(path: str | Path) -> int:
    """The optimiser step in a checkpoint's name. Raises ConfigurationError for another name."""
    found = _NAME.fullmatch(Path(path).name)
    if found is None:
        raise ConfigurationError(f"{path} is not named like a checkpoint (checkpoint-100)")
    return int(found[1])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes; may be nested. The system frees a killed one's.

    Raises ConfigurationError at once where another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigurationError(
            f"another run is writing to {folder}: wait for it, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold one file that runs share, waiting for another process that holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_name(f".{file.name}{LOCK}"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s is held by another run: waiting for it", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder`` to fill; removed when filling it fails."""
    place = folder / f".checkpoint{_PARTIAL}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def publish(filled: Path, final: Path) -> None:
    """Hash ``filled``, bring it to disk and rename it to ``final`` (a broken one gives way)."""
    write_manifest(filled, {"step": step_of(final)})
    for path in sorted(filled.rglob("*")):
        _sync(path)
    _sync(filled)
    if final.exists():
        shutil.rmtree(final)
    os.rename(filled, final)
    _sync(final.parent)


def clean(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest ``limit`` checkpoints (None or 0: all) and the best one."""
    paths = sorted(_all(folder), key=step_of)
    surplus = len(paths) - limit if limit else 0
    for path in [p for p in paths[:-1] if best is None or p.resolve() != Path(best).resolve()]:
        if surplus <= 0:
            return
        shutil.rmtree(path, ignore_errors=True)
        surplus -= 1


def save_state(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a trainer's own state as JSON and safetensors."""
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    if tensors:
        save_file(dict(tensors), folder / TENSORS)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_state` wrote."""
    tensors = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    return json.loads((folder / STATE).read_text(encoding="utf-8")), tensors


def check_same_run(folder: str | Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on from ``folder`` as another run than the one whose choices it holds.

    Raises ConfigurationError naming the first choice that differs, its old and its new value. A
    choice that was not kept yet when the checkpoint was written is not compared.
    """
    before = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))["fixed"]
    for name, value in plain(now).items():
        if name in before and before[name] != value:
            raise ConfigurationError(
                f"{folder} was made with {name}={before[name]!r}, this run has {value!r}: "
                "choose another output_dir, or the same arguments"
            )


def require_optimizer(folder: str | Path) -> None:
    """Refuse to train on from a checkpoint of weights alone: the optimiser would start anew.

    Raises ConfigurationError.
    """
    if not (Path(folder) / _SCHEDULER).is_file():
        raise ConfigurationError(
            f"{folder} holds no optimiser (save_only_model): training cannot go on from it; "
            "choose another output_dir"
        )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON gives them back; what it does not know (a dtype) by its name."""
    return dict(json.loads(json.dumps(dict(values), default=str)))


def replace_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` into ``target``, each replaced in one step."""
    for path in sorted(source.iterdir()):
        _sync(path)
        os.replace(path, target / path.name)
    _sync(target)
    source.rmdir()


def _fault(path: Path, full: bool) -> str | None:
    """`first_fault` of a checkpoint that holds nothing foreign."""
    refuse_strange(path)
    fault = first_fault(path, full=full)
    if fault is None:
        refuse_unreadable(path)
    return fault


def _all(folder: Path) -> list[Path]:
    found = folder.glob("checkpoint-*") if folder.is_dir() else iter(())
    return [path for path in found if path.is_dir() and _NAME.fullmatch(path.name)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
