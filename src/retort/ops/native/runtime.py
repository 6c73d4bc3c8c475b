"""The OpenMP runtime that torch brought, offered to the native core so that both share it.

A second runtime in the process makes native and torch calls 10 to 30 times slower in alternation,
because the idle threads of one spin while the other works.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_RUNTIMES = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that are loaded into this process, hashed names included."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if _RUNTIMES.search(path))


def share_torch_runtime() -> str | None:
    """Make the symbols of torch's OpenMP runtime visible to libraries loaded from now on.

    Returns:
        None, or why it cannot be shared.
    """
    torch.get_num_threads()  # torch has loaded its runtime with itself
    runtimes = openmp_runtimes()
    if len(runtimes) != 1:
        found = ", ".join(runtimes) or "none"
        return f"one OpenMP runtime is needed in the process, found: {found}"
    ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
    return None
