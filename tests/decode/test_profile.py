"""What passes cost: kept on disk, trusted only while sound; budgets that need no clock."""

import json
import os
import random

import pytest
import torch

from retort.decode import profile
from retort.decode.budget import AutoBudget, Candidate, CountBudget, build_budget
from retort.decode.cost import PassCost, StepCost
from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from tests.decode.toys import prompts, reference, toy

GOOD = {n: 0.01 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64)}


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path))
    packed = PackedModel(toy())
    yield packed
    packed.close()


def test_a_profile_is_measured_once_and_then_read(target, monkeypatch):
    calls = []
    times = {n: [s, s * 1.1] for n, s in GOOD.items()}
    monkeypatch.setattr(profile, "measure", lambda t: calls.append(t) or times)
    monkeypatch.setattr(profile, "_WORTH_KEEPING", -1.0)
    assert profile.pass_profile(target) == profile.pass_profile(target) == GOOD
    assert calls == [target]


def test_a_profile_of_a_busy_machine_is_used_once_and_not_kept(target, monkeypatch):
    times = {n: [s, s * 1.1, s] for n, s in GOOD.items()}
    times[12] = [0.12, 0.9, 0.7]
    calls = []
    monkeypatch.setattr(profile, "measure", lambda t: calls.append(t) or times)
    monkeypatch.setattr(profile, "_WORTH_KEEPING", -1.0)
    assert profile.pass_profile(target) == profile.pass_profile(target) == GOOD
    assert len(calls) == 2 and not profile.profile_path(target).exists()


def test_a_profile_that_overrates_drafts_is_found_out():
    """Passes with drafts take half of what the profile says, and every draft would be accepted."""
    profiled = StepCost({1: 1.0, 8: 1.0 + 7 * 1.2})
    budget, sent = AutoBudget(cost=PassCost(profiled)), []
    for _ in range(1500):
        drafts = sum(budget.allocate([Candidate("a", "d", 4, match=8)]))
        budget.time_step(1, 1 + drafts, 1.0 + 0.4 * drafts)
        if drafts:
            budget.observe("a", "d", drafts, drafts, match=8)
        sent.append(drafts)
    assert not any(sent[:20])
    assert sent[-500:].count(0) <= 500 / 16 + 1  # but for the plain passes that are due


def test_a_flat_profile_is_found_out_and_drafts_that_pay_go_on():
    """Measured while memory was slow: tokens seem free, and each takes 0.15 of a pass."""
    budget, rng = AutoBudget(cost=PassCost(StepCost({1: 1.0, 64: 1.0}))), random.Random(0)
    tokens, seconds, sent = 0, 0.0, []
    for _ in range(2000):
        drafts = sum(budget.allocate([Candidate("a", "d", 7, match=4)]))
        accepted = next((i for i in range(drafts) if rng.random() > 0.55), drafts)
        budget.time_step(1, 1 + drafts, 1.0 + 0.15 * drafts)
        if drafts:
            budget.observe("a", "d", drafts, accepted, match=4)
        tokens, seconds = tokens + 1 + accepted, seconds + 1.0 + 0.15 * drafts
        sent.append(drafts)
    assert sent[-500:].count(0) < 100
    assert tokens / seconds > 1.25  # two drafts at a time: (1 + 0.55 + 0.3) / 1.3 = 1.42


def test_drafts_are_not_blamed_for_a_machine_that_slows_down():
    """Every draft is accepted; passes take twice as long from step 300 on, plain ones too."""
    budget, sent = AutoBudget(cost=PassCost(StepCost({1: 1.0, 64: 1.0}))), []
    for step in range(500):
        drafts = sum(budget.allocate([Candidate("a", "d", 1, match=4)]))
        budget.time_step(1, 1 + drafts, (1.0 if step < 300 else 3.0) * (1 + 0.2 * drafts))
        if drafts:
            budget.observe("a", "d", drafts, int(step % 3 > 0), match=4)
        sent.append(drafts)
    assert sent[320:].count(0) < 40


def test_measuring_counts_no_pass_and_leaves_no_row(target):
    measured = profile.best(profile.measure(target, repeats=1))
    assert set(measured) == set(GOOD) and min(measured.values()) > 0
    assert target.forward_passes == target.forward_tokens == 0 and target.cache.rows == ()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_a_profile_ends_with_the_context(name, tmp_path, monkeypatch):
    """Learned positions end at 32; the automatic budget drafts as a fixed one does."""
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "_WORTH_KEEPING", -1.0)
    monkeypatch.setattr(profile, "steady", lambda times: True)
    context = {"max_position_embeddings": 32}
    if name == "gpt2":
        context = {"n_positions": 32, "max_position_embeddings": None}
    model, prompt = toy(name, **context), [5, 6, 7, 8] * 3
    model.generation_config.eos_token_id = None
    expected = reference(model, prompt, max_new_tokens=12)
    for _ in range(2):  # measured, then read
        with Engine(model, drafter="prompt-lookup") as engine:
            (output,) = engine.generate([prompt], max_new_tokens=12, ignore_eos=True)
            assert list(engine.budget.cost.profile.seconds_at) == [n for n in GOOD if n <= 32]
        assert output.token_ids == expected
    assert len(list(tmp_path.rglob("*.json"))) == 1


def _fails_above(model, monkeypatch, most, error):
    forward = type(model).forward

    def limited(self, input_ids=None, **more):
        if input_ids.shape[1] > most:
            raise error
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", limited)


def test_a_profile_ends_where_memory_does_and_is_not_kept(target, monkeypatch):
    monkeypatch.setattr(profile, "_WORTH_KEEPING", -1.0)
    monkeypatch.setattr(profile, "steady", lambda times: True)
    _fails_above(target.model, monkeypatch, 30, torch.OutOfMemoryError("no memory"))
    assert list(profile.pass_profile(target)) == [n for n in GOOD if n <= 24]
    assert not profile.profile_path(target).exists()
    assert target.forward_passes == 0 and target.cache.rows == ()
    _fails_above(target.model, monkeypatch, 0, torch.OutOfMemoryError("no memory"))
    assert profile.pass_profile(target) == {}


def test_where_measuring_fails_decoding_goes_on_and_live_times_teach(monkeypatch):
    tried = []
    monkeypatch.setattr(profile, "measure", lambda t: tried.append(t) or 1 / 0)
    monkeypatch.setattr(profile, "load", lambda *_: None)
    model, texts = toy(eos_token_id=None), prompts((5, 9))
    with Engine(model, drafter="prompt-lookup") as engine:
        outputs = engine.generate(texts, max_new_tokens=20)
        assert engine.budget.cost.plain and not engine.budget.cost.profile.seconds_at
    assert [o.token_ids for o in outputs] == [reference(model, p, max_new_tokens=20) for p in texts]
    assert len(tried) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", json.dumps({"1": 0.1}), json.dumps({str(n): -1 for n in GOOD})],
)
def test_a_broken_profile_is_ignored(target, text):
    path = profile.profile_path(target)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert profile.load(path) is None
    profile.save(path, GOOD)
    assert profile.load(path) == GOOD
    os.utime(path, (0, 0))
    assert profile.load(path) is None


def test_a_profile_belongs_to_model_backend_and_threads(target, monkeypatch):
    paths = {profile.profile_path(target)}
    other = PackedModel(toy(num_hidden_layers=1))
    paths.add(profile.profile_path(other))
    other.close()
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    paths.add(profile.profile_path(target))
    monkeypatch.setattr(type(target.backend), "key", ["native", "another core"])
    paths.add(profile.profile_path(target))
    assert len(paths) == 4


def test_counts_give_the_same_drafts_whatever_the_clock_says():
    steps = []
    for _ in range(2):
        with Engine(toy(), drafter="prompt-lookup", draft_budget="counts") as engine:
            engine.budget.time_step(3, 3, 99.0 * len(steps))
            engine.generate(prompts(), max_new_tokens=20)
            stats = engine.stats
            steps.append((stats.steps, stats.draft_tokens, stats.accepted_per_position))
    assert steps[0] == steps[1] and steps[0][1] > 0
    assert isinstance(build_budget("counts"), CountBudget)


def test_acceptance_belongs_to_row_and_drafter_and_new_rows_start_from_the_drafters():
    budget = AutoBudget(cost=PassCost(StepCost({1: 1.0, 4: 1.0, 64: 9.0})))
    for _ in range(60):
        budget.observe("a", "good", 4, 4)
        budget.observe("a", "bad", 4, 0)
    new = [Candidate("b", name, 7) for name in ("good", "bad")]
    good, bad = budget.allocate(new)
    assert good > bad == 0
    budget.release("a")
    learnt = budget.acceptance
    assert not learnt.rows
    assert learnt.chance("b", "good", 0, 0) > 0.8 > 0.2 > learnt.chance("b", "bad", 0, 0)


def test_a_measured_profile_never_falls_with_more_tokens(target, monkeypatch):
    times = iter([0.5, 0.9, 0.1, 0.3, 0.2, 0.4, 0.6, 0.5, 0.7, 0.4, 0.8, 0.6, 0.9, 0.8, 1.0])
    monkeypatch.setattr(profile, "_seconds", lambda *_: next(times))
    seconds = list(profile.best(profile.measure(target, repeats=1)).values())
    assert seconds == sorted(seconds) and seconds[0] == 0.1
