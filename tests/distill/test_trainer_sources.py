"""Where a trainer's sequences come from: data set, student, replay, revision, with any drafter."""

import pytest
import torch

from retort.distill.presets import PRESETS
from retort.distill.run import run
from retort.distill.sequences.replay import ReplayBuffer
from retort.distill.sequences.sources import Sources
from tests.distill.runs import final, settings
from tests.distill.toys import first_batch, logged, record_accepted, record_texts, trainer, weights


def test_lmbda_is_the_share_that_the_student_writes(tmp_path):
    chosen = Sources(recipe("kd", lmbda=0.3), None, seed=5)
    import random

    drawn = [chosen._choose(random.Random(f"{step}")) for step in range(2000)]
    assert drawn.count("student") / len(drawn) == pytest.approx(0.3, abs=0.04)
    assert set(drawn) == {"student", "dataset"}


def test_the_choice_depends_on_seed_step_and_row_alone(tmp_path):
    mixed = {"method": "kd", "lmbda": 0.5, "per_device_train_batch_size": 8}
    runs = [trainer(tmp_path, seed=seed, **mixed) for seed in (1, 1, 2)]
    torch.rand(3)  # other users of randomness do not matter
    batches = [first_batch(run) for run in runs]
    assert torch.equal(batches[0]["targets"], batches[1]["targets"])
    sources = [run.meter.sums["source/student"] for run in runs]
    assert 0 < sources[0] < 8


def test_replay_uses_what_the_student_wrote_before(tmp_path):
    run = trainer(tmp_path, method="rkl", replay_buffer_size=100, replay_share=0.7, max_steps=6)
    run.train()
    shares = [r.get("source/replay", 0) for r in logged(tmp_path)]
    assert shares[0] == 0 and max(shares) > 0
    assert len(run.rollouts.sources.buffer) == sum(
        r.get("rollout/texts", 0) for r in logged(tmp_path)
    )


def test_a_full_buffer_forgets_the_oldest():
    buffer = ReplayBuffer(2)
    for n in range(5):
        buffer.add([n], [n])
    assert buffer.state_dict()["pairs"] == [[[3], [3]], [[4], [4]]]


def test_revision_starts_after_the_warm_up(tmp_path):
    run = trainer(tmp_path, scrg_warmup_steps=2)
    run.train()
    corrected = [r.get("scrg/corrected", 0) for r in logged(tmp_path) if "loss" in r]
    assert corrected[:2] == [0, 0] and min(corrected[2:]) > 0


@pytest.mark.parametrize("choices", [{"rollout_temperature": 0.05}, {"do_sample": False}])
def test_drafts_do_not_change_what_the_student_writes(tmp_path, monkeypatch, choices):
    """Every token of every step, drawn or likeliest, and so every weight, to the bit."""
    texts, accepted = record_texts(monkeypatch), record_accepted(monkeypatch)
    ends, sizes = [], {"max_completion_length": 32, "max_length": 128}
    for drafter in ("none", "prompt-lookup"):
        made = {"method": "rkl", "rollout_drafter": drafter, **sizes, **choices}
        run = trainer(tmp_path / drafter, **made)
        run.train()
        ends.append(weights(run.model))
        assert bool(accepted) == (drafter != "none")
    assert texts[:4] == texts[4:] and len(texts) == 8 and all(map(len, texts))
    assert sum(accepted) > 0
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def recipe(method, **changes):
    from dataclasses import replace

    return replace(PRESETS[method], **changes)


def test_an_earlier_checkpoint_of_the_student_drafts_and_changes_no_text(
    parts, tmp_path, monkeypatch
):
    """Every token of every step, and so every weight, to the bit."""
    texts, accepted = record_texts(monkeypatch), record_accepted(monkeypatch)
    plain = run(settings(parts, tmp_path / "plain", method="rkl", rollout_drafter="none"))
    assert len(texts) == 10 and all(map(len, texts)) and not accepted
    earlier = str(plain / "checkpoint-3")
    drafted = run(settings(parts, tmp_path / "drafted", method="rkl", rollout_drafter=earlier))
    assert texts[10:] == texts[:10] and sum(accepted) > 0
    for name, value in final(plain).items():
        assert torch.equal(value, final(drafted)[name]), name
