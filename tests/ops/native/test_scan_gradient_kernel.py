"""Gradients of the native scan against those of the naive recurrence in float64."""

from __future__ import annotations

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops.native.scan import ragged_scan
from retort.ops.native.scan_gradient import TrainedRows, scan_gradient, trained_scan
from retort.ops.selective_scan import ScanInputs, selective_scan
from tests.ops.native.test_scan_kernel import SIZES, naive, part_of, problem

COUNTS = (1, 16, 40, 17, 3, 33, 15)


def leaves(inputs, c, dtype=torch.float32):
    """Copies that want gradients, A first, C last."""
    return [x.detach().to(dtype).requires_grad_() for x in (*inputs, c)]


def weighted(y, seed=5):
    """A number whose gradient is of any size and sign at every output."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return (y * weight.to(y.dtype)).sum()


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_those_of_the_naive_recurrence(isa, sizes):
    inputs, c, _ = problem(*sizes, COUNTS)
    rows = TrainedRows(COUNTS)
    ours, wide = leaves(inputs, c), leaves(inputs, c, torch.float64)
    y = trained_scan(ScanInputs(*ours[:4]), ours[4], rows)
    spans = zip(rows.scan.offsets, rows.scan.offsets[1:], strict=False)
    parts = [part_of(ScanInputs(*wide[:4]), wide[4], span) for span in spans]
    want = torch.cat([naive(x, read, None)[0] for x, read in parts])
    torch.testing.assert_close(y.double(), want, atol=3e-5, rtol=2e-5)
    found = torch.autograd.grad(weighted(y), ours)
    wanted = torch.autograd.grad(weighted(want), wide)
    for got, true in zip(found, wanted, strict=True):
        assert (got.double() - true).abs().max() < 2e-5 * true.abs().max() + 1e-6


def test_it_equals_its_twin_and_reads_no_more_than_its_columns(isa):
    inputs, c, _ = problem(19, 34, COUNTS)
    rows, starts = TrainedRows(COUNTS), torch.tensor([0, *COUNTS[:-1]]).cumsum(0)
    gapped = [x.detach().requires_grad_() for x in (*inputs, c)]  # NaN between their rows
    ours, twin = leaves(inputs, c), leaves(inputs, c)

    def gradients(tensors, scan, where):
        return torch.autograd.grad(
            weighted(scan(ScanInputs(*tensors[:4]), tensors[4], where)), tensors
        )

    found, dense = (gradients(tensors, trained_scan, rows) for tensors in (gapped, ours))
    theirs = gradients(twin, selective_scan, starts)
    for got, same, wanted in zip(found, dense, theirs, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_the_bits_do_not_depend_on_threads_and_a_rows_not_on_its_company(isa):
    inputs, c, _ = problem(16, 260, COUNTS)
    rows, grad = TrainedRows(COUNTS), torch.randn(sum(COUNTS), 260)

    def run(count, inputs=inputs, c=c, rows=rows, grad=grad):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        kept = torch.empty(len(rows.scan.kept), *inputs.a.shape)
        ragged_scan(inputs, c, rows.scan, kept[:0], kept)
        found = scan_gradient(inputs, c, rows, kept, grad)
        torch.set_num_threads(before)
        return found

    one, two = run(1), run(2)
    assert all(map(torch.equal, one, two))
    span = slice(17, 57)  # the third row
    alone = run(1, *part_of(inputs, c, (17, 57)), TrainedRows((40,)), grad[span])
    assert all(torch.equal(a, b[span]) for a, b in zip(alone[1:], one[1:], strict=True))


def test_what_does_not_fit_is_refused():
    inputs, c, _ = problem(5, 3, (4, 6))
    with pytest.raises(ConfigurationError, match="do not make 10"):
        trained_scan(inputs, c, TrainedRows((4, 5)))
    kept, grad = torch.empty(0, 5, 3), torch.randn(10, 3)
    with pytest.raises(ConfigurationError, match="grad"):
        scan_gradient(inputs, c, TrainedRows((4, 6)), kept, grad[:, :2])
    with pytest.raises(ConfigurationError, match="kept"):
        scan_gradient(inputs, c, TrainedRows((4, 6)), torch.empty(1, 5, 3), grad)
