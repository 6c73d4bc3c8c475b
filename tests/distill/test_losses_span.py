"""The span loss against the float64 reference, dense and over the union of top-k ids."""

import pytest
import torch

from retort.distill.losses import SPAN_DISTANCES, SpanTerm, TokenRows
from retort.distill.signals import DenseSignal
from retort.errors import ConfigurationError
from tests.distill import naive
from tests.distill.cases import KINDS, SHAPES, assert_same, random_case


@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", sorted(SPAN_DISTANCES))
def test_value_and_gradient_equal_the_reference(distance, shape, k):
    for seed, temperature in [(0, 1.0), (1, 1.7)]:
        case = random_case(shape, k, seed)
        result = SpanTerm(distance)(case.rows(temperature))
        reference = naive.span_sum(
            case.naive, case.logits, case.pairs, case.width, distance, temperature
        )
        assert_same(result.total, reference, case.logits)
        assert result.count == case.pairs[:-1].sum()


def test_a_signal_of_all_ids_equals_the_dense_one():
    teacher, student = torch.randn(2, 6, 8, dtype=torch.float64)
    dense, targets = DenseSignal(teacher), torch.zeros(6, dtype=torch.long)
    totals = [
        SpanTerm(distance)(TokenRows(student, targets, signal, torch.ones(6).bool())).total
        for distance in sorted(SPAN_DISTANCES)
        for signal in (dense, dense.top_k(8))
    ]
    torch.testing.assert_close(totals[::2], totals[1::2])


def test_equal_models_have_no_loss_and_no_pairs_count_nothing():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets, none = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
    equal = SpanTerm()(TokenRows(logits, targets, DenseSignal(logits.detach()), ~none))
    assert equal.total < 1e-20 and equal.count == 3
    empty = SpanTerm()(TokenRows(logits, targets, DenseSignal(logits.detach()), none))
    assert empty.total == 0 and empty.count == 0 and empty.total.requires_grad
    assert empty.mean() == 0


def test_bad_distance_and_missing_pairs_are_named():
    with pytest.raises(ConfigurationError, match="cosine"):
        SpanTerm("cosine")
    logits = torch.randn(2, 5)
    with pytest.raises(ConfigurationError, match="pairs"):
        SpanTerm()(TokenRows(logits, torch.zeros(2, dtype=torch.long), DenseSignal(logits)))
