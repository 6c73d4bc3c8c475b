"""What a caller brings along (drafters, budgets, criteria) may fail and never stops the engine."""

import pytest
import torch

from retort.decode.budget import FixedBudget
from retort.decode.draft import Draft
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, toy

NEW, K, VOCAB = 12, 3, 97
TEXTS = prompts((6, 9, 4))


@pytest.fixture(scope="module")
def model():
    return toy(eos_token_id=None)


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model) as engine:
        return [o.token_ids for o in engine.generate(TEXTS, max_new_tokens=NEW)]


class Given:
    """Drafts what a function makes of the longest length."""

    passes = False

    def __init__(self, make):
        self.make = make

    def propose(self, contexts):
        return [self.make(c.limit) for c in contexts]

    def release(self, request_id):
        pass


def q(n, value=1 / VOCAB, vocab=VOCAB):
    return torch.full((n, vocab), value, dtype=torch.float64)


WRONG = {
    "fewer rows than tokens": lambda n: Draft([5] * n, q(max(n - 1, 0))),
    "another vocabulary": lambda n: Draft([5] * n, q(n, vocab=5)),
    "NaN": lambda n: Draft([5] * n, q(n, torch.nan)),
    "infinite": lambda n: Draft([5] * n, q(n, torch.inf)),
    "negative": lambda n: Draft([5] * n, q(n, -0.5)),
    "no tensor": lambda n: Draft([5] * n, [[0.5]] * n),
    "no whole numbers": lambda n: [5.0] * n,
    "text": lambda n: ["a"] * n,
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_draft_that_cannot_be_weighed_is_none(model, kind):
    options = {"max_new_tokens": NEW, "do_sample": True}
    with Engine(model, verification="rejection") as engine:
        plain = [o.token_ids for o in engine.generate(TEXTS, **options)]
    drafter = Given(WRONG[kind])
    with Engine(model, drafter=drafter, draft_budget=K, verification="rejection") as engine:
        with pytest.warns(UserWarning, match="Given failed"):
            outputs = engine.generate(TEXTS, **options)
        assert [o.token_ids for o in outputs] == plain
        assert engine.stats.draft_tokens == 0


def test_a_right_q_is_weighed(model):
    drafter = Given(lambda n: Draft([5] * n, q(n)))
    with Engine(model, drafter=drafter, draft_budget=K, verification="rejection") as engine:
        outputs = engine.generate(TEXTS, max_new_tokens=NEW, do_sample=True)
        assert engine.stats.draft_tokens > 0
    assert all(o.finish_reason == "length" for o in outputs)


class BadBudget(FixedBudget):
    """Gives what a function makes of the number of rows, or fails where it should learn."""

    def __init__(self, make=None, failing=""):
        super().__init__(K)
        self.make, self.failing = make, failing

    def allocate(self, candidates):
        self._fail("allocate")
        return super().allocate(candidates) if self.make is None else self.make(len(candidates))

    def observe(self, *args):
        self._fail("observe")

    def time_step(self, *args):
        self._fail("time_step")

    def release(self, row):
        self._fail("release")

    def _fail(self, name):
        if name == self.failing:
            raise ValueError("budget")


@pytest.mark.parametrize(
    "budget",
    [
        BadBudget(lambda n: [-1] * n),
        BadBudget(lambda n: []),
        BadBudget(lambda n: [1.5] * n),
        *(BadBudget(failing=name) for name in ("allocate", "observe", "time_step", "release")),
    ],
    ids=["negative", "too few", "no whole numbers", "allocate", "observe", "time_step", "release"],
)
def test_a_bad_budget_costs_speed_and_nothing_else(model, expected, budget):
    answers = [p + e + [0] * K for p, e in zip(TEXTS, expected, strict=True)]
    with Engine(model, drafter=ScriptedDrafter("right", answers), draft_budget=budget) as engine:
        with pytest.warns(UserWarning, match="BadBudget failed"):
            outputs = engine.generate(TEXTS, max_new_tokens=NEW)
        assert [o.token_ids for o in outputs] == expected
        assert (engine.stats.accepted_tokens == 0) == (budget.failing in ("", "allocate"))


def test_a_drafter_that_cannot_let_go_does_not_keep_the_engine(model, expected):
    class Clings(Given):
        def release(self, request_id):
            raise RuntimeError("never")

    with Engine(model, drafter=Clings(lambda n: [5] * n), draft_budget=K) as engine:
        with pytest.warns(UserWarning, match="Clings failed"):
            outputs = engine.generate(TEXTS, max_new_tokens=NEW)
        assert [o.token_ids for o in outputs] == expected
        assert engine.target.cache.rows == ()


def test_who_writes_on_the_tokens_that_are_shown_changes_no_row(model, expected):
    class Scribbles(Given):
        def propose(self, contexts):
            for context in contexts:
                context.tokens.append(5)
            return super().propose(contexts)

    def criterion(tokens):
        tokens.clear()
        return False

    with Engine(model, drafter=Scribbles(lambda n: [5] * n), draft_budget=K) as engine:
        outputs = engine.generate(TEXTS, max_new_tokens=NEW, stopping_criteria=[criterion])
        assert [o.token_ids for o in outputs] == expected
        assert engine.stats.draft_tokens > 0


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_criterion_may_abort_any_request(model, expected, victim, waiting):
    """Its own, one that is behind it in the same pass, or one that still waits."""
    answers = [p + e + [0] * K for p, e in zip(TEXTS, expected, strict=True)]
    options = {"max_batch_size": 1 if waiting else 3, "draft_budget": K, "debug": True}
    with Engine(model, drafter=ScriptedDrafter("right", answers), **options) as engine:
        ids, said = [], []

        def abort(tokens):
            if len(tokens) == len(TEXTS[0]) + 6:
                said.append(engine.abort(ids[victim]))
            return False

        for i, text in enumerate(TEXTS):
            params = SamplingParams(max_new_tokens=NEW, stopping_criteria=[abort] * (i == 0))
            ids.append(engine.add_request(text, params))
        done = {}
        while engine.has_unfinished():
            done |= {o.request_id: o for o in engine.step()}
        assert engine.target.cache.rows == ()
    assert [done[i].finish_reason == "abort" for i in ids] == [n == victim for n in range(3)]
    for i, rid in enumerate(ids):
        assert done[rid].token_ids == (said[0].token_ids if i == victim else expected[i])
    assert said[0].token_ids == expected[victim][: len(said[0].token_ids)]


def test_generate_returns_what_a_criterion_aborted(model):
    with Engine(model, max_batch_size=1) as engine:
        ids = ["request-0", "request-2"]

        def abort(tokens):
            while len(tokens) > len(TEXTS[0]) + 2 and ids:
                engine.abort(ids.pop())
            return False

        outputs = engine.generate(TEXTS[:1] * 3, max_new_tokens=NEW, stopping_criteria=[abort])
    assert [o.finish_reason for o in outputs] == ["abort", "length", "abort"]


def test_a_fault_behind_the_verification_ends_its_row_alone(model, expected, monkeypatch):
    from retort.decode.seats import Seats

    rewind = Seats.rewind

    def faulty(self, request, length):
        if request.id == "request-1" and request.generated == 4:
            raise RuntimeError("rewind")
        rewind(self, request, length)

    monkeypatch.setattr(Seats, "rewind", faulty)
    with Engine(model) as engine:
        outputs = engine.generate(TEXTS, max_new_tokens=NEW)
        assert engine.target.cache.rows == ()
    assert [o.token_ids for o in outputs] == [expected[0], expected[1][:4], expected[2]]
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "RuntimeError: rewind")
