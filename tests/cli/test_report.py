"""``retort report`` writes the page that the library builds, and says what is missing."""

import errno
import os

from retort.cli import main
from retort.report import RunRecords, save


def test_the_page_is_written_and_its_path_printed(tmp_path, capsys, monkeypatch):
    save(tmp_path, RunRecords(training=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))
    monkeypatch.setattr("sys.argv", ["retort", "report", str(tmp_path)])
    assert _code() == 0
    page = capsys.readouterr().out.strip()
    assert page == str(tmp_path.resolve() / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text("utf-8")


def test_a_folder_without_records_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["retort", "report", str(tmp_path / "none")])
    assert _code() == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    save(tmp_path, RunRecords(training=[{"step": 1, "loss": 2.0}]))
    monkeypatch.setattr("sys.argv", ["retort", "report", str(tmp_path)])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write has it: without a name
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
    assert _code() == 2
    line = capsys.readouterr().err
    assert "report.html could not be written (No space left on device)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["training.jsonl"]


def _code():
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0
