"""Records go to files and come back; what does not fit is named."""

import json
import math

import pytest

from retort.errors import ConfigurationError
from retort.provenance import Provenance, write_json
from retort.report import (
    Correction,
    DecodingRow,
    Heading,
    RunRecords,
    append_training,
    build,
    load,
    save,
)
from retort.report.store import read_training
from tests.report import sample_run


def test_everything_comes_back_equal(tmp_path):
    save(tmp_path, sample_run.records())
    assert load(tmp_path) == sample_run.records()


def test_parts_that_were_not_measured_write_no_file(tmp_path):
    save(tmp_path, RunRecords(decoding=sample_run.DECODING))
    assert [path.name for path in tmp_path.iterdir()] == ["decoding.json"]


def test_appending_gives_one_record_a_step(tmp_path):
    append_training(tmp_path / "run", {"step": 1, "loss": 2.0})
    append_training(tmp_path / "run", {"step": 1, "eval_loss": math.nan})
    append_training(tmp_path / "run", {"step": 2, "loss": 1.0})
    first, second = read_training(tmp_path / "run")
    assert first["loss"] == 2.0 and math.isnan(first["eval_loss"])
    assert second == {"step": 2, "loss": 1.0}


def test_a_line_cut_short_by_a_kill_is_ignored_and_then_dropped(tmp_path):
    append_training(tmp_path, {"step": 1, "loss": 2.0})
    log = tmp_path / "training.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 2, "lo')
    assert read_training(tmp_path) == [{"step": 1, "loss": 2.0}]
    append_training(tmp_path, {"step": 2, "loss": 1.0})
    assert read_training(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    for step, loss in [(1, 5), (2, 4), (3, 99), (4, 99), (3, 3)]:
        append_training(tmp_path, {"step": step, "loss": loss})
    assert read_training(tmp_path) == [{"step": s, "loss": 6 - s} for s in (1, 2, 3)]


def test_without_a_log_of_ours_the_newest_trainer_state_is_read(tmp_path):
    for number, loss in [(9, 2.0), (10, 1.0)]:
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        history = {"log_history": [{"step": number, "loss": loss}]}
        (folder / "trainer_state.json").write_text(json.dumps(history))
    assert load(tmp_path).training == [{"step": 10, "loss": 1.0}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("decoding.json", '[{"arm": "plain"}]', "row 0: .*batch_size"),
        ("decoding.json", '[{"arm": "plain", "batch_size": "8"}]', "row 0: 'batch_size'.*type"),
        ("decoding.json", '[{"arm": "plain", "batch_size": true}]', "row 0: 'batch_size'.*type"),
        ("decoding.json", '[{"arm": "a", "batch_size": 1, "speed": 2}]', "unknown key 'speed'"),
        ("decoding.json", '{"arm": "plain"}', "expected a list"),
        ("decoding.json", "[1]", "row 0: expected a record"),
        ("samples.json", "[", "samples.json: not valid JSON"),
        (
            "corrections.json",
            '[{"prompt": "", "tokens": ["a"], "position": 1, "replacement": "b"}]',
            "row 0: .*position 1",
        ),
        ("corrections.json", '[{"prompt": "", "tokens": [1]}]', "'tokens' has the wrong type"),
        ("training.jsonl", '{"step": 1}\n{"loss": 2}\n', 'line 2: .*"step"'),
        ("training.jsonl", '{"step": 1}\nnonsense\n', "line 2: not valid JSON"),
        ("training.jsonl", '{"step": ' + "9" * 400 + "}\n", 'line 1: .*"step"'),
        ("training.jsonl", '{"step": ' + "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("training.jsonl", "\udcff\n", "training.jsonl: not UTF-8 text"),
        ("trainer_state.json", "[1]", "trainer_state.json: it has no list"),
        ("trainer_state.json", '{"log_history": null}', "trainer_state.json: it has no list"),
        ("provenance.json", '{"seeds": 3}', "provenance.json: 'seeds'"),
        ("provenance.json", "{}", "provenance.json: .*missing"),
        ("heading.json", '{"title": 1}', "heading.json: 'title'"),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path)


def test_numbers_written_as_whole_are_fine_for_measured_values(tmp_path):
    (tmp_path / "decoding.json").write_text('[{"arm": "a", "batch_size": 1, "seconds": 2}]')
    assert load(tmp_path).decoding == [DecodingRow("a", 1, seconds=2)]


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no records"):
        load(tmp_path)
    with pytest.raises(ConfigurationError, match="no run folder"):
        load(tmp_path / "missing")


def test_a_correction_outside_its_tokens_is_refused():
    with pytest.raises(ConfigurationError, match="position 2"):
        Correction("", ["a", "b"], 2, "c")


def test_what_a_process_collects_about_itself_is_read(tmp_path):
    collected = Provenance.collect({"method": "sft"}, {"seed": 3})
    write_json(tmp_path / "provenance.json", collected.to_dict())
    assert load(tmp_path).provenance == collected


def test_half_a_surrogate_pair_does_not_lose_the_report(tmp_path):
    heading = Heading(title="half \ud800 pair")
    save(tmp_path, RunRecords(heading=heading))
    assert load(tmp_path).heading.title == "half ? pair"
    page = build(RunRecords(heading=heading), tmp_path / "x.html").read_text("utf-8")
    assert "half \ufffd pair" in page
