"""Ragged scan and convolution against the naive recurrences, and a row's bits in any company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retort.errors import ConfigurationError
from retort.ops import reference
from retort.ops.native.activation import activation
from retort.ops.native.scan import ScanRows, ragged_convolution, ragged_scan
from retort.ops.selective_scan import ScanInputs

NAN = float("nan")
COUNTS = (1, 40, 3, 1, 70, 8)
INITIAL = (-1, 2, 0, 1, -1, 3)
SIZES = [(5, 3), (16, 129), (19, 34), (32, 16)]  # states, channels


def problem(states, channels, counts=COUNTS):
    """Inputs and C of all rows, in memory with gaps that hold NaN, and states to start from."""
    torch.manual_seed(states)
    total = sum(counts)

    def gapped(width):
        memory = torch.full((total, width + 3), NAN)
        memory[:, :width] = torch.randn(total, width)
        return memory[:, :width]

    dt = gapped(channels)
    dt.abs_()
    a = -torch.rand(states, channels).exp()
    inputs = ScanInputs(a, dt, gapped(states), gapped(channels))
    return inputs, gapped(states), torch.randn(4, states, channels)


def part_of(inputs, c, span):
    part = slice(*span)
    return ScanInputs(inputs.a, *(x[part] for x in inputs[1:])), c[part]


def naive(inputs, c, initial):
    """Outputs and states of one row in float64."""
    a, dt, b, u = (x.double() for x in inputs)
    h = torch.zeros_like(a) if initial is None else initial.double()
    states = []
    for t in range(len(u)):
        h = (dt[t] * a).exp() * h + (dt[t] * u[t]) * b[t][:, None]
        states.append(h)
    states = torch.stack(states)
    return torch.einsum("tn,tnd->td", c.double(), states), states


@pytest.mark.parametrize("sizes", SIZES)
def test_scan_equals_the_naive_recurrence(isa, sizes):
    inputs, c, initial = problem(*sizes)
    kept = ((0, 1), (11, 0), (40, 5), (122, 3))
    out = torch.full((7, *sizes), NAN)
    rows = ScanRows(COUNTS, INITIAL, kept)
    y = ragged_scan(inputs, c, rows, initial, out)
    assert ragged_scan(inputs, None, rows, initial, again := torch.full_like(out, NAN)) is None
    assert torch.equal(again.nan_to_num(), out.nan_to_num())
    states = []
    for i, span in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
        start = None if INITIAL[i] < 0 else initial[INITIAL[i]]
        want, h = naive(*part_of(inputs, c, span), start)
        torch.testing.assert_close(y[slice(*span)].double(), want, atol=3e-5, rtol=2e-5)
        states.append(h)
    states = torch.cat(states)
    for token, place in kept:
        torch.testing.assert_close(out[place].double(), states[token], atol=1e-5, rtol=1e-5)
    assert out[[2, 4, 6]].isnan().all()
    assert torch.equal(naive(*part_of(inputs, c, (1, 41)), None)[1][3:4], _reference(inputs))


def _reference(inputs):
    """The fourth state of the second row by the reference of the other tests."""
    a, dt, b, u = (x.double() for x in inputs)
    return reference.selective_states(a, dt[1:41], b[1:41], u[1:41])[3:4]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_rows_bits_ignore_its_company_the_cuts_and_the_threads(isa, sizes):
    inputs, c, initial = problem(*sizes)
    rows = ScanRows(COUNTS, INITIAL)
    together = ragged_scan(inputs, c, rows, initial)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ragged_scan(inputs, c, rows, initial), together)
    finally:
        torch.set_num_threads(before)
    for i, (begin, end) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
        states = torch.cat([initial, initial[:1] * NAN])
        at, where = begin, INITIAL[i]
        while at < end:  # by pieces of growing size, each from the kept state of the one before
            stop = min(end, 2 * at - begin + 1)
            one = ScanRows((stop - at,), (where,), ((stop - at - 1, 4),))
            y = ragged_scan(*part_of(inputs, c, (at, stop)), one, states, states)
            assert torch.equal(y, together[at:stop])
            at, where = stop, 4


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("channels", [3, 16, 133])
def test_convolution_equals_its_definition(isa, channels, kernel):
    torch.manual_seed(channels)
    wide = torch.full((sum(COUNTS), channels + 2), NAN)
    x = wide[:, :channels]
    x.normal_()
    history = torch.randn(len(COUNTS), kernel - 1, channels)
    weight, bias = torch.randn(channels, kernel), torch.randn(channels)
    got = ragged_convolution(x, history, weight, bias, COUNTS)
    wants = []
    for i, row in enumerate(x.split(COUNTS)):
        fed = torch.cat([history[i], row]).double().t()[None]
        out = F.conv1d(fed, weight.double()[:, None], bias.double(), groups=channels)
        wants.append(out[0].t())
        alone = ragged_convolution(row, history[i : i + 1], weight, bias, COUNTS[i : i + 1])
        assert torch.equal(alone, got.split(COUNTS)[i])
    torch.testing.assert_close(got.double(), torch.cat(wants), atol=5e-6, rtol=1e-5)
    gated = ragged_convolution(x, history, weight, bias, COUNTS, silu=True)
    assert torch.equal(gated, activation("silu", got))
    bare = ragged_convolution(x, history, weight, None, COUNTS)
    torch.testing.assert_close(bare + bias, got, atol=1e-6, rtol=1e-6)


def test_no_rows(isa):
    inputs, c, initial = problem(5, 3, ())
    assert ragged_scan(inputs, c, ScanRows((), ()), initial).shape == (0, 3)
    none = torch.empty(0, 3)
    assert ragged_convolution(none, torch.empty(0, 1, 3), torch.ones(3, 2), None, ()).shape == (
        0,
        3,
    )


def test_bad_input_is_refused():
    inputs, c, initial = problem(5, 3, (4, 2))

    def call(rows=None, **changes):
        return ragged_scan(
            inputs._replace(**changes), c, rows or ScanRows((4, 2), (-1, 0)), initial, initial
        )

    assert call().isfinite().all()
    x, weight = torch.randn(6, 3), torch.randn(3, 4)
    for bad in (
        lambda: call(dt=inputs.dt.double()),
        lambda: call(u=inputs.u[:, :2]),
        lambda: call(b=inputs.b.t().contiguous().t()),
        lambda: call(a=inputs.a.t()),
        lambda: call(ScanRows((4, 3), (-1, 0))),
        lambda: call(ScanRows((6, 0), (-1, 0))),
        lambda: call(ScanRows((4, 2), (-1, 4))),
        lambda: call(ScanRows((4, 2), (-1,))),
        lambda: call(ScanRows((4, 2), (-1, 0), ((3, 9),))),
        lambda: call(ScanRows((4, 2), (-1, 0), ((3, -1),))),
        lambda: call(ScanRows((4, 2), (-1, 0), ((3, 1), (2, 2)))),
        lambda: call(ScanRows((4, 2), (-1, 0), ((6, 1),))),
        lambda: ragged_convolution(x, torch.zeros(2, 2, 3), weight, None, (4, 2)),
        lambda: ragged_convolution(x, torch.zeros(2, 3, 3), weight, None, (4, 3)),
        lambda: ragged_convolution(x, torch.zeros(2, 3, 3), weight.double(), None, (4, 2)),
        lambda: ragged_convolution(x, torch.zeros(2, 3, 3), weight, weight[:2, 0], (4, 2)),
    ):
        with pytest.raises(ConfigurationError):
            bad()
