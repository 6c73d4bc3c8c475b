"""Native core for CPUs: packed linears, ragged attention and single-pass element work.

The library is plain C++ called on tensor addresses. It is built with the package, or on first use
into the user's cache when it is missing or older than its sources; where neither works `available`
is False, one warning says why, and the PyTorch twins do the work.

Environment: ``RETORT_CPU_ISA`` = ``portable`` | ``avx2`` | ``avx512`` forces an instruction set,
``RETORT_NATIVE=0`` turns the core off, ``RETORT_CACHE`` moves the user's cache, and
``RETORT_NATIVE_LIBRARY`` names another build of the same sources (an instrumented one).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from retort.errors import ConfigurationError
from retort.ops.native import abi, build, runtime

ISAS = ("avx512", "avx2", "portable")


class _State:
    isa: str | None = None


def available() -> bool:
    """Whether the native core can be used in this process."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Why the native core cannot be used, or None."""
    return _load()[1]


def isa() -> str | None:
    """Instruction set in use: ``avx512``, ``avx2``, ``portable``, or None without the core."""
    return _State.isa if available() else None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        ConfigurationError: the native core is not available.
    """
    found, reason = _load()
    if found is None:
        raise ConfigurationError(f"the native core is not available ({reason}); use the torch one")
    return found


def supported_isas() -> list[str]:
    """Instruction sets that this processor has, best first."""
    lib, before = library(), isa()
    found = [name for name in ISAS if lib.retort_select(name.encode())]
    _select(lib, before)
    return found


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use another instruction set inside the block; packed weights serve all of them.

    Raises:
        ConfigurationError: this processor lacks it.
    """
    lib, before = library(), isa()
    if not _select(lib, name):
        raise ConfigurationError(f"this processor has no {name!r}; choose from {supported_isas()}")
    try:
        yield
    finally:
        _select(lib, before)


def _select(lib: ctypes.CDLL, name: str | None) -> bool:
    chosen = bool(name and lib.retort_select(name.encode()))
    if chosen:
        _State.isa = name
    return chosen


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("RETORT_NATIVE", "1") == "0":
        return None, "RETORT_NATIVE=0"
    try:
        reason = runtime.share_torch_runtime()
        if reason is None:
            lib = _open_or_build()
            abi.declare(lib)
            _choose_isa(lib)
            return lib, None
    except (OSError, build.BuildError) as error:
        reason = str(error)
    warnings.warn(f"native core not used: {reason}; PyTorch does its work", stacklevel=3)
    return None, reason


def _open_or_build() -> ctypes.CDLL:
    digest = build.digest()
    cache = Path(os.environ.get("RETORT_CACHE") or Path.home() / ".cache" / "retort")
    cached = cache / "native" / digest / build.LIBRARY
    named = os.environ.get("RETORT_NATIVE_LIBRARY")
    for path in (Path(named),) if named else (build.SOURCES / build.LIBRARY, cached):
        if path.exists() and (lib := _open(path, digest)):
            return lib
    if named:
        raise OSError(f"RETORT_NATIVE_LIBRARY={named} was not built from these sources")
    lib = _open(build.build(cached), digest)
    if lib is None:
        raise OSError(f"{cached} does not match its sources; remove it")
    return lib


def _open(path: Path, digest: str) -> ctypes.CDLL | None:
    """The library at ``path``, or None if it is damaged or was built from other sources."""
    try:
        lib = ctypes.CDLL(str(path))
        lib.retort_sources.restype = ctypes.c_char_p
        matches = lib.retort_sources() == digest.encode()
    except (OSError, AttributeError):
        return None
    return lib if matches else None


def _choose_isa(lib: ctypes.CDLL) -> None:
    forced = os.environ.get("RETORT_CPU_ISA")
    if forced and not _select(lib, forced):
        raise ConfigurationError(
            f"RETORT_CPU_ISA={forced} is not supported by this processor; choose from {ISAS}"
        )
    if not forced:
        next(name for name in ISAS if _select(lib, name))
