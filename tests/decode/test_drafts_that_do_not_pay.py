"""Drafts that lose time: they soon stop, and are tried again now and then."""

import pytest

from retort.decode.engine import Engine
from tests.decode.budgets import budget_with, give
from tests.decode.toys import toy


def test_a_slow_drafter_is_not_asked():
    budget = budget_with(64, 1.0)
    budget.time_draft("d", 5.0)
    assert give(budget, ["a"], [7], True) == [0]
    assert give(budget, ["a"], [7]) != [0]


def test_a_failed_row_is_tried_again_in_the_end():
    budget = budget_with(2, 0.6)
    for _ in range(60):
        budget.observe("a", "d", 2, 0)
    first = give(budget, ["a"], [4])
    later = [give(budget, ["a"], [4]) for _ in range(2000)]
    assert first == [0] and any(any(x) for x in later)


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_hopeless_drafter_loses_little_of_the_time_after_its_first_steps(rows, passes):
    """The clock of a machine on which a verified token costs what a decoded one does."""
    budget, names = budget_with(rows, 0.25 / rows), [str(i) for i in range(rows)]
    budget.time_draft("d", 0.1 / rows)
    total = 0.0
    for step in range(4000):
        lengths = give(budget, names, [7] * rows, passes, match=0 if passes else 2)
        extra = 0.25 * sum(lengths) / rows + 0.1 / rows * max(lengths) * passes
        budget.time_step(rows, rows + sum(lengths), 1.0 + 0.25 * sum(lengths) / rows)
        for name, n in zip(names, lengths, strict=True):
            if n:
                budget.observe(name, "d", n, 0, 0 if passes else 2)
        total += extra if step >= 200 else 0.0
    assert 0 < total < 0.015 * 3800


def test_only_one_row_of_a_model_drafter_tries_again():
    """Each row that tries again reads all that it missed."""
    budget, names = budget_with(4, 0.05), list("abcd")
    for name in names * 20:
        budget.observe(name, "d", 2, 0)
    tried = set()
    for _ in range(4000):
        lengths = give(budget, names, [4] * 4, passes=True)
        tried |= {name for name, n in zip(names, lengths, strict=True) if n}
        for name in tried:
            budget.observe(name, "d", 1, 0)
    assert len(tried) == 1


def test_drafts_that_cost_more_than_was_thought_use_the_credit_up():
    """Every draft is accepted, and yet passes with drafts lose: the clock has the last word."""
    budget, drafted = budget_with(64, 1.0, prior=0.9), 0
    budget.cost.record = lambda *_: None  # a cost model that never learns
    for _ in range(400):
        n = give(budget, ["a"], [4])[0]
        drafted += bool(n)
        budget.time_step(1, 1 + n, 8.0 if n else 1.0)
        if n:
            budget.observe("a", "d", n, n)
    assert 0 < drafted < 12


def test_where_every_pass_has_drafts_a_plain_one_is_due_now_and_then():
    budget, plain = budget_with(128, 0.0, prior=0.9), 0
    for _ in range(400):
        n = sum(give(budget, ["a", "b"], [4, 4]))
        budget.time_step(2, 2 + n, 1.0)
        plain += n == 0
    assert 400 / 17 - 1 <= plain <= 400 / 16 + 4
    assert budget.cost.plain == {2: 1.0}


class Eager:
    """Drafts something at every step, and counts how often it is asked."""

    passes, asked = False, 0

    def propose(self, contexts):
        self.asked += 1
        return [[5] * min(c.limit, 3) for c in contexts]

    def release(self, request_id):
        pass


@pytest.mark.parametrize(
    ("rows", "new", "budget", "least", "most"),
    [
        (1, 30, budget_with(1, 9.0), 0.9, 1.0),
        (1, 400, budget_with(1, 9.0), 0.25, 0.4),
        (8, 60, budget_with(1, 9.0), 0.2, 0.4),
        (8, 60, 3, 0.9, 1.0),
    ],
)
def test_where_drafts_never_pay_drafters_are_asked_less_often(rows, new, budget, least, most):
    """The first eight steps; then every fifth of eight rows; one row at first at every step."""
    drafter = Eager()
    model = toy(eos_token_id=None, max_position_embeddings=512)
    with Engine(model, drafter=drafter, draft_budget=budget) as engine:
        engine.generate([[5, 6, 7]] * rows, max_new_tokens=new)
        assert (engine.stats.draft_tokens > 0) == (budget == 3)
        assert least < drafter.asked / (engine.stats.steps - 1) <= most
