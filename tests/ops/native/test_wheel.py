"""The built wheel, installed outside the tree: with a compiler the kernel tests pass on its own
library, without one the installation succeeds and PyTorch does the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PARTS = ("src", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NO_COMPILER = {"PATH": "/nonexistent", "CXX": ""}
ASK = (
    "import retort, torch; from retort.ops import native;"
    "from retort.ops.linear import packed_linear; from retort.ops.panels import pack;"
    "w, x = torch.randn(70, 9), torch.randn(3, 9); y = packed_linear(x, pack(w));"
    "assert torch.allclose(y, x @ w.T, atol=1e-5);"
    "print(retort.__file__, native.available() and native.library()._name)"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def install(tmp_path, **environment):
    """A folder that holds the package as pip installs it from a copy of the sources."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    tree.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        extra = {"ignore": shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")}
        copy(ROOT / part, tree / part, **(extra if copy is shutil.copytree else {}))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--target", str(site), str(tree)]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    shutil.rmtree(tree)
    return site


def run(tmp_path, site, *arguments, **environment):
    env = {
        **os.environ, "PYTHONPATH": str(site), "RETORT_CACHE": str(tmp_path / "none"),
        **environment,
    }  # fmt: skip
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_the_kernel_tests_pass_on_the_installed_library(tmp_path):
    site = install(tmp_path)
    where, library = run(tmp_path, site, "-c", ASK, **NO_COMPILER).stdout.split()
    assert where.startswith(str(site)) and library.startswith(str(site))
    files = [str(f) for f in sorted(Path(__file__).parent.glob("test_*_kernel.py"))]
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    done = run(tmp_path, site, "-m", "pytest", "-x", "-p", "no:cacheprovider", *settings, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_without_a_compiler_it_installs_and_pytorch_does_the_work(tmp_path):
    site = install(tmp_path, **NO_COMPILER)
    assert not list(site.rglob("*.so"))
    done = run(tmp_path, site, "-c", ASK, **NO_COMPILER)
    assert done.stdout.split() == [str(site / "retort" / "__init__.py"), "False"], done.stderr
    assert done.stderr.count("native core not used") == 1
