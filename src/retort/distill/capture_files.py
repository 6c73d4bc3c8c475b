"""The files of a finished capture, opened by memory map and checked before a run reads them.

Hashes tell that a capture is as it was written; that it was written right is looked at here, so
that nothing can fail, or silently go to a live teacher, in the middle of a run.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retort.distill.capture import id_type
from retort.distill.capture_facts import DIGEST_BYTES, FORMAT
from retort.distill.capture_folder import PROGRESS
from retort.errors import ConfigurationError
from retort.manifest import MANIFEST, first_fault, read_manifest

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_COUNTS = ("rows", "tokens", "vocab_size", "top_k")
_TEXTS = ("tokenizer", "data")
_TYPES = {"log_probs": torch.float16, "log_tail": torch.float32}
_TYPES |= {"offsets": torch.int64, "digests": torch.uint8}


class _Fault(Exception):
    """What is wrong with a capture: file, key, and how."""


def open_capture(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The facts of the capture in ``folder``, and its shards in the order of their rows.

    Raises ConfigurationError, naming file and key, for one that cannot be read as it stands.
    """
    facts = read_manifest(folder) if folder.is_dir() else None
    if facts is None:
        reason = "is not finished" if (folder / PROGRESS).is_file() else "holds no capture"
        raise ConfigurationError(f"{folder} {reason}: run `retort capture` on it (again)")
    if facts.get("format") != FORMAT:
        raise ConfigurationError(
            f"{folder} holds no capture of format {FORMAT}: run `retort capture` into a new folder"
        )
    try:
        _check_facts(facts)
        return facts, _open_shards(folder, facts)
    except _Fault as fault:
        raise ConfigurationError(
            f"{folder} is damaged: {fault}; delete it and capture again"
        ) from fault


def _check_facts(facts: dict[str, Any]) -> None:
    for key in _COUNTS:
        if type(facts.get(key)) is not int or facts[key] < 1:
            raise _Fault(f"{MANIFEST} has {key}={facts.get(key)!r}, not a number of at least 1")
    for key in _TEXTS:
        if not isinstance(facts.get(key), str):
            raise _Fault(f"{MANIFEST} has {key}={facts.get(key)!r}, not a hash")


def _open_shards(folder: Path, facts: dict[str, Any]) -> list[Any]:
    names = sorted(facts["files"], key=lambda name: (len(name), name))
    for name in names:
        if not _SHARD.fullmatch(name) or (folder / name).is_symlink():
            raise _Fault(f"{name!r} is no shard of its own")
    if (fault := first_fault(folder, full=True)) is not None:
        raise _Fault(fault)
    shards = [_open(folder / name) for name in names]
    parts = [_tensors(*pair, facts) for pair in zip(names, shards, strict=True)]
    _check_sums(parts, facts)
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _Fault(f"{path.name} cannot be read ({error})") from error


def _tensors(name: str, shard: Any, facts: dict[str, Any]) -> dict[str, Tensor]:
    """A shard's tensors, mapped and not copied, if they fit each other and the facts."""
    types = {"ids": id_type(facts["vocab_size"]), **_TYPES}
    if missing := types.keys() - set(shard.keys()):
        raise _Fault(f"{name} lacks {min(missing)!r}")
    parts = {key: shard.get_tensor(key) for key in types}
    rows, tokens = (next(iter(parts[key].shape), 0) for key in ("digests", "ids"))
    kept = min(facts["top_k"], facts["vocab_size"])
    shapes = {"ids": (tokens, kept), "log_probs": (tokens, kept), "log_tail": (tokens,)}
    shapes |= {"offsets": (rows + 1,), "digests": (rows, DIGEST_BYTES)}
    for key, tensor in parts.items():
        if (tensor.dtype, tensor.shape) != (types[key], shapes[key]):
            found, wanted = (tensor.dtype, tuple(tensor.shape)), (types[key], shapes[key])
            raise _Fault(f"{name} has {key!r} as {found}, not {wanted}")
    _check_values(name, parts, facts["vocab_size"])
    return parts


def _check_values(name: str, parts: dict[str, Tensor], vocab_size: int) -> None:
    ids, offsets = parts["ids"].numpy(), parts["offsets"]
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise _Fault(f"{name} has 'ids' beyond the vocabulary of {vocab_size}")
    if offsets[0] != 0 or offsets[-1] != len(ids) or (offsets.diff() < 0).any():
        raise _Fault(f"{name} has 'offsets' that do not divide its {len(ids)} tokens into rows")


def _check_sums(parts: list[dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """The shards together hold the rows that the manifest names, and no others."""
    digests, tokens = (sum(len(p[key]) for p in parts) for key in ("digests", "ids"))
    for key, found in ("rows", digests), ("tokens", tokens):
        if found != facts[key]:
            raise _Fault(f"{MANIFEST} has {key}={facts[key]}, its shards hold {found}")
    data = hashlib.sha256()
    for part in parts:
        data.update(part["digests"].numpy().tobytes())
    if data.hexdigest() != facts["data"]:
        raise _Fault(f"the 'digests' of its shards are not those of 'data' in {MANIFEST}")
