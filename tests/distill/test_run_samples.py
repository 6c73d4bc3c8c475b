"""Texts before and after training: written by a plain run, shown by its report."""

import html
import json
import shutil

import pytest
import torch

from retort import report
from retort.distill.rollouts import Rollouts
from retort.errors import UnsupportedModelError
from tests.distill.toys import ROWS, greedy_text, lettered, llama, tokenizer, trainer

LENGTH = 5


def run_of(folder, **changes):
    how = {"report_samples": 2, "report_sample_tokens": LENGTH, "eval_dataset": ROWS[2:5]}
    models = lettered(llama(2)), lettered(llama(1))
    return trainer(folder, *models, learning_rate=0.05, **{**how, **changes})


def worst(student, teacher, prompt):
    """(position, teacher's token) of SCRG's correction of the student's greedy text."""
    ids = tokenizer()(prompt)["input_ids"]
    whole = torch.tensor([[*ids, *tokenizer()(greedy_text(student, prompt, LENGTH))["input_ids"]]])
    with torch.no_grad():
        p, q = (m(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in (teacher, student))
    kl, best = (p.exp() * (p - q)).sum(-1), p.argmax(-1)
    wrong = [t for t in range(LENGTH) if best[t] != whole[0, len(ids) + t]]
    return max(wrong, key=lambda t: float(kl[t])), best


def test_a_run_leaves_samples_that_its_report_shows(tmp_path):
    run = run_of(tmp_path)
    run.train()
    samples = report.load(tmp_path).samples
    assert [sample.prompt for sample in samples] == [row["prompt"] for row in ROWS[2:4]]
    teacher, student = lettered(llama(1)), run.model.eval()
    for sample in samples:
        assert sample.teacher == greedy_text(teacher, sample.prompt, LENGTH)
        assert sample.before == greedy_text(lettered(llama(2)), sample.prompt, LENGTH)
        assert sample.after == greedy_text(student, sample.prompt, LENGTH) != sample.before
        place, best = worst(student, teacher, sample.prompt)
        assert sample.marked == [place, place + 1]
        assert sample.replacement == tokenizer().decode([int(best[place])])
    page = report.build(tmp_path).read_text()
    for sample in samples:
        start = sample.marked[0]
        assert html.escape(sample.teacher) in page and html.escape(sample.before) in page
        assert f"{html.escape(sample.after[:start])}<del>" in page


def test_a_run_that_goes_on_keeps_what_was_before_it(tmp_path):
    run_of(tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", again / "checkpoint-2")
    whole = json.loads((tmp_path / "whole" / "samples.json").read_text())
    begun = [{k: r[k] for k in ("prompt", "note", "teacher", "before")} for r in whole]
    (again / "samples.json").write_text(json.dumps(begun))
    run_of(again, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)
    assert json.loads((again / "samples.json").read_text()) == whole
    assert all({"after", "before", "teacher"} <= record.keys() for record in whole)


def test_none_are_written_where_they_are_switched_off(tmp_path):
    run_of(tmp_path, report_samples=0, method="sft", max_steps=1).train()
    assert not (tmp_path / "samples.json").exists()


@pytest.mark.parametrize("damaged", ["", "[", "3", "[3, {}]", None])
def test_a_student_that_cannot_write_ends_no_run(tmp_path, monkeypatch, caplog, damaged):
    def refused(*_):
        raise UnsupportedModelError("no packed forward")

    monkeypatch.setattr(Rollouts, "answer", refused)
    run = run_of(tmp_path, method="sft", max_steps=1)
    if damaged is not None:
        monkeypatch.setattr(run.samples, "begin", lambda _: None)
        run.samples.path.parent.mkdir(exist_ok=True)
        run.samples.path.write_text(damaged)
    run.train()
    samples = report.load(tmp_path).samples
    assert [(s.before, s.after) for s in samples] == [(None, None)] * 2
    assert all(bool(s.teacher) == (damaged is None) for s in samples)
    assert "no packed forward" in caplog.text and "report_samples=0" in caplog.text
