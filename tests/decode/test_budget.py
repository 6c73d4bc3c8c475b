"""The budget: which rows draft how much, by what passes cost and rows accept."""

import pytest

from retort.decode.acceptance import Acceptance
from retort.decode.budget import AutoBudget, Candidate, FixedBudget, build_budget
from retort.decode.engine import Engine
from retort.errors import ConfigurationError
from tests.decode.budgets import budget_with, give
from tests.decode.toys import toy


def test_the_budget_drafts_while_passes_are_flat_and_stops_at_the_knee():
    rows = [str(i) for i in range(8)]
    assert sum(give(budget_with(128, 1.0, prior=0.8), rows, [7] * 8)) == 56
    assert sum(give(budget_with(8, 1.0, prior=0.8), rows, [7] * 8)) == 0
    some = give(budget_with(16, 0.5, prior=0.8), rows, [7] * 8)
    assert 0 < sum(some) <= 8


def test_rows_that_accept_more_get_more_and_hopeless_rows_get_none():
    budget = budget_with(6, 0.2)
    for _ in range(30):
        budget.observe("good", "d", 4, 4)
        budget.observe("bad", "d", 4, 0)
    good, bad = give(budget, ["good", "bad"], [7, 7])
    assert good >= 4 and bad == 0
    assert give(budget, ["good"], [2]) == [2]


def test_where_all_rows_are_waited_for_the_last_one_is_drafted_for():
    """A verified token costs what a decoded one does, and a pass of one row nearly as much as
    one of four: only what ends the last row earlier saves time."""

    def lengths(*left, prior=0.6):
        budget = budget_with(1, 0.1, prior=prior)
        return budget.allocate([Candidate(str(i), "d", 7, left=n) for i, n in enumerate(left)])

    assert lengths(None, None, None, None, prior=0.8) == lengths(40, 40, 40, 40, prior=0.8)
    assert sum(lengths(40, 40, 40, 40, prior=0.8)) > 0
    lagging = lengths(10, 40, 10, 10)
    assert lagging[1] >= 2 and sum(lagging) == lagging[1]
    assert lengths(0, 0) == lengths(None, None)


def test_a_batch_that_is_waited_for_tells_what_is_left_and_a_queue_does_not(monkeypatch):
    seen = []
    inner = AutoBudget.allocate

    def spy(self, candidates):
        seen.append([c.left for c in candidates])
        return inner(self, candidates)

    monkeypatch.setattr(AutoBudget, "allocate", spy)
    with Engine(toy(eos_token_id=None), drafter="prompt-lookup", max_batch_size=2) as engine:
        engine.generate([[5, 6, 7]] * 2, max_new_tokens=4)
        assert seen[0] == [3, 3]
        seen.clear()
        engine.generate([[5, 6, 7]] * 3, max_new_tokens=4)
        assert seen[0] == [None, None] and seen[-1] == [1]
        seen.clear()
        list(engine.stream([[5, 6, 7]] * 2, max_new_tokens=4))
        assert {n for step in seen for n in step} == {None}


def test_a_row_that_prolongs_a_longer_match_drafts_more():
    short, long = (give(budget_with(2, 0.3), ["a"], [7], match=m)[0] for m in (2, 8))
    assert long > short


def test_matches_learn_apart():
    learnt = Acceptance()
    for _ in range(40):
        learnt.observe("a", "d", 8, 3, 3)
        learnt.observe("a", "d", 2, 1, 0)
    learnt.release("a")
    assert learnt.chance("b", "d", 8, 0) > 0.9 and learnt.chance("b", "d", 2, 0) < 0.5
    assert learnt.chance("b", "d", 7, 1) == learnt.chance("b", "d", 8, 0)


def test_budgets_are_checked():
    assert isinstance(build_budget(3), FixedBudget)
    for bad in (-1, "some"):
        with pytest.raises(ConfigurationError, match="draft_budget"):
            build_budget(bad)
