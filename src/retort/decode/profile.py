"""What a pass costs by its number of tokens: measured once on the target, then kept on disk.

A profile belongs to a machine, a model, a backend and a number of threads. One that is old, of
other versions or unreadable is measured again; so is one that is measured in no time, or while
other work on the machine made times differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch

from retort.decode.packed import PackedModel
from retort.models.zoo import cache_root
from retort.provenance import versions, write_json

Profile = dict[int, float]

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64)  # close where the knee lies
_DAYS = 30
_WORTH_KEEPING = 0.5  # seconds of measuring
_SPREAD = 1.3  # most that a size's median may be of its best time, for a profile to be kept

Times = dict[int, list[float]]


def pass_profile(target: PackedModel) -> Profile:
    """Seconds of a pass by its number of tokens, from disk where they are known."""
    path = profile_path(target)
    if (known := load(path)) is not None:
        return known
    started = time.perf_counter()
    times = measure(target)
    profile = best(times)
    if time.perf_counter() - started > _WORTH_KEEPING and steady(times):
        save(path, profile)
    return profile


def measure(target: PackedModel, repeats: int = 4) -> Times:
    """Seconds of ``repeats`` passes over a scratch row, by number of tokens; sizes take turns."""
    passes, tokens = target.forward_passes, target.forward_tokens
    _seconds(target, max(_SIZES))
    rounds = [{n: _seconds(target, n) for n in _SIZES} for _ in range(repeats)]
    target.forward_passes, target.forward_tokens = passes, tokens
    return {n: [r[n] for r in rounds] for n in _SIZES}


def best(times: Times) -> Profile:
    """The best time of each size; more tokens never cost less."""
    least = {n: min(seconds) for n, seconds in times.items()}
    return {n: min(s for m, s in least.items() if m >= n) for n in least}


def steady(times: Times) -> bool:
    """Whether every size took about as long each time, as on a machine without other work."""
    return all(median(seconds) <= _SPREAD * min(seconds) for seconds in times.values())


def profile_path(target: PackedModel) -> Path:
    """Where the profile of this machine, model, backend and number of threads lies."""
    key = {
        "machine": [platform.node(), platform.machine(), os.cpu_count()],
        "model": {**target.model.config.to_diff_dict(), "_name_or_path": None},
        "dtype": str(target.model.dtype),
        "device": str(target.model.device),
        "backend": target.backend.key,
        "threads": torch.get_num_threads(),
        "versions": versions(("torch", "transformers", "retort-lm")),
    }
    text = json.dumps(key, sort_keys=True, default=str)
    return cache_root() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def load(path: Path) -> Profile | None:
    """A kept profile, or None where there is none, it is old, or it is not what `save` writes."""
    try:
        if time.time() - path.stat().st_mtime > _DAYS * 86400:
            return None
        profile = {int(n): float(s) for n, s in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    sound = set(profile) == set(_SIZES) and all(
        math.isfinite(s) and s > 0 for s in profile.values()
    )
    return profile if sound else None


def save(path: Path, profile: Profile) -> None:
    """Keep a profile; a cache that cannot be written costs the next start a measurement."""
    try:
        write_json(path, {str(n): seconds for n, seconds in profile.items()})
    except OSError:
        return


def _seconds(target: PackedModel, size: int) -> float:
    row = target.add_row()
    try:
        started = time.perf_counter()
        target.forward([(row, [0] * size)], [size], greedy=True)
        return time.perf_counter() - started
    finally:
        target.free_row(row)
