"""Revised texts against a student's own: both measures by hand, and their intervals."""

import pytest
import torch

from retort.errors import ConfigurationError
from retort.evaluate.exposure import exposure_bias
from retort.evaluate.revision import revision_gain
from tests.evaluate.tiny import tiny_llama

PROMPTS = [[1, 2], [7], [4, 4, 5], [11, 3]]
OWN = [[3, 4, 5], [8, 9], [6], [2, 2, 2, 2]]
REVISED = [[3, 9, 1, 1], [8, 9], [7, 8], [2, 5]]
ORACLE = [[6, 6, 6, 6], [5], [1, 2], [9, 8, 7]]


def examples(completions):
    return list(zip(PROMPTS, completions, strict=True))


def nll(model, prompt, completion):
    ids = [*prompt, *completion]
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:t]])).logits[0, -1] for t in range(len(prompt), len(ids))]
    losses = [-row.softmax(-1)[y].log() for row, y in zip(rows, completion, strict=True)]
    return float(sum(losses) / len(losses))


def test_both_measures_are_their_definitions():
    teacher, student = tiny_llama(0), tiny_llama(1)
    own, revised, oracle = map(examples, (OWN, REVISED, ORACLE))
    gain = revision_gain(teacher, student, own, revised, oracle, samples=200)
    means = [sum(nll(teacher, *e) for e in texts) / 4 for texts in (own, revised)]
    assert [gain.nll_own, gain.nll_revised] == pytest.approx(means, rel=1e-9)
    assert gain.nll.difference == pytest.approx(means[1] - means[0], rel=1e-9)
    biases = [exposure_bias(teacher, student, texts, oracle).excess for texts in (own, revised)]
    assert [gain.excess_own, gain.excess_revised] == pytest.approx(biases, rel=1e-9)
    assert gain.excess.difference == pytest.approx(biases[1] - biases[0], rel=1e-9)
    for found in gain.nll, gain.excess:
        assert found.low <= found.difference <= found.high and found.pairs == 4
    assert gain.changed == 3


def test_texts_that_nobody_changed_have_no_gain():
    teacher, student = tiny_llama(0), tiny_llama(1)
    own = examples(OWN)
    gain = revision_gain(teacher, student, own, own, examples(ORACLE), samples=50)
    assert gain.nll.difference == gain.excess.difference == gain.changed == 0
    assert not (gain.nll.separable or gain.excess.separable)


def test_a_teachers_own_text_is_separably_better():
    """Sampling noise apart, its likeliest tokens have the lowest NLL."""
    teacher, student = tiny_llama(0), tiny_llama(1)

    def greedy(prompt):
        text = []
        for _ in range(4):
            text.append(int(teacher(torch.tensor([[*prompt, *text]])).logits[0, -1].argmax()))
        return text

    best = examples([greedy(prompt) for prompt in PROMPTS])
    gain = revision_gain(teacher, student, examples(OWN), best, examples(ORACLE), samples=500)
    assert gain.nll.separable and gain.nll.high < 0


@pytest.mark.parametrize("lists", [(OWN[:3], REVISED, ORACLE), (OWN, REVISED, ORACLE[:1])])
def test_lists_of_other_prompts_are_refused(lists):
    pairs = [list(zip(PROMPTS, texts, strict=False)) for texts in lists]
    with pytest.raises(ConfigurationError, match="same prompts"):
        revision_gain(tiny_llama(0), tiny_llama(1), *pairs)
