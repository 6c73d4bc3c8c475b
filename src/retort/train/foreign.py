"""What a checkpoint must not bring: links, names that leave it, weights that are pickles, code.

A manifest tells a damaged checkpoint from a whole one, not ours from one that was made to fit. So
this is looked at before training goes on from one, and nothing in it is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from retort.errors import ConfigurationError
from retort.manifest import leaves, read_manifest

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_UNREAD = "training_args.bin"
# What transformers saves beside the weights and, sharded, as weights: read as bare tensors only.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|(optimizer|pytorch_model_fsdp)\.bin"
)


def refuse_strange(folder: Path) -> None:
    """Raise ConfigurationError for a link, a name out of ``folder`` or weights as a pickle.

    No file is read but those that name others.
    """
    for name in _names(folder):
        if leaves(name):
            _refuse(folder, f"its manifest or index names {name!r}, which is not in it")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _refuse(folder, f"{name} is a link")
        if path.suffix in _PICKLES and not _STATE.fullmatch(name) and name != _UNREAD:
            _refuse(folder, f"{name} is a pickle, which can run code")


def refuse_unreadable(folder: Path) -> None:
    """Raise ConfigurationError for states and weights that cannot be read as bare tensors.

    They are mapped, not read: this takes as long for large ones as for small ones.
    """
    for path in _files(folder):
        try:
            _open(path)
        except Exception as error:  # whatever an unpickler makes of bytes that it was not made for
            kind = "bare tensors" if _STATE.fullmatch(path.name) else "safetensors"
            reason = f"{path.name} does not hold {kind} ({type(error).__name__})"
            _refuse(folder, reason, error)


def _names(folder: Path) -> Iterator[str]:
    """Files that the manifest and the indices of weights name."""
    yield from (read_manifest(folder) or {"files": {}})["files"]
    for index in folder.glob("*.index.json"):
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
            content = json.loads(index.read_text(encoding="utf-8"))
            yield from map(str, content["weight_map"].values())


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" or _STATE.fullmatch(path.name):
            yield path


def _open(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            file.keys()
        return
    with safe_globals() if path.name.startswith("rng_state") else nullcontext():
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _refuse(folder: Path, reason: str, cause: Exception | None = None) -> None:
    raise ConfigurationError(
        f"cannot resume from {folder}: {reason}; delete it, or choose another checkpoint"
    ) from cause
