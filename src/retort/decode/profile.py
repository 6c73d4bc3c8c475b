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
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from retort.decode.packed import PackedModel
from retort.decode.support import max_length
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
    path, whole = profile_path(target), sizes(target)
    if (known := load(path, whole)) is not None:
        return known
    started = time.perf_counter()
    times = measure(target)
    profile = best(times)
    slow = time.perf_counter() - started > _WORTH_KEEPING
    if slow and len(times) == len(whole) and steady(times):
        save(path, profile)
    return profile


def sizes(target: PackedModel) -> tuple[int, ...]:
    """The numbers of tokens to measure: what a row of the target can hold."""
    limit = max_length(target.model.config)
    return tuple(n for n in _SIZES if limit is None or n <= limit)


def measure(target: PackedModel, repeats: int = 4) -> Times:
    """Seconds of ``repeats`` passes over a scratch row, by number of tokens; sizes take turns.

    Passes too long for the memory that is left are not measured.
    """
    passes, tokens = target.forward_passes, target.forward_tokens
    try:
        largest = next((n for n in reversed(sizes(target)) if _works(target, n)), 0)
        measured = [n for n in sizes(target) if n <= largest]
        rounds = [{n: _seconds(target, n) for n in measured} for _ in range(repeats)]
    finally:
        target.forward_passes, target.forward_tokens = passes, tokens
    return {n: [r[n] for r in rounds] for n in measured}


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


def load(path: Path, whole: Sequence[int] = _SIZES) -> Profile | None:
    """A kept profile of ``whole``; None where there is none, it is old, or no work of `save`."""
    try:
        if time.time() - path.stat().st_mtime > _DAYS * 86400:
            return None
        profile = {int(n): float(s) for n, s in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    sound = set(profile) == set(whole) and all(math.isfinite(s) and s > 0 for s in profile.values())
    return profile if sound else None


def save(path: Path, profile: Profile) -> None:
    """Keep a profile; a cache that cannot be written costs the next start a measurement."""
    try:
        write_json(path, {str(n): seconds for n, seconds in profile.items()})
    except OSError:
        return


def _works(target: PackedModel, size: int) -> bool:
    """Whether a pass of so many tokens goes through; it warms up as well."""
    try:
        return _seconds(target, size) >= 0
    except Exception:  # whatever a device raises where memory runs out
        return False


def _seconds(target: PackedModel, size: int) -> float:
    row = target.add_row()
    try:
        started = time.perf_counter()
        target.forward([(row, [0] * size)], [size], greedy=True)
        return time.perf_counter() - started
    finally:
        target.free_row(row)
