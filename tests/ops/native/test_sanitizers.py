"""The kernel tests again on an instrumented library: address and thread sanitizers stay silent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retort.ops.native import build

HERE = Path(__file__).parent
KERNELS = (
    "linear", "attention", "elementwise", "decoder", "activation", "retention", "retnet", "scan",
    "scan_gradient", "mamba", "race",
)  # fmt: skip
OPTIONS = "halt_on_error=1:exitcode=66:detect_leaks=0:allocator_may_return_null=1"


def runtime_of(sanitizer):
    found = subprocess.run(
        ["g++", f"-print-file-name=lib{sanitizer[0]}san.so"], capture_output=True, text=True
    )
    return Path(found.stdout.strip()).resolve()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_are_clean(tmp_path, sanitizer):
    runtime = runtime_of(sanitizer)
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip(f"no {sanitizer} sanitizer")
    library = build.build(tmp_path / build.LIBRARY, sanitize=sanitizer)
    env = {
        **os.environ,
        "RETORT_NATIVE_LIBRARY": str(library),
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": OPTIONS,
        "TSAN_OPTIONS": OPTIONS,
        "OMP_NUM_THREADS": "1",
    }
    files = [str(HERE / f"test_{name}_kernel.py") for name in KERNELS]
    command = [sys.executable, "-m", "pytest", "-s", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
