"""The chunked loss of a plain linear head, with one gradient buffer for the head's weight.

Left to autograd, every chunk makes a gradient [V, D] of its own, and adding them up holds three
at once: for a small model more than all logits of a chunk. Here the backward pass recomputes a
chunk up to its terms, takes the gradient of the chunk's logits, and adds logits' gradient × hidden
states into one buffer in place. Values and gradients are those of autograd up to summation order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retort.distill.losses.rows import Term, TermSum
from retort.distill.signals import Head

Chunks = Sequence[tuple[int, int]]
"""First and last + 1 row of hidden states that each chunk's head reads; they may overlap by one."""

Sums = dict[str, TermSum]
Compute = Callable[[Tensor, int], Sums]
"""Terms of a chunk from its logits [n, V] and its number."""


def fits(head: Head) -> bool:
    """Whether ``head`` is a linear layer with its whole weight here, called as it stands."""
    return type(head) is nn.Linear and not isinstance(head.weight, DTensor)


def fused_sums(
    hidden: Tensor, head: nn.Linear, chunks: Chunks, compute: Compute, terms: Sequence[Term]
) -> Sums:
    """Every term's sum over all chunks, differentiable in hidden [N, D], head and terms."""
    parameters = [p for term in terms for p in parameters_of(term)]
    work = _Work(head, chunks, compute, parameters)
    totals = _Fused.apply(work, hidden, head.weight, head.bias, *parameters)
    pairs = zip(work.sums.items(), totals, strict=True)
    return {name: TermSum(total, part.count, part.stats) for (name, part), total in pairs}


def parameters_of(term: Term) -> Iterator[Tensor]:
    """What a term itself learns (DAC-KL's sub-network)."""
    network = getattr(term, "network", None)
    return iter(()) if network is None else network.parameters()


class _Work:
    """What both passes need beside the tensors that are differentiated."""

    def __init__(
        self, head: nn.Linear, chunks: Chunks, compute: Compute, parameters: list[Tensor]
    ) -> None:
        self.head, self.chunks, self.compute = head, chunks, compute
        self.parameters = [p for p in parameters if p.requires_grad]
        self.sums: Sums = {}

    def forward(self, hidden: Tensor) -> None:
        """Add up the chunks' sums."""
        for number, (start, stop) in enumerate(self.chunks):
            part = self.compute(self.head(hidden[start:stop]), number)
            self.sums = {n: self.sums[n] + part[n] if number else part[n] for n in part}

    def chunk_gradients(
        self, hidden: Tensor, number: int, outer: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Gradients of a chunk's logits and of the terms' parameters."""
        with torch.no_grad():
            logits = self.head(hidden)
        logits.requires_grad_()
        with torch.enable_grad():
            part = self.compute(logits, number)
            reached = {n: t.total for n, t in part.items() if t.total.requires_grad}
            loss = sum(total * outer[n] for n, total in reached.items() if n in outer)
        if not isinstance(loss, Tensor):
            return None, []
        first, *rest = torch.autograd.grad(loss, [logits, *self.parameters], allow_unused=True)
        return first, rest


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden)
        ctx.work, device = work, hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        work.forward(hidden)
        return tuple(part.total for part in work.sums.values())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        (hidden,), work = ctx.saved_tensors, ctx.work
        given = {n: g for n, g in zip(work.sums, outer, strict=True) if g is not None}
        buffers = _Buffers(hidden, work, ctx.needs_input_grad[1:])
        device, dtype, enabled = ctx.autocast
        for number, (start, stop) in enumerate(work.chunks):
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                found = work.chunk_gradients(hidden[start:stop], number, given)
            buffers.add(start, stop, *found)
        return None, *buffers.gradients()


class _Buffers:
    """One gradient of each input of `_Fused`, None where none is wanted."""

    def __init__(self, hidden: Tensor, work: _Work, needed: Sequence[bool]) -> None:
        self.values, self.work = hidden, work
        weight, bias = work.head.weight, work.head.bias
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias) if needed[2] else None
        self.needed = needed[3:]
        self.own = [torch.zeros_like(p) for p in work.parameters]

    def add(
        self, start: int, stop: int, logits: Tensor | None, own: Sequence[Tensor | None]
    ) -> None:
        """Add a chunk's: the gradient of its logits [n, V] goes on to weight and hidden states."""
        for buffer, gradient in zip(self.own, own, strict=False):
            if gradient is not None:
                buffer.add_(gradient)
        if logits is None:
            return
        if self.weight is not None:
            like = self.weight.dtype
            self.weight.addmm_(logits.t().to(like), self.values[start:stop].to(like))
        if self.bias is not None:
            self.bias.add_(logits.sum(0))
        if self.hidden is not None:
            weight = self.work.head.weight.detach()
            self.hidden[start:stop] += (logits.to(weight.dtype) @ weight).to(self.hidden.dtype)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """In the order of `_Fused`'s inputs."""
        own = iter(self.own)
        rest = [next(own) if needed else None for needed in self.needed]
        return self.hidden, self.weight, self.bias, *rest
