"""Excess accumulated error against the definition, sum by sum."""

import math

import pytest
import torch

from retort.errors import ConfigurationError
from retort.evaluate.exposure import exposure_bias
from tests.evaluate.tiny import tiny_llama

OWN = [([1, 2], [3, 4, 5]), ([7], [8, 9])]
ORACLE = [([1, 2], [6, 6, 6, 6]), ([7], [5])]


def kl(teacher, student, prompt, completion, t):
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *completion[:t]]])
        p, q = (m(ids).logits[0, -1].softmax(-1) for m in (teacher, student))
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def test_it_is_the_papers_definition():
    teacher, student = tiny_llama(0), tiny_llama(1)

    def mean(texts, t):
        alive = [(p, c) for p, c in texts if len(c) > t]
        return sum(kl(teacher, student, p, c, t) for p, c in alive) / len(alive)

    length = 3  # what both kinds reach
    accumulated = sum(mean(OWN, t) for t in range(length))
    per_step = sum(mean(ORACLE, t) for t in range(length)) / length
    found = exposure_bias(teacher, student, OWN, ORACLE, chunk_size=2)
    assert found.length == length
    assert found.accumulated == pytest.approx(accumulated, rel=1e-9)
    assert found.per_step == pytest.approx(per_step, rel=1e-9)
    assert found.excess == pytest.approx((accumulated / per_step - length) / length * 100)


def test_a_student_on_its_teachers_text_has_no_excess():
    found = exposure_bias(tiny_llama(0), tiny_llama(1), ORACLE, ORACLE)
    assert found.excess == pytest.approx(0, abs=1e-9) and found.length == 4


def test_a_perfect_student_has_no_ratio():
    model = tiny_llama(0)
    assert math.isnan(exposure_bias(model, model, OWN, ORACLE).excess)


def test_no_texts_are_refused():
    with pytest.raises(ConfigurationError, match="texts of the student"):
        exposure_bias(tiny_llama(0), tiny_llama(1), [], ORACLE)
