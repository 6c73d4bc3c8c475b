"""Gumbel races of the native core against the noise computed token by token."""

import pytest
import torch

from retort.decode import sampling
from retort.errors import ConfigurationError
from retort.ops.native.race import MARGIN, ROOM, shortlist

SIZES = [1, 3, 16, 63, 512, 1031]


def states(rows):
    torch.manual_seed(rows)
    return torch.randint(-(2**63), 2**63 - 1, (rows,))


def noise(state, vocab):
    """Exact noise ``[rows, vocab]`` of states."""
    return sampling._noise(sampling._mix(torch.arange(vocab) * sampling._GOLDEN + state[:, None]))


def inside(scores):
    """The same scores within a buffer whose every other place would win."""
    rows, vocab = scores.shape
    buffer = torch.full((rows + 2, vocab + 9), torch.inf).double()
    buffer[1:-1, 5 : vocab + 5] = scores
    return buffer[1:-1, 5 : vocab + 5]


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_winner_is_on_the_list(isa, vocab, threads):
    state, before = states(7), torch.get_num_threads()
    scores = torch.randn(7, vocab).double() * 4
    scores[1, ::2] = -torch.inf
    scores[2] = torch.nan
    scores[3] = -torch.inf
    total = noise(state, vocab) + scores
    torch.set_num_threads(threads)
    try:
        rows, tokens = shortlist(inside(scores), state)
    finally:
        torch.set_num_threads(before)
    assert len(rows) < 7 * threads * 3
    for row in range(7):
        listed = tokens[rows == row].tolist()
        assert listed == sorted(listed)
        if row in (2, 3) or (row == 1 and vocab == 1):
            assert listed == []
        else:
            assert int(total[row].argmax()) in listed


@pytest.mark.parametrize("vocab", [29, 600])
def test_noise_is_good_to_a_tenth_of_the_margin(isa, vocab):
    """Scores that undo the noise leave a staircase whose steps must come out in order."""
    state = states(5)
    stairs = torch.full((5, vocab), -1.0).double()
    stairs[:, :20] = torch.arange(20).double() * (MARGIN / 10)
    rows, tokens = shortlist(stairs - noise(state, vocab), state)
    for row in range(5):
        near = tokens[rows == row].tolist()
        assert set(near) <= set(range(20)) and {11, 12, 18, 19} <= set(near)
        assert 8 not in near  # 1.1 margins below the best


def test_too_many_near_the_best_are_none(isa):
    state = states(2)
    assert shortlist(-noise(state, 4 * ROOM), state) is None
    wanted = sampling._draw(-noise(state[:1], 600), 3, 4, 0)
    assert torch.equal(sampling.draw(-noise(state[:1], 600), 3, 4), wanted)


@pytest.mark.parametrize("vocab", [512, 513, 4099])
def test_draws_are_those_of_the_definition(isa, vocab):
    scores = torch.randn(9, vocab).double() * 4
    scores[0, ::3], scores[1], scores[2, 5:] = -torch.inf, torch.nan, -torch.inf
    key, index = states(9)[:, None], torch.arange(9)[:, None]
    found = sampling._race(scores, key, index, sampling.DRAFT)
    assert torch.equal(found, sampling._draw(scores, key, index, sampling.DRAFT))
    assert int(sampling.draw(scores[3], int(key[3]), 3, sampling.DRAFT)) == found[3]


def test_wrong_tensors_are_refused(isa):
    with pytest.raises(ConfigurationError, match="float64"):
        shortlist(torch.zeros(2, 600), states(2))
    with pytest.raises(ConfigurationError, match="2 rows need"):
        shortlist(torch.zeros(2, 600).double(), states(3))
