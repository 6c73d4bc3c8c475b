"""The selective scan of Mamba (arXiv 2312.00752): by steps, in parallel, and chunk by chunk.

h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t and y_t = C_t·h_t, on a flat token axis (see `segments`).
Shapes: n tokens, N states a channel, D channels; A is ``[N, D]``, Δ and u ``[n, D]``, B and C
``[n, N]``, h ``[n, N, D]``, all in float32 or float64. D is innermost, so that every operation
runs along contiguous channels.

A scan inside a chunk has no loop over its tokens: `_scan_` works on every 8th token at once, and
on every 64th, 512th and 4096th after that, always `LEVELS` levels. The number of operations is
the same for any chunk of up to `LONGEST` tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.ops.segments import Piece

RADIX, LEVELS = 8, 4
LONGEST = RADIX**LEVELS
"""The longest chunk."""


Pair = tuple[Tensor, Tensor]


class ScanInputs(NamedTuple):
    """What drives one layer's recurrence: A ``[N, D]``, Δ ``[n, D]``, B ``[n, N]``, u ``[n, D]``.

    A, Δ, B and u may have the same further dimensions in front.
    """

    a: Tensor
    dt: Tensor
    b: Tensor
    u: Tensor

    def discretise(self, out: tuple[Tensor | None, Tensor | None] = (None, None)) -> Pair:
        """exp(Δ A) and Δ B u, each ``[n, N, D]``: new, or in the tensors ``out``.

        The only place where they are computed, so that a replay repeats a pass's bits.
        """
        decay = torch.mul(self.dt.unsqueeze(-2), self.a, out=out[0]).exp_()
        scaled = (self.dt * self.u).unsqueeze(-2)
        return decay, torch.mul(scaled, self.b.unsqueeze(-1), out=out[1])

    def tokens(self, part: slice) -> ScanInputs:
        """The inputs of some tokens."""
        return ScanInputs(self.a, self.dt[part], self.b[part], self.u[part])


def read(c: Tensor, h: Tensor) -> Tensor:
    """y_t = C_t·h_t: ``[n, D]`` of ``[n, N]`` and ``[n, N, D]``."""
    return (c.unsqueeze(1) @ h).squeeze(1)


# Inside one chunk


def _scan_(decay: Tensor, x: Tensor, reverse: bool = False, levels: int = LEVELS) -> None:
    """x becomes h with h_t = x_t + decay_t h_{t∓1}, in place; ``decay`` is used up.

    Blocks of 8 first, then their last tokens (the first ones in reverse) by recursion, then
    the rest of each block from the representative of the block before.
    """
    if not levels:
        return
    columns = [(decay[i::RADIX], x[i::RADIX]) for i in range(RADIX)]  # i-th tokens of all blocks
    if reverse:
        columns.reverse()
    for (older_decay, older), (own_decay, own) in pairwise(columns):
        size = min(len(own), len(older))
        product = own_decay[:size]
        own[:size].addcmul_(product, older[:size])
        product.mul_(older_decay[:size])
    last_decay, last = columns[-1]
    _scan_(last_decay, last, reverse, levels - 1)
    for own_decay, own in columns[:-1]:
        if reverse:  # a block takes from the one after it
            own_decay, own, source = own_decay[: len(last) - 1], own[: len(last) - 1], last[1:]
        else:
            own_decay, own, source = own_decay[1:], own[1:], last
        size = min(len(own), len(source))
        own[:size].addcmul_(own_decay[:size], source[:size])


class _LinearScan(torch.autograd.Function):
    """h of decay and x; the gradient is the same scan backwards in time."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor) -> Tensor:
        h = x.clone()
        _scan_(decay.clone(), h)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _scan_(_from_next(decay), grad, reverse=True)
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        return before.mul_(grad), grad


def _from_next(decay: Tensor) -> Tensor:
    """decay_{t+1} at t, 0 at the end."""
    return torch.cat([decay[1:], torch.zeros_like(decay[:1])])


def linear_scan(decay: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """h_t = x_t + decay_t h_{t−1}, anew at ``starts``; ``[n, ...]``, at most `LONGEST` tokens.

    Both arguments are used up where no gradient is asked for.
    """
    if torch.is_grad_enabled() and (decay.requires_grad or x.requires_grad):
        return _LinearScan.apply(decay.index_fill(0, starts, 0), x)
    _scan_(decay.index_fill_(0, starts, 0), x)
    return x


def step_scan(decay: Tensor, x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """The same by steps: ``steps[i]`` segments have an i-th token; those go in front.

    Sums and products are not fused, so that a state's bits are those of a replay.
    """
    states, at = [x[: steps[0]]], steps[0]
    for size in steps[1:]:
        part = slice(at, at + size)
        states.append(x[part] + decay[part] * states[-1][:size])
        at += size
    return states[0] if len(steps) == 1 else torch.cat(states)


def scan_states(
    inputs: ScanInputs, piece: Piece, resume: Pair | None = None, work: Tensor | None = None
) -> Tensor:
    """All states of a piece, ``[n, N, D]``.

    Args:
        inputs: what drives the recurrence.
        piece: where segments start and how they are scanned.
        resume: segments ``[k]`` of the piece that go on, and their states ``[k, N, D]``.
        work: ``[n, N, D]`` that may be overwritten, where no gradient is asked for.
    """
    decay, x = inputs.discretise((work, None))
    if resume is not None:
        at = piece.starts[resume[0]]
        x.index_add_(0, at, decay[at] * resume[1])
    plan = piece.plan
    if plan.order is not None:
        decay, x = decay[plan.order], x[plan.order]
    parts = []
    if plan.parallel:
        parts.append(linear_scan(decay[: plan.parallel], x[: plan.parallel], plan.starts))
    if plan.steps:
        parts.append(step_scan(decay[plan.parallel :], x[plan.parallel :], plan.steps))
    h = parts[0] if len(parts) == 1 else torch.cat(parts)
    return h if plan.inverse is None else h[plan.inverse]


# Over chunks, states never kept


class _SelectiveScan(torch.autograd.Function):
    """y without the states: kept are those between chunks, the others are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        dt: Tensor,
        b: Tensor,
        u: Tensor,
        c: Tensor,
        starts: Tensor,
        chunk_size: int,
    ) -> Tensor:
        ctx.chunks = _chunks(len(u), starts, chunk_size)
        inputs = ScanInputs(a, dt, b, u)
        state = torch.zeros_like(a)
        kept, y, work = [], torch.empty_like(u), _Work(2, inputs, chunk_size)
        for part, first in ctx.chunks:
            kept.append(state)
            decay, x = work.discretise(inputs.tokens(part), first)
            h = _chunk_states(decay, x, state)
            y[part] = read(c[part], h)
            state = h[-1].clone()
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(*inputs, c, torch.stack(kept))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, c, kept = ctx.saved_tensors
        inputs = ScanInputs(*tensors)
        grads = [torch.zeros_like(t) for t in (*inputs, c)]
        carry, work = torch.zeros_like(kept[0]), _Work(4, inputs, ctx.chunk_size)
        for (part, first), state in zip(reversed(ctx.chunks), kept.flip(0), strict=True):
            decay, x = work.discretise(inputs.tokens(part), first)
            flowing = grad[part], carry
            carry = _chunk_gradients(inputs, c, part, (decay, x, state), flowing, work, grads)
        return (*grads, None, None)


class _Work:
    """Tensors of one chunk that every chunk uses again: fresh memory costs more than the work."""

    def __init__(self, count: int, inputs: ScanInputs, size: int) -> None:
        size = min(size, len(inputs.u))
        self.tensors = inputs.a.new_empty(count, size, *inputs.a.shape).unbind()

    def discretise(self, inputs: ScanInputs, first: Tensor) -> Pair:
        """Those of a chunk in the first two tensors; no decay into the tokens ``first``."""
        n = len(inputs.u)
        decay, x = inputs.discretise((self.tensors[0][:n], self.tensors[1][:n]))
        return decay.index_fill_(0, first, 0), x


def _chunks(length: int, starts: Tensor, size: int) -> list[tuple[slice, Tensor]]:
    """Slices of the axis, and the segment starts inside each."""
    bounds = range(0, length, size)
    cuts = torch.tensor([*bounds, length], device=starts.device)
    counts = torch.searchsorted(starts, cuts).diff().tolist()
    firsts = starts.split(counts)
    return [(slice(i, min(i + size, length)), s - i) for i, s in zip(bounds, firsts, strict=True)]


def _chunk_states(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    x[0].addcmul_(decay[0], state)
    _scan_(decay, x)
    return x


def _chunk_gradients(
    inputs: ScanInputs,
    c: Tensor,
    part: slice,
    chunk: tuple[Tensor, Tensor, Tensor],
    flowing: Pair,
    work: _Work,
    grads: list[Tensor],
) -> Tensor:
    """Fill in the gradients of one chunk; returns that of the state before it.

    With g_t = ∂L/∂h_t (the reverse scan of C_t ⊗ ∂L/∂y_t), log decay Δ_t A gets
    g_t h_{t−1} exp(Δ_t A) and the input Δ_t B_t u_t gets g_t.
    """
    (decay, x, state), (grad_y, later) = chunk, flowing
    a, dt, b, u = inputs.tokens(part)
    spare, g = (t[: len(u)] for t in work.tensors[2:])
    h = _chunk_states(spare.copy_(decay), x, state)
    torch.mul(c[part].unsqueeze(-1), grad_y.unsqueeze(-2), out=g)
    g[-1] += later
    spare[:-1], spare[-1] = decay[1:], 0
    _scan_(spare, g, reverse=True)
    before = decay[0] * g[0]
    log = decay.mul_(g)
    log[1:].mul_(h[:-1])
    log[0].mul_(state)
    grad_scaled = read(b, g)
    grads[0] += torch.mul(log, dt.unsqueeze(1), out=spare).sum(0)
    grads[1][part] = log.mul_(a).sum(1) + grad_scaled * u
    grads[2][part] = (g @ (dt * u).unsqueeze(-1)).squeeze(-1)
    grads[3][part] = grad_scaled * dt
    grads[4][part] = (h @ grad_y.unsqueeze(-1)).squeeze(-1)
    return before


def selective_scan(inputs: ScanInputs, c: Tensor, starts: Tensor, chunk_size: int = 64) -> Tensor:
    """y ``[n, D]`` of segments that start from nothing; memory for the states of one chunk.

    Args:
        inputs: A, Δ, B and u.
        c: C, ``[n, N]``; it may be another layer's, which is how dense layers read earlier ones.
        starts: ascending first tokens of the segments, int64 ``[s]``, the first one 0.
        chunk_size: tokens whose states exist at one time, at most `LONGEST`.
    """
    return _SelectiveScan.apply(*inputs, c, starts, chunk_size)
