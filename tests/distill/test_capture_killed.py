"""A capture that is killed, damaged or run twice ends as the unbroken one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from retort.distill import capture_folder
from retort.distill.capture import capture
from retort.distill.captured import Capture
from retort.errors import ConfigurationError
from retort.manifest import MANIFEST
from tests.distill.captures import SMALL, flip, rows, shards
from tests.distill.toys import llama, tokenizer


class Killed(BaseException):
    """Not an Exception, as a signal is none."""


def test_a_capture_that_was_killed_three_times_is_the_unbroken_one(small, tmp_path, monkeypatch):
    """Inside a shard, between a shard and its note, and before the manifest."""
    folder = tmp_path / "killed"

    def half_a_shard(path, tensors):
        path.with_name(f".{path.name}.partial").write_bytes(b"half a shard")
        raise Killed

    def no_note(path, value):
        if "shards" in value and len(value["shards"]) == 2:
            raise Killed
        return write_json(path, value)

    def no_manifest(*_, **__):
        raise Killed

    write_json = capture_folder.write_json
    deaths = {"_write_shard": half_a_shard, "write_json": no_note, "write_manifest": no_manifest}
    for name, death in deaths.items():
        monkeypatch.setattr(capture_folder, name, death)
        with pytest.raises(Killed):
            capture(llama(), tokenizer(), rows(), folder, SMALL)
        monkeypatch.undo()
        with pytest.raises(ConfigurationError, match="not finished"):
            Capture(folder)
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert shards(folder) == shards(small) and len(shards(small)) > 2
    assert (folder / MANIFEST).read_bytes() == (small / MANIFEST).read_bytes()
    assert not list(folder.glob("*.partial*")) and not list(folder.glob(".shard*"))


# Kills itself as signal 9 does, at the call ``number`` of a function of `capture_folder`.
KILLED = """
import os, signal, sys
from retort.cli import main
from retort.distill import capture_folder
name, number = sys.argv.pop(1), int(sys.argv.pop(1))
original, calls = getattr(capture_folder, name), []
def killed(*arguments, **keywords):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(capture_folder, name, killed)
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_nine_on_the_command_line_changes_no_bit(tmp_path):
    """Real processes, killed before a shard, between a shard and its note, before the manifest."""
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    lines = [{"prompt": f"row {i}", "completion": "x" * (20 + i % 7)} for i in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(folder):
        options = ["--shard-tokens", "120", "--batch-size", "2"]
        return ["capture", str(model), str(data), str(tmp_path / folder), *options]

    def start(script, *arguments):
        run = [sys.executable, "-c", script, *arguments]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads spin where cores are busy
        return subprocess.run(run, capture_output=True, check=False, env=one_thread)

    whole = "from retort.cli import main; main()"
    assert start(whole, *arguments("whole")).returncode == 0
    for place in ("_write_shard", "2"), ("write_json", "4"), ("write_manifest", "1"):
        done = start(KILLED, *place, *arguments("killed"))
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not (tmp_path / "killed" / MANIFEST).exists()
    assert start(whole, *arguments("killed")).returncode == 0
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert len(shards(tmp_path / "whole")) > 5


def test_finished_shards_are_not_made_again_and_damaged_ones_are(small, tmp_path, monkeypatch):
    folder, written = tmp_path / "c", []
    shutil.copytree(small, folder)
    facts = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    files = facts.pop("files")
    (folder / capture_folder.PROGRESS).write_text(json.dumps({**facts, "shards": files}))
    flip(folder / "shard-00001.safetensors")
    real = capture_folder._write_shard
    monkeypatch.setattr(
        capture_folder, "_write_shard", lambda p, t: (written.append(p.name), real(p, t))
    )
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert written == ["shard-00001.safetensors"] and shards(folder) == shards(small)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shards": 3}'])
def test_notes_of_an_unfinished_capture_that_are_damaged_are_refused(tmp_path, content):
    (tmp_path / capture_folder.PROGRESS).write_text(content)
    with pytest.raises(ConfigurationError, match=f"{capture_folder.PROGRESS} is damaged"):
        capture(llama(), tokenizer(), rows(), tmp_path, SMALL)


def test_two_runs_never_share_a_folder(tmp_path):
    folder = tmp_path / "c"
    script = (
        "import sys, time; from pathlib import Path; from retort.train.checkpoint import alone\n"
        f"with alone(Path({str(folder)!r})):\n print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match="another run is writing"):
            capture(llama(), tokenizer(), rows(), folder, SMALL)
        other.kill()
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert Capture(folder).facts["rows"] == 9
