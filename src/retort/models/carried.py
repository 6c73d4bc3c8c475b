"""States as plain tensors, carried from pass to pass by the caller: differentiable, compilable.

A row cache serves decoding: it writes in place, rewinds, and takes no part in a gradient. Here
the state goes in as `past_key_values` and the next one comes out, and neither is written to:

    state = model.new_state(batch_size)
    for part in parts:                      # truncated back-propagation, or a state that is learnt
        out = model(part, past_key_values=state)
        state = out.past_key_values

With one token a row and no mask a pass is tensor arithmetic alone, one graph for `torch.compile`.
There is no rewind. Shapes: B rows, T tokens, n real tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retort.cache.mamba import MambaShape
from retort.cache.retention import RetentionShape
from retort.models.mamba_passes import Fuse, StatePass
from retort.ops.clock import Clock
from retort.ops.retention import state_after, state_output
from retort.ops.segments import Piece
from retort.ops.selective_scan import ScanInputs, read


class RetentionState(NamedTuple):
    """Of a DenseRetNet: R ``[layers, B, H, d_k, d_v]``, and tokens so far, int64 ``[B]``."""

    states: Tensor
    lengths: Tensor

    @classmethod
    def zeros(cls, shape: RetentionShape, batch: int, **kind: Any) -> RetentionState:
        """The state before any token; ``kind`` is dtype and device."""
        sizes = (shape.layers, batch, shape.heads, shape.key_dim, shape.value_dim)
        lengths = torch.zeros(batch, dtype=torch.long, device=kind.get("device"))
        return cls(torch.zeros(sizes, **kind), lengths)


class MambaState(NamedTuple):
    """Of a DenseMamba: h ``[layers, B, N, D]``, last conv inputs ``[layers, B, K−1, D]``."""

    states: Tensor
    inputs: Tensor

    @classmethod
    def zeros(cls, shape: MambaShape, batch: int, **kind: Any) -> MambaState:
        """The state before any token; ``kind`` is dtype and device."""
        layers, channels = shape.layers, shape.channels
        states = torch.zeros(layers, batch, shape.states, channels, **kind)
        return cls(states, torch.zeros(layers, batch, shape.kernel - 1, channels, **kind))


class CarriedRetention:
    """The mixer of one DenseRetNet pass that starts from a `RetentionState`.

    Args:
        state: where rows start.
        clock: of the pass, one sequence a row.
        decay: log γ ``[H]``.
        mix: (q, k, v) → Y of the new tokens alone, each ``[B, T, H, d]``.
    """

    def __init__(self, state: RetentionState, clock: Clock, decay: Tensor, mix: Any) -> None:
        self._state, self._clock, self._decay, self._mix = state, clock, decay, mix
        self._after: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Y with what the state gives: retention is linear in what came before."""
        before = self._state.states[layer].to(q.dtype)
        self._after.append(state_after(before, k, v, self._decay, self._clock))
        return self._mix(q, k, v) + state_output(q, before, self._decay, self._clock)

    def after(self) -> RetentionState:
        """The state after the pass."""
        lengths = self._state.lengths + self._clock.real.sum(1)
        return RetentionState(torch.stack(self._after), lengths)


class CarriedMamba:
    """What a `StatePass` asks of a cache, from a `MambaState`.

    Args:
        state: where rows start.
        counts: real tokens of each row in this pass.
    """

    def __init__(self, state: MambaState, counts: list[int]) -> None:
        self._state, self._counts = state, [n for n in counts if n]
        fed = [row for row, n in enumerate(counts) if n]
        self._rows = torch.tensor(fed, dtype=torch.long, device=state.states.device)
        self._ends: dict[int, Tensor] = {}
        self._fed: dict[int, list[Tensor]] = {}

    def history(self, layer: int, rows: slice) -> Tensor:
        """The K−1 convolution inputs before the fed rows ``rows``, ``[r, K−1, D]``."""
        return self._state.inputs[layer, self._rows[rows]]

    def resume(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Numbers of the fed rows ``rows`` (from 0), and their states ``[r, N, D]``."""
        chosen = self._rows[rows]
        numbers = torch.arange(len(chosen), device=chosen.device)
        return numbers, self._state.states[layer, chosen]

    def record(self, layer: int, piece: Piece, x: Tensor, inputs: ScanInputs, h: Tensor) -> None:
        """Keep the last state of each segment, and the convolution's inputs."""
        last = torch.cat([piece.starts[1:], piece.starts.new_tensor([len(x)])]) - 1
        known = self._ends.get(layer, h[:0])[: piece.first]
        self._ends[layer] = torch.cat([known, h[last]])
        self._fed.setdefault(layer, []).append(x)

    def after(self) -> MambaState:
        """The state after the pass; rows without a token keep theirs."""
        if not self._counts:
            return self._state
        taps = self._tail_places()
        states, tails = [], []
        for layer, (h, x) in enumerate(zip(*self._state, strict=True)):
            states.append(h.index_copy(0, self._rows, self._ends[layer].to(h.dtype)))
            seen = torch.cat([x[self._rows].flatten(0, 1), *(t.to(x) for t in self._fed[layer])])
            tails.append(x.index_copy(0, self._rows, seen[taps]))
        return MambaState(torch.stack(states), torch.stack(tails))

    def _tail_places(self) -> Tensor:
        """Where [K−1 old inputs a row; new ones] hold the last K−1 of each row, ``[r, K−1]``."""
        width, rows = self._state.inputs.shape[2], len(self._counts)
        places: list[int] = []
        starts = accumulate(self._counts, initial=rows * width)
        for r, (start, count) in enumerate(zip(starts, self._counts, strict=False)):
            places += range(r * width + count, (r + 1) * width)  # what is left of the old ones
            places += range(start + max(0, count - width), start + count)
        return torch.tensor(places, dtype=torch.long, device=self._rows.device).view(rows, width)


class CarriedPass(StatePass):
    """A `StatePass` from a `MambaState`, and the state after it."""

    def __init__(self, pieces: Iterable[Piece], carried: CarriedMamba) -> None:
        super().__init__(pieces, carried)
        self._carried = carried

    def after(self) -> MambaState:
        """The state after the pass."""
        return self._carried.after()


class OneToken(NamedTuple):
    """The piece of a pass with one token in each of ``end`` rows."""

    begin: int
    end: int


class OneTokenPass:
    """A `MambaPass` with one new token in every row: tensors only, nothing planned."""

    def __init__(self, state: MambaState) -> None:
        self._state = state
        self._states: list[Tensor] = []
        self._inputs: list[Tensor] = []

    def __iter__(self) -> Iterator[OneToken]:
        """The one piece."""
        yield OneToken(0, self._state.states.shape[1])

    def convolve(self, layer: int, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """See `MambaPass.convolve`."""
        old = self._state.inputs[layer]
        window = torch.cat([old, x.unsqueeze(1).to(old.dtype)], 1)
        self._inputs.append(window[:, 1:])
        y = (window.to(x.dtype) * conv.weight[:, 0].t()).sum(1)
        return y if conv.bias is None else y + conv.bias

    def mix(
        self,
        layer: int,
        inputs: ScanInputs,
        c: Tensor,
        fuse: Fuse | None,
        earlier: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `MambaPass.mix`."""
        decay, x = inputs.discretise()
        h = x + decay * self._state.states[layer].to(x.dtype)
        self._states.append(h)
        return read(c, h if fuse is None else fuse(h, list(earlier))), (h,)

    def after(self) -> MambaState:
        """The state after the pass."""
        return MambaState(torch.stack(self._states), torch.stack(self._inputs))
