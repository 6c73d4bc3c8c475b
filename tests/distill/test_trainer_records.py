"""What a trainer logs, evaluates and times."""

import pytest

from retort import report
from tests.distill.toys import ROWS, logged, trainer


def test_every_promised_name_is_logged_and_the_report_reads_it(tmp_path):
    run = trainer(tmp_path, eval_dataset=ROWS[:3], eval_strategy="steps", eval_steps=2)
    run.train()
    record = [r for r in logged(tmp_path) if "loss" in r][-1]
    names = [
        "sft",
        "dac",
        "acceptance",
        "span/pairs",
        "source/student",
        "dac/dual",
        "rollout/tokens",
    ]
    names += ["time/rollout", "time/teacher", "time/train"]
    names += [f"dac/{n}" for n in ("coverage", "width", "lower", "upper", "hidden_share")]
    names += ["scrg/corrected", "scrg/regenerated_tokens", "scrg/share_without_error"]
    names += ["scrg/nll_before", "scrg/nll_after", "scrg/nll_change", "scrg/nll_change_low"]
    assert set(names) <= set(record)
    assert record["dac/upper"] - record["dac/lower"] == pytest.approx(record["dac/width"])
    assert (
        record["scrg/per_1000_tokens"]
        == 1000 * record["scrg/corrected"] / (record["rollout/tokens"])
    )
    assert any("span" in r for r in logged(tmp_path))
    held_out = next(r for r in logged(tmp_path) if "eval_loss" in r)
    assert {"eval_sft", "eval_dac", "eval_acceptance"} <= set(held_out)
    records = report.load(tmp_path)
    assert len(records.corrections) == sum(r.get("scrg/corrected", 0) for r in logged(tmp_path))
    assert records.provenance.arguments["method"] == "mgsr"
    assert any(correction.regenerated for correction in records.corrections)


def test_evaluation_weighs_tokens_and_not_batches(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c" * 40}]
    ends = [
        trainer(tmp_path, method="sft", eval_dataset=rows, per_device_eval_batch_size=n).evaluate()
        for n in (1, 2)
    ]
    assert ends[0]["eval_sft"] == pytest.approx(ends[1]["eval_sft"], rel=1e-5)
    assert ends[0]["eval_loss"] == ends[0]["eval_sft"]


def test_acceptance_is_evaluated_for_sft_too_where_a_teacher_is_given(tmp_path):
    run = trainer(tmp_path, method="sft", eval_dataset=ROWS)
    assert 0 < run.evaluate()["eval_acceptance"] < 1


def test_several_evaluation_sets_are_named(tmp_path):
    sets = {"short": ROWS[:2], "long": ROWS[2:]}
    run = trainer(tmp_path, method="sft", eval_dataset=sets)
    assert {"eval_short_sft", "eval_long_sft"} <= set(run.evaluate())


def test_phases_are_timed_and_take_no_longer_than_the_run(tmp_path):
    run = trainer(tmp_path)
    ended = run.train()
    spent = sum(v for r in logged(tmp_path) for k, v in r.items() if k.startswith("time/"))
    assert 0 < spent <= ended.metrics["train_runtime"]
    for record in (r for r in logged(tmp_path) if "loss" in r):
        assert min(record[f"time/{phase}"] for phase in ("rollout", "teacher", "train")) > 0
