"""Selective scans: parallel, stepped and rescanned forms against the naive recurrence."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retort.ops import reference
from retort.ops.segments import convolve, cut
from retort.ops.selective_scan import (
    LONGEST,
    ScanInputs,
    linear_scan,
    read,
    scan_states,
    selective_scan,
)

N, D, K = 3, 5, 4
F64 = torch.float64


def problem(length, seed=0, dtype=F64, strong=1.0):
    """A, Δ, B, u and C of one flat axis; ``strong`` scales the decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    a, dt = -strong * normal(N, D).exp(), normal(length, D).exp()
    tensors = a, dt, normal(length, N), normal(length, D), normal(length, N)
    *inputs, c = (t.to(dtype).requires_grad_() for t in tensors)
    return ScanInputs(*inputs), c


def naive(inputs, c, lengths):
    """Outputs and states, each segment by the naive recurrence."""
    parts = [t.split(lengths) for t in (*inputs[1:], c)]
    states = [reference.selective_states(inputs.a, *part[:3]) for part in zip(*parts, strict=True)]
    zero = [h.new_zeros(len(h), D) for h in states]
    ys = [
        reference.dense_readout(c, h, z, []) for c, h, z in zip(parts[3], states, zero, strict=True)
    ]
    return torch.cat(ys), torch.cat(states)


def starts_of(lengths):
    sizes = torch.tensor(lengths)
    return sizes.cumsum(0) - sizes


def gradients(y, inputs, c):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    return torch.autograd.grad((y * weight).sum(), [*inputs, c], materialize_grads=True)


def by_pieces(inputs, c, lengths, size, step_limit):
    ys, state = [], None
    for piece in cut(lengths, size, K, step_limit):
        part = slice(piece.begin, piece.end)
        resume = None
        if piece.resumed:
            resume = torch.zeros(1, dtype=torch.long), state[None]
        h = scan_states(inputs.tokens(part), piece, resume)
        ys.append(read(c[part], h))
        state = h[-1]
    return torch.cat(ys)


LENGTHS = [[1], [23], [64], [7, 1, 30, 2, 2, 9], [65, 3, 5]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_every_form_equals_the_naive_recurrence_in_value_and_gradient(lengths, size):
    inputs, c = problem(sum(lengths))
    want, states = naive(inputs, c, lengths)
    want_grads = gradients(want, inputs, c)
    forms = {
        "rescan": selective_scan(inputs, c, starts_of(lengths), size),
        "chunked": by_pieces(inputs, c, lengths, size, 0),
        "recurrent": by_pieces(inputs, c, lengths, size, 10**6),
        "mixed": by_pieces(inputs, c, lengths, size, 5),
    }
    for name, got in forms.items():
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0, msg=name)
        grads = gradients(got, inputs, c)
        torch.testing.assert_close(grads, want_grads, atol=1e-10, rtol=1e-12)
    with torch.no_grad():  # in place
        got = by_pieces(inputs, c, lengths, size, 5)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert states.shape == (sum(lengths), N, D)


@pytest.mark.parametrize("strong", [1e-6, 1.0, 50.0, 1e4])
def test_any_decay_is_exact(strong):
    """Decays near 1 and decays that underflow: nothing is ever divided by a decay."""
    inputs, c = problem(130, strong=strong)
    want, _ = naive(inputs, c, [130])
    torch.testing.assert_close(
        selective_scan(inputs, c, starts_of([130]), 64), want, atol=1e-11, rtol=1e-12
    )
    torch.testing.assert_close(by_pieces(inputs, c, [130], 64, 0), want, atol=1e-11, rtol=1e-12)


def test_float32_is_close_to_float64():
    inputs, c = problem(600)
    want, _ = naive(inputs, c, [600])
    scale = want.abs().max() / 5
    single = ScanInputs(*(t.float() for t in inputs))
    for got in (
        selective_scan(single, c.float(), starts_of([600]), 64),
        by_pieces(single, c.float(), [600], 64, 0),
        by_pieces(single, c.float(), [600], 64, 600),
    ):
        torch.testing.assert_close(got.double() / scale, want / scale, atol=2e-4, rtol=0)


def test_a_state_to_start_from_is_used_and_gets_its_gradient():
    inputs, c = problem(40)
    whole = by_pieces(inputs, c, [40], 64, 0)
    for limit in (0, 100):
        (head,) = cut([15], 64, K, limit)
        (rest,) = cut([25], 64, K, limit)
        state = scan_states(inputs.tokens(slice(15)), head)[-1]
        given = state.detach().requires_grad_()
        resume = torch.zeros(1, dtype=torch.long), given[None]
        h = scan_states(inputs.tokens(slice(15, None)), rest, resume)
        torch.testing.assert_close(read(c[15:], h), whole[15:], atol=1e-12, rtol=0)
        (grad,) = torch.autograd.grad(h[-1].sum(), given)
        want = (inputs.a * inputs.dt[15:].sum(0)).exp()
        torch.testing.assert_close(grad, want, atol=1e-12, rtol=0)


def test_steps_give_the_same_bits_in_any_company():
    """A row's states do not depend on which rows are stepped with it."""
    lengths = [3, 1, 7, 2, 7]
    inputs, _ = problem(sum(lengths), dtype=torch.float32)
    inputs = ScanInputs(*(t.detach() for t in inputs))
    (piece,) = cut(lengths, 64, K, 8)
    together = scan_states(inputs, piece).split(lengths)
    at = 0
    for length, want in zip(lengths, together, strict=True):
        (piece,) = cut([length], 64, K, 8)
        got = scan_states(inputs.tokens(slice(at, at + length)), piece)
        assert torch.equal(got, want)
        at += length


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_convolution_stays_inside_its_segment(size):
    lengths = [9, 1, 2, 30, 3]
    torch.manual_seed(0)
    conv = nn.Conv1d(D, D, K, groups=D).double()
    x = torch.randn(sum(lengths), D, dtype=F64)
    want = torch.cat(
        [
            reference.causal_convolution(part, conv.weight[:, 0], conv.bias)
            for part in x.split(lengths)
        ]
    )
    got, carried = [], None
    for piece in cut(lengths, size, K, 0):
        history = x.new_zeros(len(piece.starts), K - 1, D)
        if piece.resumed:
            history[0] = carried
        y, carried = convolve(x[piece.begin : piece.end], history, conv, piece)
        got.append(y)
    torch.testing.assert_close(torch.cat(got), want, atol=1e-13, rtol=0)


class Count(TorchDispatchMode):
    """Number of operations that run."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(run):
    with Count() as count:
        run()
    return count.calls


def test_operations_do_not_grow_with_the_tokens_inside_a_chunk():
    forward, backward, states = [], [], []
    for length in (1, 8, 50, 64, 512, 1500):
        inputs, c = problem(length)
        one = starts_of([length])
        forward.append(operations(lambda i=inputs, c=c, s=one: selective_scan(i, c, s, LONGEST)))
        y = selective_scan(inputs, c, one, LONGEST).sum()
        backward.append(operations(y.backward))
        (piece,) = cut([length], LONGEST, K, 0)
        states.append(operations(lambda i=inputs, p=piece: scan_states(i, p)))
    for counts in (forward, backward, states):
        assert len(set(counts)) == 1, counts
        assert counts[0] < 1000


def test_the_longest_chunk_is_exact():
    decay = torch.rand(LONGEST, 2, dtype=F64)
    x = torch.randn(LONGEST, 2, dtype=F64)
    want, h = [], torch.zeros(2, dtype=F64)
    for t in range(LONGEST):
        h = x[t] + decay[t] * h
        want.append(h)
    got = linear_scan(decay, x, torch.tensor([0]))
    torch.testing.assert_close(got, torch.stack(want), atol=1e-12, rtol=0)
