"""T23: a disk that is really full. The system refuses the bytes, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from retort.cli import run as command
from retort.disk import writing
from retort.distill.capture_folder import PROGRESS, PROVENANCE
from retort.distill.run import run
from retort.errors import ConfigurationError
from retort.manifest import STAMP
from retort.train import checkpoint
from retort.train.arguments import resolved
from retort.train.checkpoint import LOCK
from tests.distill.toys import config_of_parts, save_parts

ROOT = Path(__file__).resolve().parents[2]
SHARDS = ["--shard-tokens", "12"]

# `retort …` for which the disk is full from the call ``number`` of a function on: no file may grow
# beyond ``size`` bytes. Output goes to pipes, which have no size.
FULL = """
import importlib, resource, sys
from retort.cli import main
module, name, number, size = sys.argv[1:5]
del sys.argv[1:5]
module, calls = importlib.import_module(module), []
original = getattr(module, name)
def filling(*arguments, **keywords):
    calls.append(1)
    if len(calls) == int(number):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    return original(*arguments, **keywords)
setattr(module, name, filling)
main()
"""


def on_a_full_disk(place, size, *arguments):
    """The one line of a command for which the disk fills up."""
    command = [sys.executable, "-c", FULL, *map(str, [*place, size, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("retort: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "make room" in lines[0]
    return lines[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model that teaches and learns, rows, and an unbroken run."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    run(config_of_parts(folder, folder / "whole"))
    return folder


def write_config(parts, tmp_path):
    """``run.yaml`` of a run; returns the folder that it will fill."""
    folder = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(resolved(config_of_parts(parts, folder))))
    return folder


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_on_a_full_disk(parts, tmp_path, too_large):
    """Once safetensors meets the end of the disk, once PyTorch's archive does."""
    folder = write_config(parts, tmp_path)
    size = (parts / "whole" / "checkpoint-2" / too_large).stat().st_size - 1
    place = "retort.train.checkpoint", "staging", 2
    line = on_a_full_disk(place, size, "distill", "--config", tmp_path / "run.yaml")
    assert f"{folder / 'checkpoint-4'} could not be written" in line
    assert checkpoint.newest(folder).name == "checkpoint-2"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2"}
    run(config_of_parts(parts, folder))
    expected = load_file(parts / "whole" / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_a_finished_model_on_a_full_disk(parts, tmp_path):
    folder = write_config(parts, tmp_path)
    place = "retort.train.checkpoint", "staging", 3
    line = on_a_full_disk(place, 9000, "distill", "--config", tmp_path / "run.yaml")
    assert f"{folder} could not be written" in line
    assert checkpoint.newest(folder).name == "checkpoint-4"
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.partial"))


def test_a_log_on_a_full_disk(parts, tmp_path):
    folder = write_config(parts, tmp_path)
    place = "retort.train.checkpoint", "rotate", 1
    line = on_a_full_disk(place, 10, "distill", "--config", tmp_path / "run.yaml")
    assert f"{folder / 'training.jsonl'} could not be written" in line
    assert checkpoint.newest(folder).name == "checkpoint-2"


def test_a_capture_on_a_full_disk(parts, tmp_path):
    """What was captured is kept, and the same command ends in the same bits."""
    folders = [tmp_path / "full", tmp_path / "whole"]
    full, whole = (
        ["capture", str(parts / "model"), str(parts / "rows.jsonl"), str(folder), *SHARDS]
        for folder in folders
    )
    line = on_a_full_disk(("retort.distill.capture_folder", "_write_shard", 3), 2000, *full)
    assert f"{folders[0]} could not be written (File too large)" in line
    before = contents(folders[0])
    shards = {name for name in before if name.startswith("shard")}
    assert before.keys() == {PROGRESS, LOCK, *shards} and len(shards) == 2
    assert command(full) == command(whole) == 0
    after, expected = map(contents, folders)
    assert all(after[name] == before[name] for name in shards)
    assert after.keys() == expected.keys()
    for name in expected.keys() - {PROVENANCE, STAMP}:
        assert after[name] == expected[name], name


# A file of each library that writes ours, where no file may have more than 100 bytes.
WRITERS = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from retort.disk import writing
from retort.errors import RetortError
from tests.distill.tokenizers import byte_level
tokens = byte_level().backend_tokenizer
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
writers = {
    "safetensors": lambda path: save_file({"a": torch.zeros(1000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(100000)}, path),
    "tokenizers": lambda path: tokens.save(path),
    "python": lambda path: Path(path).write_text("a" * 1000),
}
for name, write in writers.items():
    try:
        with writing(name):
            write(sys.argv[1] + name)
    except RetortError as error:
        print(error)
"""


def test_every_library_that_meets_a_full_disk_says_the_same(tmp_path):
    command = [sys.executable, "-c", WRITERS, f"{tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ["safetensors", "torch", "tokenizers", "python"], strict=True):
        reason = "the disk took only a part" if name == "torch" else "File too large"
        assert line.startswith(f"{name} could not be written ({reason}); "), line


def test_other_errors_stay_what_they_are():
    faults = RuntimeError("a fault"), OSError("the hub said no"), ConfigurationError("beta=2")
    for error in faults:
        with pytest.raises(type(error), match=str(error)), writing("x"):
            raise error
