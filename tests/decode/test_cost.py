"""What a pass costs: measured once, corrected by the passes that are run."""

import pytest

from retort.decode.cost import PassCost, StepCost


def test_step_cost_interpolates_and_follows_drift():
    cost = StepCost({4: 1.0, 8: 3.0})
    assert cost.seconds(6) == 2.0
    assert cost.seconds(12) == 5.0
    assert cost.seconds(1) == 1.0
    for _ in range(50):
        cost.record(4, 2.0)
    assert cost.seconds(4) == pytest.approx(2.0, rel=0.01)
    assert cost.seconds(8) > 3.4  # a neighbour follows, more slowly


def test_plain_passes_are_timed_live_and_drafts_add_what_they_added():
    profile = StepCost({1: 1.0, 4: 1.0, 16: 4.0, 32: 8.0})
    cost = PassCost(profile)
    assert cost.seconds(16) == 4.0 and cost.seconds(16, 16) == 8.0
    for _ in range(60):
        cost.record(16, 0, 10.0)  # long rows: a plain pass takes more than the profile says
    assert cost.seconds(16) == pytest.approx(10.0) and cost.seconds(16, 16) == pytest.approx(14.0)
    for _ in range(60):
        cost.record(16, 16, 18.0)  # and so do drafts
    assert cost.seconds(16, 16) == pytest.approx(18.0, rel=0.02)
    assert cost.seconds(16) == pytest.approx(10.0)
    assert cost.seconds(8) == pytest.approx(10.0 * 2.0 / 4.0)  # another number of rows: by profile
    assert cost.seconds(1, 3) > cost.seconds(1)  # no draft is free


def test_what_drafts_cost_is_learnt_by_the_number_of_rows_and_firmly_from_many():
    cost = PassCost(StepCost({1: 1.0, 64: 1.0}))
    for rows in (1, 8):
        cost.record(rows, 0, 1.0)
    cost.record(8, 10, 2.0)
    many = cost.seconds(8, 2) - 1.0
    assert many == pytest.approx(2 * 0.1 / 3), "ten drafts took 0.1 each: a third is believed"
    assert cost.seconds(6, 2) == cost.seconds(8, 2), "the nearest number of rows that was seen"
    for _ in range(50):
        cost.record(1, 1, 1.0)
    assert cost.seconds(8, 2) - 1.0 == many > 2 * (cost.seconds(1, 2) - 1.0)
    for _ in range(10):
        cost.regain(1)
    assert cost.seconds(8, 2) - 1.0 == many
    few = PassCost(StepCost({1: 1.0, 64: 1.0}))
    few.record(8, 0, 1.0)
    few.record(8, 1, 1.1)
    assert few.seconds(8, 2) - 1.0 < many / 2, "one draft says little"


def test_a_disturbed_plain_pass_does_not_count():
    cost = PassCost(StepCost({1: 1.0, 16: 2.0}))
    for seconds in (9.0, 1.0, 1.1, 0.9, 1.0):
        cost.record(4, 0, seconds)
    assert cost.seconds(4) == 1.0
