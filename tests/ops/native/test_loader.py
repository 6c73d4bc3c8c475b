"""Building, loading, the shared OpenMP runtime, and life without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from time import perf_counter

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.linear import packed_linear
from retort.ops.native import abi, build, runtime
from retort.ops.panels import pack

needs_core = pytest.mark.skipif(not native.available(), reason="no native core")

ASK = (
    "import warnings; warnings.simplefilter('always');"
    "from retort.ops import native; print(native.available(), native.isa())"
)


def ask(**environment):
    """What a fresh process says about the core."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=False
    )


@needs_core
def test_one_openmp_runtime_serves_torch_and_the_core(python):
    code = "from retort.ops.native import library, runtime; library(); import json;"
    assert len(json.loads(python(code + "print(json.dumps(runtime.openmp_runtimes()))"))) == 1
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert native.library().retort_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@needs_core
def test_alternating_with_torch_costs_nothing_like_a_second_runtime():
    weight, x = pack(torch.randn(512, 512)), torch.randn(8, 512)
    square = torch.randn(256, 256)

    def best(step):
        times = []
        for _ in range(30):
            start = perf_counter()
            step()
            times.append(perf_counter() - start)
        return min(times)

    ours, theirs = best(lambda: packed_linear(x, weight)), best(lambda: square @ square)
    both = best(lambda: (packed_linear(x, weight), square @ square))
    assert both < 4 * (ours + theirs)


def test_a_second_runtime_is_refused_with_its_path(monkeypatch):
    monkeypatch.setattr(runtime, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libomp.so"])
    assert "/b/libomp.so" in runtime.share_torch_runtime()


def test_hashed_runtime_names_are_recognised():
    for name in ("libgomp.so.1", "libgomp-24e2ab19.so.1.0.0", "libiomp5.so", "libomp.so"):
        assert runtime._RUNTIMES.search(f"/x/torch.libs/{name}")
    assert not runtime._RUNTIMES.search("/x/libcompute.so")


@needs_core
def test_structures_match_the_header():
    header = (build.SOURCES / "api.h").read_text()
    for struct in (abi.Linear, abi.Rows, abi.Heads, *abi.CALLS.values()):
        body = header.split(f"struct Retort{struct.__name__} {{")[1].split("};")[0]
        code = " ".join(line.split("//")[0] for line in body.splitlines())
        declared = [
            name.split()[-1].lstrip("*")
            for statement in code.split(";")
            for name in statement.split(",")
            if name.strip()
        ]
        assert declared == [name for name, _ in struct._fields_]


@needs_core
def test_the_instruction_set_can_be_forced():
    assert ask(RETORT_CPU_ISA="portable").stdout.split() == ["True", "portable"]
    failed = ask(RETORT_CPU_ISA="quantum")
    assert failed.returncode and "RETORT_CPU_ISA" in failed.stderr
    with pytest.raises(ConfigurationError, match="quantum"), native.use_isa("quantum"):
        pass


def test_without_compiler_and_library_one_warning_and_the_twin(tmp_path):
    answer = ask_without_library(tmp_path, PATH="/nonexistent", CXX="")
    assert answer.stdout.split() == ["False", "None"]
    assert answer.stderr.count("native core not used") == 1


def test_the_core_can_be_turned_off():
    answer = ask(RETORT_NATIVE="0")
    assert answer.stdout.split() == ["False", "None"] and "native core" not in answer.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_stale_library_is_built_again(tmp_path):
    package = copy_package(tmp_path)
    stale = package / "ops" / "native" / build.LIBRARY
    build.build(stale)
    with (package / "ops" / "native" / "core.cpp").open("a") as source:
        source.write("// newer\n")
    answer = ask(PYTHONPATH=str(tmp_path), RETORT_CACHE=str(tmp_path / "cache"))
    assert answer.stdout.split()[0] == "True", answer.stderr
    assert len(list((tmp_path / "cache" / "native").glob(f"*/{build.LIBRARY}"))) == 1


def test_a_damaged_library_is_not_used(tmp_path):
    broken = tmp_path / build.LIBRARY
    broken.write_bytes(b"not a library")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._open(broken, build.digest()) is None


def copy_package(target):
    package = target / "retort"
    shutil.copytree(
        build.SOURCES.parents[1], package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return package


def ask_without_library(tmp_path, **environment):
    copy_package(tmp_path)
    return ask(PYTHONPATH=str(tmp_path), RETORT_CACHE=str(tmp_path / "empty"), **environment)
