"""Shared fixtures: the real model, and data that lies beside the repository where it is at hand."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from retort.errors import RetortError

ROOT = Path(__file__).resolve().parents[1]
ZOO_NAME = "smollm2-135m-instruct"


def shared_folder() -> Path | None:
    """Golden outputs and data sets: ``$RETORT_SHARED``, else ``../shared``; often there is none."""
    for place in (os.environ.get("RETORT_SHARED"), ROOT.parent / "shared"):
        if place and Path(place).is_dir():
            return Path(place)
    return None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder; without one the test is skipped."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared data (set RETORT_SHARED or lay it at ../shared)")
    return folder


@pytest.fixture(scope="session")
def golden(shared) -> Path:
    """The authors' golden outputs."""
    return shared / "golden"


@pytest.fixture(scope="session")
def data(shared) -> Path:
    """Real data sets as JSON Lines."""
    return shared / "data"


@pytest.fixture(scope="session")
def zoo_folder() -> Path:
    """Folder of the real model. It may be missing on a machine without an index, never in CI."""
    from retort.models import zoo

    try:
        return zoo.resolve(ZOO_NAME)
    except RetortError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def zoo_model(zoo_folder):
    """The real model in float32; tests leave it as it is."""
    from retort.models import zoo

    return zoo.load_model(zoo_folder)


@pytest.fixture(scope="session")
def zoo_tokenizer(zoo_folder):
    """The real model's tokenizer."""
    from retort.models import zoo

    return zoo.load_tokenizer(zoo_folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A saved random llama of 64 tokens, without a tokenizer; copy it before changing it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cpu_seconds():
    """Processor seconds of the children in a call; unlike wall time, fair on a busy machine."""

    def measure(call) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    return measure


@pytest.fixture
def python():
    """Run code in a fresh interpreter and return its standard output."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
