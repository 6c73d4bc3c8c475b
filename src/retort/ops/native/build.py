"""Compile the native core with whatever C++ compiler there is; standard library only.

`setup.py` loads this file by its path, the loader imports it: both build the same library. It is
linked against no OpenMP runtime: the loader lets it use the one that torch brought (`runtime.py`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libretort.so"

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
_ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


class BuildError(Exception):
    """No compiler, or it failed; the message holds what it said."""


def digest() -> str:
    """Name of the present sources; a built library carries the one it was built from."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"), Path(__file__)])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def build(target: Path, sanitize: str | None = None) -> Path:
    """Compile the library to ``target``, which appears whole or not at all.

    Args:
        target: path of the shared library.
        sanitize: ``"address"`` or ``"thread"``: the tests' instrumented build, with standard
            threads in place of OpenMP.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = _compile(Path(scratch), _thread_flags(sanitize))
        os.replace(built, target)
    return target


def _thread_flags(sanitize: str | None) -> list[str]:
    if sanitize is None:
        return ["-fopenmp"]
    return [f"-fsanitize={sanitize}", "-g", "-DRETORT_STD_THREADS", "-fexceptions"]


def _compile(scratch: Path, threads: list[str]) -> Path:
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    common = [*_FLAGS, *threads, *(["-DRETORT_X86"] if x86 else [])]
    objects = [scratch / "core.o"]
    _run([*common, f'-DRETORT_SOURCES="{digest()}"', "-c", SOURCES / "core.cpp", "-o", objects[0]])
    for isa, flags in _ISA_FLAGS.items():
        if x86 or not flags:
            objects.append(scratch / f"{isa}.o")
            isa_flags = [*flags, f"-DRETORT_ISA={isa}"]
            _run([*common, *isa_flags, "-c", SOURCES / "kernels.cpp", "-o", objects[-1]])
    link = [flag for flag in threads if flag.startswith("-fsanitize")]
    _run(["-shared", "-Wl,--as-needed", *link, *objects, "-o", scratch / LIBRARY])
    return scratch / LIBRARY


def _run(arguments: list[str | Path]) -> None:
    command = [_compiler(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler found; install g++ or set CXX")
