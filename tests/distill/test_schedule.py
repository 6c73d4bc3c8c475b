"""DistiLLM's scheduler by its table, and inside the trainer."""

import pytest

from retort.distill.sequences.schedule import AdaptiveShare
from tests.distill.toys import ROWS, trainer


def test_phi_grows_where_the_loss_has_risen_by_a_tenth():
    share, seen = AdaptiveShare(), []
    for loss in (2.0, 2.05, 2.1, 2.15, 2.2, 1.0, 2.31):
        share.observe(loss)
        seen.append(round(share.phi, 6))
    # 2.1 is a rise over 2.0, then 2.2 over 2.1; falls do not lower what a rise is measured from.
    assert seen == [0, 0, 0.1, 0.1, 0.2, 0.2, 0.3]
    assert share.previous == 2.31


def test_phi_ends_at_one():
    share = AdaptiveShare()
    for loss in range(14):
        share.observe(float(loss))
    assert share.phi == 1.0


@pytest.mark.parametrize(
    ("r", "progress", "full", "source"),
    [
        (0.29, 0.5, True, "student"),  # r < 0.6 (1 − 0.5)
        (0.31, 0.5, True, "replay"),
        (0.31, 0.5, False, "student"),  # while the buffer is short
        (0.59, 1.0, True, "replay"),
        (0.6, 0.0, True, "dataset"),
        (0.6, 0.0, False, "dataset"),
    ],
)
def test_one_number_decides_for_the_whole_step(r, progress, full, source):
    assert AdaptiveShare(phi=0.6).choose(r, progress, full) == source


def test_phi_zero_never_writes():
    assert AdaptiveShare().choose(0.0, 0.0, False) == "dataset"


def test_in_training_the_evaluation_moves_phi_and_the_step_has_one_source(tmp_path, monkeypatch):
    losses = iter(map(float, range(30)))
    run = trainer(tmp_path, method="distillm", max_steps=24, replay_buffer_size=6)
    observe = run.rollouts.sources.schedule.observe
    monkeypatch.setattr(run.rollouts.sources.schedule, "observe", lambda _: observe(next(losses)))
    run.train()
    steps = [r for r in run.state.log_history if "loss" in r]
    phis = [round(r["phi"], 6) for r in steps]
    assert phis == [min(round(max(n - 1, 0) / 10, 6), 1) for n in range(24)]
    for record in steps:
        assert [v for k, v in record.items() if k.startswith("source/")] == [1.0]
    names = {k for r in steps for k in r if k.startswith("source/")}
    assert names == {"source/dataset", "source/student", "source/replay"}
    assert len(run.rollouts.sources.buffer) == 6


def test_an_evaluation_outside_of_training_moves_nothing(tmp_path):
    run = trainer(tmp_path, method="distillm")
    run.evaluate()
    assert run.rollouts.sources.schedule.previous is None


def test_the_first_of_several_sets_is_followed(tmp_path):
    sets = {"short": ROWS[:2], "long": ROWS[2:4]}
    run = trainer(tmp_path, method="distillm", max_steps=1, eval_dataset=sets)
    run.train()
    expected = next(r["eval_short_loss"] for r in run.state.log_history if "eval_short_loss" in r)
    assert run.rollouts.sources.schedule.previous == pytest.approx(expected)
