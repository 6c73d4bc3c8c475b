"""Sequences laid one after another on one flat token axis, and the pieces that it is cut into.

A Mamba pass has no padding: the real tokens of all sequences lie on one axis ``[total, ...]``, a
recurrence starts anew (or from a cached state) at each *segment*, and a causal convolution looks
back inside its segment only. A *piece* is a slice of that axis; a segment that a cut divides
goes on from the state and the inputs that the piece before left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepPlan:
    """How the segments of a piece are scanned: long ones in parallel, short ones by steps.

    Attributes:
        order: tokens ``[n]`` of the long segments, then those of the short ones, first tokens
            before second ones; None where that is the order they have.
        inverse: inverse of ``order``.
        starts: where long segments begin among the first ``parallel`` tokens.
        parallel: number of tokens in long segments.
        steps: how many short segments have a first token, a second one, and so on.
    """

    order: Tensor | None
    inverse: Tensor | None
    starts: Tensor
    parallel: int
    steps: tuple[int, ...]


class Span(NamedTuple):
    """Tokens ``begin : end`` of the flat axis."""

    begin: int
    end: int


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin : end`` of the flat axis; they belong to s segments.

    Attributes:
        begin, end: its part of the axis.
        first: number of its first segment, ``first + s`` is one past the last.
        resumed: its first segment began in an earlier piece.
        starts: where its segments begin, int64 ``[s]`` from 0.
        taps: for tap j = 0..K−1 (j tokens back), rows of `history` and tokens put together,
            int64 ``[K, n]``.
        tail: the same for what the next piece needs of the last segment, ``[K − 1]``.
        plan: how it is scanned.
    """

    begin: int
    end: int
    first: int
    resumed: bool
    starts: Tensor
    taps: Tensor
    tail: Tensor
    plan: StepPlan

    @property
    def segments(self) -> slice:
        """Numbers of its segments."""
        return slice(self.first, self.first + len(self.starts))


def cut(
    lengths: Sequence[int],
    size: int,
    kernel: int,
    step_limit: int,
    device: torch.device | str = "cpu",
) -> Iterator[Piece]:
    """Cut segments of ``lengths`` tokens into pieces of at most ``size`` tokens.

    Args:
        lengths: tokens of each segment, all at least 1.
        size: the longest piece.
        kernel: K, width of the convolution.
        step_limit: segments with at most so many tokens are scanned step by step.
        device: where the indices live.
    """
    ends = list(accumulate(lengths))
    total, number = (ends[-1] if ends else 0), 0
    for begin in range(0, total, size):
        end = min(begin + size, total)
        first, resumed = number, begin > (ends[number] - lengths[number])
        parts, stepped, at = [], [], begin
        while at < end:
            stop = min(ends[number], end)
            parts.append(stop - at)
            stepped.append(lengths[number] <= step_limit)
            at, number = stop, number + (stop == ends[number])
        yield _piece((begin, end), first, resumed, parts, stepped, kernel, torch.device(device))


def _piece(
    span: tuple[int, int],
    first: int,
    resumed: bool,
    parts: list[int],
    stepped: list[bool],
    kernel: int,
    device: torch.device,
) -> Piece:
    counts = torch.tensor(parts)
    starts = counts.cumsum(0) - counts
    segment = torch.arange(len(parts)).repeat_interleave(counts)
    token = torch.arange(int(counts.sum()))
    taps = _taps(token, token - starts[segment], segment, len(parts), kernel)
    after = _taps(token[-1:] + 1, counts[-1:], segment[-1:], len(parts), kernel)
    plan = _step_plan(counts, starts, torch.tensor(stepped), device)
    return Piece(
        *span, first, resumed, starts.to(device), taps.to(device), after[1:, 0].flip(0).to(device),
        plan,
    )  # fmt: skip


def _taps(token: Tensor, offset: Tensor, segment: Tensor, segments: int, kernel: int) -> Tensor:
    """Places in [history of K−1 rows a segment; tokens] that are j = 0..K−1 before each token."""
    j, width = torch.arange(kernel)[:, None], kernel - 1
    own = segments * width + token - j
    return torch.where(offset >= j, own, segment * width + width - j + offset)


def _step_plan(counts: Tensor, starts: Tensor, stepped: Tensor, device: torch.device) -> StepPlan:
    inside = counts[~stepped]
    order: list[int] = list(range(int(counts.sum())))
    steps: tuple[int, ...] = ()
    if bool(stepped.any()):
        order, steps = _stepped_order(counts.tolist(), starts.tolist(), stepped.tolist())
    places = torch.tensor(order)
    moved = bool((places.diff() != 1).any())
    return StepPlan(
        order=places.to(device) if moved else None,
        inverse=places.argsort().to(device) if moved else None,
        starts=(inside.cumsum(0) - inside).to(device),
        parallel=int(inside.sum()),
        steps=steps,
    )


def _stepped_order(
    counts: list[int], starts: list[int], stepped: list[bool]
) -> tuple[list[int], tuple[int, ...]]:
    """Tokens of long segments, then the i-th tokens of short ones, longer segments first."""
    short = sorted((i for i, s in enumerate(stepped) if s), key=lambda i: -counts[i])
    order = [starts[i] + t for i, s in enumerate(stepped) if not s for t in range(counts[i])]
    members = [[i for i in short if counts[i] > step] for step in range(counts[short[0]])]
    order += [starts[i] + step for step, who in enumerate(members) for i in who]
    return order, tuple(len(who) for who in members)


def convolve(x: Tensor, history: Tensor, conv: nn.Conv1d, piece: Piece) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of a piece, each segment after its own history.

    Tap after tap over whole tensors, so that a token's bits depend on its own inputs alone.

    Args:
        x: inputs ``[n, D]``.
        history: the K−1 inputs before each segment's part, ``[s, K−1, D]``, oldest first.
        conv: holds the weight ``[D, 1, K]`` and the bias.
        piece: the layout.

    Returns:
        ``[n, D]``, and the K−1 inputs ``[K−1, D]`` that a following piece starts from.
    """
    rows = torch.cat([history.flatten(0, 1).to(x.dtype), x])
    taps = rows.index_select(0, piece.taps.flatten()).unflatten(0, piece.taps.shape)
    weight = conv.weight[:, 0].t()
    y = taps[0] * weight[-1]
    for j in range(1, len(taps)):
        y = y + taps[j] * weight[-1 - j]
    return (y if conv.bias is None else y + conv.bias), rows[piece.tail]
