"""All layers of a DenseMamba and the norm after them in one native call on a packed pass.

A layer is ``h + W_o ((C·(h_t + a ⊙ Σ h_t^{l−i}) + D u) ⊙ silu(z))`` (see `models.dense_mamba`).
What C reads of earlier layers is scanned again with their inputs, or, where a row has one token,
read from the states that those layers have just left. Every step has the arithmetic of the
separate kernels, so a row's bits ignore its company and equal those of separate calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import int64s, require, require_windows
from retort.ops.native.elementwise import Norm
from retort.ops.native.scan import ScanRows
from retort.ops.panels import PackedWeight


@dataclass(frozen=True, eq=False)
class NativeMambaLayer:
    """Weights of one layer; D channels, N states a channel, K taps.

    Attributes:
        input: x and z, ``2 D`` outputs.
        parameters: of the step size, B and C.
        step: step sizes, D outputs of the first ``rank`` parameters.
        output: the layer's output.
        norm: before the layer.
        convolution: ``[D, K]``.
        convolution_bias: ``[D]`` or None.
        a: ``[N, D]``, negative.
        d: ``[D]``.
        window: how many layers before have their states read.
        select: first and second half of the selective transition; empty without a gate.
    """

    input: PackedWeight
    parameters: PackedWeight
    step: PackedWeight
    output: PackedWeight
    norm: Norm
    convolution: Tensor
    convolution_bias: Tensor | None
    a: Tensor
    d: Tensor
    window: int = 0
    select: Sequence[PackedWeight] = ()

    def check(self, hidden: int, channels: int, kernel: int) -> None:
        """Refuse sizes that do not fit.

        Raises:
            ConfigurationError: names what was found.
        """
        states = len(self.a)
        linears = [
            (self.input, (hidden, 2 * channels)),
            (self.parameters, (channels, self.step.k + 2 * states)),
            (self.step, (self.step.k, channels)),
            (self.output, (channels, hidden)),
        ]
        if self.select:
            first, second = self.select
            linears += [(first, (hidden, second.k)), (second, (second.k, channels))]
        found = [(weight.k, weight.n) for weight, _ in linears]
        wanted = [sizes for _, sizes in linears]
        if found != wanted or self.norm.weight.numel() != hidden:
            raise ConfigurationError(
                f"a layer {hidden} wide with {channels} channels takes (in, out) {wanted}, "
                f"found {found}"
            )
        require("convolution", self.convolution, (channels, kernel))
        require("a", self.a, (states, channels))
        for vector in (self.d, self.convolution_bias):
            if vector is not None:
                require("D or a bias", vector, (channels,))

    @cached_property
    def structs(self) -> tuple:
        """What the core reads, the layer last; the others are kept alive with it."""
        inputs = [weight.layer for weight in (self.input, *self.select[:1])]
        table = (abi.Linear * len(inputs))(*inputs)
        bias = self.convolution_bias
        layer = abi.MambaLayer(
            ctypes.addressof(table), self.select[1].address if self.select else None,
            *[w.address for w in (self.parameters, self.step, self.output)], self.norm.address,
            self.convolution.data_ptr(), None if bias is None else bias.data_ptr(),
            self.a.data_ptr(), self.d.data_ptr(), self.window,
        )  # fmt: skip
        return table, layer


@dataclass(frozen=True, eq=False)
class MambaMemory:
    """Where the layers find what came before a pass, and what they leave.

    Attributes:
        rows: the pass, with the states that rows start from and those that are kept.
        last: of each row, the state after its last token, one of the kept.
        states: ``[layers, n, N, D]``.
        fed: pages ``[layers, p, page, 2 D + N]`` of Δ, u and B.
        inputs: pages ``[layers, p, page, D]`` of the convolution's inputs.
        history: pages and offsets of the K−1 inputs before each row, int64 ``[rows, K − 1]``,
            oldest first; page −1 where there is none.
        tape: pages and offsets that take each token, int64 ``[total]``; page −1 where it is not
            kept.
    """

    rows: ScanRows
    last: tuple[int, ...]
    states: Tensor
    fed: Tensor
    inputs: Tensor
    history: tuple[Tensor, Tensor]
    tape: tuple[Tensor, Tensor]

    def check(self, layers: int, states: int, channels: int, kernel: int) -> None:
        """Refuse what would read or write outside.

        Raises:
            ConfigurationError: a tensor or an index does not fit.
        """
        count, (pages, page) = self.states.shape[1], self.fed.shape[1:3]
        require("states", self.states, (layers, count, states, channels))
        require("fed", self.fed, (layers, pages, page, 2 * channels + states))
        require("inputs", self.inputs, (layers, pages, page, channels))
        self.rows.check(count, count)
        total, rows = self.rows.offsets[-1], len(self.rows.counts)
        ends = [end - 1 for end in self.rows.offsets[1:]]
        kept = dict(self.rows.kept)
        if tuple(kept.get(end) for end in ends) != self.last:
            raise ConfigurationError(
                f"rows that end at {ends} leave states {self.last}, kept are {self.rows.kept}"
            )
        for indices, shape in ((self.history, (rows, kernel - 1)), (self.tape, (total,))):
            _check_places(indices, shape, pages, page)

    @cached_property
    def arrays(self) -> list[ctypes.Array]:
        """Counts, offsets, first states, ends and tokens of kept states, where they go, last."""
        rows = self.rows
        counts, offsets, ends, tokens = rows.arrays
        kept = int64s([place for _, place in rows.kept])
        return [counts, offsets, int64s(rows.initial), ends, tokens, kept, int64s(self.last)]


def _check_places(
    places: tuple[Tensor, Tensor], shape: tuple[int, ...], pages: int, page: int
) -> None:
    for x, limit, lowest in zip(places, (pages, page), (-1, 0), strict=True):
        good = x.dtype is torch.int64 and x.is_cpu and x.is_contiguous() and x.shape == shape
        if not good or (x.numel() and not lowest <= int(x.min()) <= int(x.max()) < limit):
            raise ConfigurationError(
                f"places are int64 {shape} on the CPU, pages below {pages} and offsets below {page}"
            )


@dataclass(frozen=True, eq=False)
class NativeMamba:
    """Layers of equal sizes, one after the other, then a norm.

    Attributes:
        layers: at least one.
        norm: the norm after the last layer; every norm has its epsilon.

    Raises:
        ConfigurationError: sizes do not fit together, or a window reaches before layer 0.
    """

    layers: Sequence[NativeMambaLayer]
    norm: Norm

    def __post_init__(self) -> None:
        require_windows("DenseMamba", [(w.window, bool(w.select)) for w in self.layers])
        first, last = self.layers[0], self.layers[-1]
        for layer in self.layers:
            layer.check(self.norm.weight.numel(), *first.convolution.shape)
        inner = {layer.select[1].k for layer in self.layers if layer.select}
        sizes = {(layer.parameters.n, len(layer.a)) for layer in self.layers}
        if len(sizes) > 1 or len(inner) > 1 or (inner and not last.select):
            raise ConfigurationError("layers differ in their states, step ranks or gates")

    def __call__(self, x: Tensor, memory: MambaMemory) -> Tensor:
        """Run all layers on a packed pass; states and tape are written where ``memory`` says.

        Args:
            x: ``[total, hidden]`` float32, contiguous.
            memory: what came before.

        Returns:
            Like ``x``, normalised. No gradient flows.

        Raises:
            ConfigurationError: a tensor does not fit, or there is no native core.
        """
        first, rows = self.layers[0], memory.rows
        total, states = rows.offsets[-1], len(first.a)
        require("x", x, (total, self.norm.weight.numel()))
        memory.check(len(self.layers), states, *first.convolution.shape)
        out = torch.empty(x.shape)
        stores = memory.states, memory.fed, memory.inputs
        places = [t.data_ptr() for t in (*memory.history, *memory.tape, *stores)]
        call = abi.MambaCall(
            ctypes.addressof(self._struct[-1]), len(rows.counts), total,
            *map(ctypes.addressof, memory.arrays), *places, *[s.stride(0) for s in stores],
            memory.fed.shape[2], x.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if total:
            native.library().retort_mamba(call)
        return out

    @cached_property
    def _struct(self) -> tuple:
        """What the core reads, the model last."""
        layers = int64s([ctypes.addressof(layer.structs[-1]) for layer in self.layers])
        first, norm = self.layers[0], self.norm
        window = max(layer.window for layer in self.layers)
        model = abi.Mamba(
            ctypes.addressof(layers), len(self.layers), window, len(first.a),
            first.convolution.shape[1], norm.address, norm.eps,
        )  # fmt: skip
        return layers, model
