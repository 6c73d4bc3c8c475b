"""The teacher's texts: written once, kept, read again by other runs."""

import errno
import json
import os
import threading

import pytest
from filelock import FileLock

from retort.distill.sequences.teacher_text import TeacherTexts
from retort.errors import ConfigurationError, RetortError
from retort.train import checkpoint
from tests.distill.toys import trainer

MADE_BY = {"teacher": "large", "max_completion_length": 8}


class Counting:
    """Writes a prompt's last id twice, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked.append([list(p) for p in prompts])
        return [[p[-1], p[-1]] for p in prompts]


def test_a_prompt_is_written_once(tmp_path):
    write = Counting()
    texts = TeacherTexts(write, tmp_path / "t.jsonl", MADE_BY)
    assert texts.of([[1], [2], [1]]) == [[1, 1], [2, 2], [1, 1]]
    assert texts.of([[2], [3]]) == [[2, 2], [3, 3]]
    assert write.asked == [[[1], [2]], [[3]]]
    again = Counting()
    assert TeacherTexts(again, tmp_path / "t.jsonl", MADE_BY).of([[3], [1]]) == [[3, 3], [1, 1]]
    assert again.asked == []


def test_half_a_line_is_written_anew(tmp_path):
    path = tmp_path / "t.jsonl"
    TeacherTexts(Counting(), path, MADE_BY).of([[1], [2]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    write = Counting()
    assert TeacherTexts(write, path, MADE_BY).of([[1], [2]]) == [[1, 1], [2, 2]]
    assert write.asked == [[[2]]]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"teac')
    TeacherTexts(Counting(), path, MADE_BY).of([[1], [2]])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("made_by", "line", "named"),
    [
        ({**MADE_BY, "teacher": "other"}, None, "teacher='large'"),
        (MADE_BY, "{bad", "line 3"),
        (MADE_BY, '{"prompt": [1]}', "line 3"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, made_by, line, named):
    path = tmp_path / "t.jsonl"
    TeacherTexts(Counting(), path, MADE_BY).of([[1]])
    if line:
        path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigurationError, match=named) as caught:
        TeacherTexts(Counting(), path, made_by)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"notes", b'{"a": 1}\nhalf', b"\xff\nx", b"[1]\n"])
def test_a_file_of_something_else_is_not_touched(tmp_path, content):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="was made with teacher=None"):
        TeacherTexts(Counting(), path, MADE_BY)
    assert path.read_bytes() == content


def test_another_run_reads_them(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    shared = {"method": "seqkd", "teacher_text_file": str(file)}
    trainer(tmp_path / "a", **shared).train()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 9 and lines[0]["max_completion_length"] == 8
    run = trainer(tmp_path / "b", seed=5, **shared)
    assert len(run.rollouts.sources.teacher_texts) == 8
    monkeypatch.setattr(
        run.rollouts.sources.teacher_texts, "_write", None
    )  # would fail if it were called
    run.train()


def test_a_file_that_another_run_adds_to_is_waited_for(tmp_path, monkeypatch):
    """Half a line of the other's must not be cut off as a killed process's."""
    path, waiting, found = tmp_path / "texts.jsonl", threading.Event(), []
    monkeypatch.setattr(checkpoint.logger, "warning", lambda *_: waiting.set())
    TeacherTexts(lambda prompts: prompts, path, MADE_BY).of([[1, 2]])
    whole = path.read_bytes() + b'{"prompt": [3], "completion": [4]}\n'
    reader = threading.Thread(
        target=lambda: found.append(TeacherTexts(lambda prompts: prompts, path, MADE_BY))
    )
    with FileLock(path.with_name(f".{path.name}{checkpoint.LOCK}")):
        path.write_bytes(whole[:-9])
        reader.start()
        assert waiting.wait(60)
        path.write_bytes(whole)
    reader.join(60)
    assert found[0].of([[3]]) == [[4]] and path.read_bytes() == whole


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
    texts = TeacherTexts(Counting(), tmp_path / "t.jsonl", MADE_BY)
    with pytest.raises(RetortError, match=r"t.jsonl could not be written \(No space left"):
        texts.of([[1]])
