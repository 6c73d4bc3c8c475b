"""Every example runs as its first lines say, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve import tiny

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "dense_mamba": "after the correction",
    "distill": "'loss'",
    "generate": "sampled texts are equal: True",
    "in_transformers": "equal: True",
    "own_drafter": "equal: True",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("examples") / "tiny")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, model, tmp_path):
    given = [] if script.stem == "dense_mamba" else [str(model)]
    given += [str(tmp_path / "run")] if script.stem == "distill" else []
    done = subprocess.run(
        [sys.executable, str(script), *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[script.stem] in done.stdout
