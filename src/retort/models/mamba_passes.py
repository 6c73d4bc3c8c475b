"""How the layers of one DenseMamba pass convolve and scan: with states, or without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from retort.cache.recurrent import Feed
from retort.ops import native
from retort.ops.clock import Clock
from retort.ops.native.scan_gradient import TrainedRows, trained_scan
from retort.ops.segments import Piece, convolve
from retort.ops.selective_scan import ScanInputs, read, scan_states, selective_scan

Fuse = Callable[[Tensor, list[Tensor]], Tensor]


class Span(Protocol):
    """Tokens ``begin : end`` of the flat axis."""

    @property
    def begin(self) -> int:
        """First token."""
        ...

    @property
    def end(self) -> int:
        """One past the last token."""
        ...


class MambaPass(Protocol):
    """One forward pass over a flat token axis; iterating sets the piece that layers work on."""

    def __iter__(self) -> Iterator[Span]:
        """The pieces, in order; all layers run on one before the next comes."""
        ...

    def convolve(self, layer: int, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """The layer's causal convolution of ``[n, D]``, before the activation."""
        ...

    def mix(
        self,
        layer: int,
        inputs: ScanInputs,
        c: Tensor,
        fuse: Fuse | None,
        earlier: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What C reads ``[n, D]``, and the layer's features for later layers.

        Args:
            layer: which layer.
            inputs: what drives its recurrence.
            c: C ``[n, N]``.
            fuse: (own, earlier) → fused; None where the layer has no dense connection.
            earlier: features of the layers in the window, kind after kind.
        """
        ...


class PassConvolution(nn.Conv1d):
    """A depthwise convolution that a pass carries out, by a call, which hooks of offloading see."""

    def forward(self, x: Tensor, layer: int, step: MambaPass) -> Tensor:  # type: ignore[override]
        """The layer's causal convolution of the pass's tokens ``[n, D]``."""
        return step.convolve(layer, x, self)


class StateStore(Protocol):
    """Where segments start from, and what takes their states: a `MambaRowCache`, for one."""

    def history(self, layer: int, rows: slice) -> Tensor:
        """The K−1 convolution inputs before segments ``[r, K−1, D]``."""
        ...

    def resume(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Which of the segments have a state (numbers from 0), and the states ``[k, N, D]``."""
        ...

    def record(self, layer: int, piece: Piece, x: Tensor, inputs: ScanInputs, h: Tensor) -> None:
        """Take the convolution's inputs ``[n, D]`` and the states ``[n, N, D]`` of a piece."""
        ...


class StatePass:
    """A layer's feature is its states of a piece ``[n, N, D]``; memory for one piece at a time.

    Args:
        pieces: of `retort.ops.segments.cut`.
        cache: between begin() and end(), or None where every segment starts from nothing.
    """

    def __init__(self, pieces: Iterable[Piece], cache: StateStore | None) -> None:
        self._pieces, self._cache = pieces, cache
        self._states: dict[int, Tensor] = {}  # of each layer, at the end of the last piece
        self._inputs: dict[int, Tensor] = {}
        self._fed: Tensor | None = None
        self._scratch: Tensor | None = None

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, in order."""
        for piece in self._pieces:
            self._piece = piece
            yield piece

    def _new(self) -> slice:
        """Segments that begin in this piece."""
        part = self._piece.segments
        return slice(part.start + self._piece.resumed, part.stop)

    def convolve(self, layer: int, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """See `MambaPass.convolve`."""
        new, width = self._new(), conv.kernel_size[0] - 1
        if self._cache is None:
            history = x.new_zeros(new.stop - new.start, width, x.shape[1])
        else:
            history = self._cache.history(layer, new).to(x.dtype)
        if self._piece.resumed:
            history = torch.cat([self._inputs[layer].unsqueeze(0), history])
        y, self._inputs[layer] = convolve(x, history, conv, self._piece)
        self._fed = x
        return y

    def mix(
        self,
        layer: int,
        inputs: ScanInputs,
        c: Tensor,
        fuse: Fuse | None,
        earlier: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `MambaPass.mix`."""
        h = scan_states(inputs, self._piece, self._resume(layer, inputs), self._work(inputs))
        if self._cache is not None and self._fed is not None:
            self._cache.record(layer, self._piece, self._fed, inputs, h)
        self._states[layer] = h[-1].clone()
        return read(c, h if fuse is None else fuse(h, list(earlier))), (h,)

    def _work(self, inputs: ScanInputs) -> Tensor | None:
        """One tensor for the decays of every layer and piece: fresh memory is slow."""
        if torch.is_grad_enabled():
            return None
        count = len(inputs.u)
        if self._scratch is None or len(self._scratch) < count:
            self._scratch = inputs.a.new_empty(count, *inputs.a.shape)
        return self._scratch[:count]

    def _resume(self, layer: int, inputs: ScanInputs) -> tuple[Tensor, Tensor] | None:
        parts = []
        if self._cache is not None:
            numbers, states = self._cache.resume(layer, self._new())
            if len(numbers):
                parts.append((numbers + int(self._piece.resumed), states))
        if self._piece.resumed:
            zero = self._piece.starts.new_zeros(1)
            parts.insert(0, (zero, self._states[layer].unsqueeze(0)))
        if not parts:
            return None
        numbers, states = (torch.cat(x) for x in zip(*parts, strict=True))
        return numbers, states.to(inputs.u.dtype)


class RescanPass:
    """A layer's features are A, Δ, B and u; whoever reads its states scans them again.

    Args:
        pieces: the whole axis as one piece.
        chunk_size: tokens whose states exist at one time in PyTorch.
        counts: tokens of each segment.
    """

    def __init__(self, pieces: Iterable[Piece], chunk_size: int, counts: tuple[int, ...]) -> None:
        self._pieces, self._chunk_size = list(pieces), chunk_size
        self._rows = TrainedRows(counts)

    def __iter__(self) -> Iterator[Piece]:
        """The one piece, none where there is no token."""
        return iter(self._pieces)

    def convolve(self, layer: int, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """See `MambaPass.convolve`."""
        piece = self._pieces[0]
        history = x.new_zeros(len(piece.starts), conv.kernel_size[0] - 1, x.shape[1])
        return convolve(x, history, conv, piece)[0]

    def mix(
        self,
        layer: int,
        inputs: ScanInputs,
        c: Tensor,
        fuse: Fuse | None,
        earlier: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `MambaPass.mix`."""
        y = self._scan(inputs, c)
        if fuse is not None:
            count = len(earlier) // len(inputs)
            window = [ScanInputs(*earlier[i::count]) for i in range(count)]
            y = fuse(y, [self._scan(older, c) for older in window])
        return y, tuple(inputs)

    def _scan(self, inputs: ScanInputs, c: Tensor) -> Tensor:
        if inputs.u.dtype is torch.float32 and inputs.u.is_cpu and _core_serves():
            return trained_scan(inputs, c, self._rows)
        return selective_scan(inputs, c, self._pieces[0].starts, self._chunk_size)


def _core_serves() -> bool:
    return not torch.compiler.is_compiling() and native.available()


def real_sequences(
    x: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Feed, tuple[int, ...]]:
    """The real tokens of a batch, and the lengths of the sequences that they form.

    Args:
        x: ``[B, T, ...]``.
        mask: ``[B, T]``, 0 at padding; None where all are real.
        starts: of `sequence_starts`.
    """
    real = None if mask is None else mask.to(x.device, torch.bool)
    batch, width = x.shape[:2]
    clock = Clock.of(real, starts, (batch, width), x.device)
    if clock.uniform:
        return Feed(clock.positions, None), (width,) * (batch if width else 0)
    index = clock.real.flatten().nonzero()[:, 0]
    first = (clock.seen.flatten()[index] == 1).nonzero()[:, 0].tolist()
    bounds = pairwise([*first, len(index)])
    return Feed(clock.positions, index), tuple(end - start for start, end in bounds)
