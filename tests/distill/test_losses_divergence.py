"""Divergences against the float64 reference, their limits, and the registry."""

import pytest
import torch

from retort.distill.losses import (
    DIVERGENCES,
    AcceptanceMetric,
    DivergenceTerm,
    TokenRows,
    divergence,
)
from retort.distill.signals import DenseSignal
from retort.errors import ConfigurationError
from tests.distill import naive
from tests.distill.cases import KINDS, SHAPES, assert_same, random_case

FAMILY = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.3}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ("total_variation", {}),
]


@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "parameters"), FAMILY)
def test_value_and_gradient_equal_the_reference(name, parameters, shape, k):
    for seed, temperature in [(0, 1.0), (1, 2.5)]:
        case = random_case(shape, k, seed)
        result = DivergenceTerm(divergence(name, **parameters))(case.rows(temperature))
        reference = naive.divergence_sum(
            name, case.naive, case.logits, case.targets, case.width, temperature, **parameters
        )
        assert_same(result.total, reference, case.logits)
        assert result.count == (case.targets != naive.IGNORED).sum()


def test_every_registered_divergence_is_tested_and_zero_between_equals():
    assert {name for name, _ in FAMILY} == set(DIVERGENCES)
    logs = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)
    for name, parameters in FAMILY:
        values = divergence(name, **parameters)(logs, logs)
        assert values.abs().max() < 1e-12, name


@pytest.mark.parametrize(
    ("name", "parameters", "limit"),
    [
        ("jsd", {"beta": 0.0}, "forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("skew_forward_kl", {"alpha": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl"),
        ("alpha_beta", {"alpha": 1.0, "beta": 0.0}, "forward_kl"),
        ("alpha_beta", {"alpha": 0.0, "beta": 1.0}, "reverse_kl"),
    ],
)
def test_limits(name, parameters, limit):
    p, q = torch.randn(2, 5, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(divergence(name, **parameters)(p, q), divergence(limit)(p, q))


@pytest.mark.parametrize("ends", [(0.4, 0.0), (0.0, 0.6)])
def test_alpha_beta_is_continuous_where_one_parameter_vanishes(ends):
    p, q = torch.randn(2, 5, 9, dtype=torch.float64).log_softmax(-1)
    near = [max(end, 1e-6) for end in ends]
    at, beside = (divergence("alpha_beta", alpha=a, beta=b)(p, q) for a, b in (ends, near))
    torch.testing.assert_close(at, beside, rtol=1e-4, atol=1e-4)


def test_acceptance_is_one_minus_total_variation_without_gradient():
    case = random_case(SHAPES[0], seed=3)
    accepted = AcceptanceMetric()(case.rows())
    distance = DivergenceTerm(divergence("total_variation"))(case.rows())
    torch.testing.assert_close(accepted.mean(), 1 - distance.mean())
    assert not accepted.total.requires_grad
    assert torch.equal(AcceptanceMetric()(case.rows(temperature=3.0)).total, accepted.total)


def test_logits_masked_with_infinity_give_finite_losses_and_gradients():
    teacher = torch.randn(3, 8)
    teacher[:, 5:] = -torch.inf
    student = torch.randn(3, 8).masked_fill(torch.arange(8) > 6, -torch.inf).requires_grad_()
    for name, parameters in FAMILY:
        rows = TokenRows(student, torch.zeros(3, dtype=torch.long), DenseSignal(teacher))
        total = DivergenceTerm(divergence(name, **parameters))(rows).total
        gradient = torch.autograd.grad(total, student)[0]
        assert total.isfinite() and gradient.isfinite().all(), name


def test_half_precision_logits_are_widened():
    logits = torch.randn(3, 9).bfloat16()
    rows = TokenRows(logits, torch.zeros(3, dtype=torch.long), DenseSignal(logits + 1))
    assert rows.student.dtype == rows.teacher.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("wasserstein", {}, "wasserstein"),
        ("forward_kl", {"beta": 0.5}, "beta"),
        ("jsd", {"beta": 1.5}, "1.5"),
        ("skew_forward_kl", {"alpha": -0.1}, "-0.1"),
        ("alpha_beta", {"alpha": 0.0, "beta": 0.0}, "alpha"),
    ],
)
def test_bad_configuration_is_named_before_training(name, parameters, said):
    with pytest.raises(ConfigurationError, match=said):
        divergence(name, **parameters)
