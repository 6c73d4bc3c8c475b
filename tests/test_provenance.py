"""Records of runs, and files that appear whole or not at all."""

import json
import os
import subprocess

import pytest

from retort.errors import ConfigurationError
from retort.provenance import Provenance, _commit, versions, write_json, write_text, write_whole


def test_record_holds_what_a_reader_needs():
    record = Provenance.collect({"method": "mgsr"}, {"data": 3}).to_dict()
    assert record["arguments"] == {"method": "mgsr"}
    assert record["seeds"] == {"data": 3}
    assert record["versions"]["torch"].startswith("2.")
    assert record["platform"]["cores"] >= 1
    assert record["time"].endswith("+00:00")
    json.dumps(record)


def test_the_command_is_recorded_without_secrets(monkeypatch):
    given = ["/bin/retort", "bench", "serve", "--api-key", "s3cret", "--max-tokens", "8"]
    monkeypatch.setattr("sys.argv", [*given, "--hub_token=s3cret", "--seed", "1"])
    command = Provenance.collect().command
    assert command[:5] == ["retort", "bench", "serve", "--api-key", "***"]
    assert command[5:] == ["--max-tokens", "8", "--hub_token=***", "--seed", "1"]


def test_missing_package_is_said():
    assert versions(("no-such-package",)) == {"no-such-package": "not installed"}


def test_commit_is_of_the_tree_itself(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    (tmp_path / "inner").mkdir()
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = _commit(tmp_path)
    assert len(commit) == 40
    assert _commit(tmp_path / "inner") is None, "a package inside someone else's repository"
    (tmp_path / "file").write_text("2")
    assert _commit(tmp_path) == f"{commit}+changes"


def test_json_round_trips_and_makes_its_folder(tmp_path):
    path = write_json(tmp_path / "new" / "a.json", {"β": [1, None, tmp_path]})
    assert json.loads(path.read_text()) == {"β": [1, None, str(tmp_path)]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_failure_in_the_middle_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def half(file):
        file.write("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_file_is_readable_by_others_as_the_umask_says(tmp_path):
    mode = write_text(tmp_path / "a.txt", "x").stat().st_mode
    assert mode & 0o600 == 0o600
    plain = tmp_path / "plain"
    plain.touch()
    assert mode == plain.stat().st_mode


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
