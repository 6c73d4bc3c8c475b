"""All layers of a DenseRetNet and the norm after them in one native call on a packed pass.

A layer is ``h + W_o (norm(Y / √S) ⊙ g)`` over keys and values that are fused with those of the
layers in its window, normed and turned (DenseSSM, arXiv 2403.00818; see `models.dense_retnet`),
and a gated MLP where it has one. Every step has the arithmetic of the separate kernels, so a row's
bits ignore its company and equal those of a pass in separate calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import int64s, require, require_tokens, require_windows
from retort.ops.native.elementwise import Norm
from retort.ops.native.retention import RetentionRows, RetentionTables
from retort.ops.panels import PackedWeight, gated


@dataclass(frozen=True, eq=False)
class NativeRetNetLayer:
    """Weights of one layer.

    Attributes:
        projections: queries, keys, and values with the output's gates.
        output: the layer's output.
        norm, group_norm: before the layer, and on each head of its result.
        window: how many layers before give their keys and values.
        selects: first halves of the keys' and of the values' selective transition, then the
            second halves; empty without gates.
        fused_norms: of fused keys and of fused values; None without.
        mlp: gate, up and down, after ``mlp_norm``; empty without.
    """

    projections: Sequence[PackedWeight]
    output: PackedWeight
    norm: Norm
    group_norm: Norm
    window: int = 0
    selects: Sequence[PackedWeight] = ()
    fused_norms: Sequence[Norm] | None = None
    mlp: Sequence[PackedWeight] = ()
    mlp_norm: Norm | None = None

    def check(self, hidden: int, keys: int, values: int) -> None:
        """Refuse sizes that do not fit.

        Raises:
            ConfigurationError: names what was found.
        """
        linears = [
            *zip(self.projections, [(hidden, keys)] * 2 + [(hidden, 2 * values)], strict=True),
            (self.output, (values, hidden)),
        ]
        if self.selects:
            first_k, first_v, second_k, second_v = self.selects
            linears += [(first_k, (hidden, second_k.k)), (first_v, (hidden, second_v.k))]
            linears += [(second_k, (second_k.k, keys)), (second_v, (second_v.k, values))]
        if self.mlp:
            gate, up, down = self.mlp
            linears += [(gate, (hidden, down.k)), (up, (hidden, down.k)), (down, (down.k, hidden))]
        found = [(weight.k, weight.n) for weight, _ in linears]
        wanted = [sizes for _, sizes in linears]
        biased = any(weight.bias is not None or weight.up for weight, _ in linears)
        if found != wanted or biased or bool(self.mlp) != (self.mlp_norm is not None):
            raise ConfigurationError(
                f"a layer {hidden} wide with keys {keys} and values {values} takes (in, out) "
                f"{wanted} without bias, and an MLP with its norm; found {found}"
            )

    @cached_property
    def structs(self) -> tuple:
        """What the core reads, the layer last; the others are kept alive with it."""
        first = self.selects[:2]
        inputs = [weight.layer for weight in (*self.projections, *first)]
        table = (abi.Linear * len(inputs))(*inputs)
        pair = gated(*self.mlp[:2]) if self.mlp else None
        second: list[Any] = [weight.address for weight in self.selects[2:]] or [None, None]
        norms = [self.norm, *(self.fused_norms or (None, None)), self.group_norm, self.mlp_norm]
        layer = abi.RetNetLayer(
            ctypes.addressof(table), *second, self.output.address,
            None if pair is None else pair.address, self.mlp[2].address if self.mlp else None,
            *[None if norm is None else norm.address for norm in norms], self.window,
        )  # fmt: skip
        return table, pair, layer


@dataclass(frozen=True, eq=False)
class RetNetMemory:
    """Where the layers find what came before a pass; see `RetentionRows` for the numbers.

    Attributes:
        tables: decays and sizes of a head.
        rows: the pass.
        states: ``[layers, n, heads, key_width, value_width]``, read only.
        keys, values: pages ``[layers, p, heads, L, width]``; new tokens are written there.
        moved: ``[layers, s, heads, key_width, value_width]``, receives states.
        positions: int64 ``[total]``, of each token.
        pages: int64 ``[total]``, the page that takes the token, −1 where it is not kept.
    """

    tables: RetentionTables
    rows: RetentionRows
    states: Tensor
    keys: Tensor
    values: Tensor
    moved: Tensor
    positions: Tensor
    pages: Tensor

    def check(self, layers: int) -> None:
        """Refuse what would read or write outside.

        Raises:
            ConfigurationError: a tensor or an index does not fit.
        """
        tables = self.tables
        key_page, value_page = tables.page_shapes
        shapes = {
            "states": tables.state_shape, "keys": key_page, "values": value_page,
            "moved": tables.state_shape,
        }  # fmt: skip
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            require(name, tensor, (layers, tensor.shape[1], *shape))
        count = self.keys.shape[1]
        self.rows.check(tables.block, self.states.shape[1], count, self.moved.shape[1])
        total = self.rows.total
        for tensor in (self.positions, self.pages):
            good = tensor.dtype is torch.int64 and tensor.is_contiguous() and tensor.is_cpu
            if not good or tensor.shape != (total,):
                raise ConfigurationError(f"positions and pages are int64 [{total}] on the CPU")
        largest = int(self.pages.max()) if total else -1
        if self.values.shape[1] != count or largest >= count:
            raise ConfigurationError(
                f"{count} pages of keys, {self.values.shape[1]} of values, page {largest} wanted"
            )

    @cached_property
    def arrays(self) -> list[ctypes.Array]:
        """State, pages and moves of each row for the core."""
        rows = self.rows
        return [int64s(a) for a in (rows.states, rows.before, rows.current, rows.moved)]


@dataclass(frozen=True, eq=False)
class NativeRetNet:
    """Layers of equal sizes, one after the other, then a norm.

    Attributes:
        layers: at least one.
        norm: the norm after the last layer; every norm has its epsilon.

    Raises:
        ConfigurationError: sizes do not fit together, or a window reaches before layer 0.
    """

    layers: Sequence[NativeRetNetLayer]
    norm: Norm

    def __post_init__(self) -> None:
        require_windows("DenseRetNet", [(w.window, bool(w.selects)) for w in self.layers])
        query, _, values = self.layers[0].projections
        sizes = self.hidden, query.n, values.n // 2
        inner = {w.k for layer in self.layers for w in layer.selects[2:3]}
        inner_v = {w.k for layer in self.layers for w in layer.selects[3:]}
        wide = {layer.mlp[0].n if layer.mlp else 0 for layer in self.layers}
        for layer in self.layers:
            layer.check(*sizes)
        last = not inner or bool(self.layers[-1].selects)
        if len(inner) > 1 or len(inner_v) > 1 or len(wide) > 1 or not last:
            raise ConfigurationError("layers differ in the widths of their gates or MLPs")

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.norm.weight.numel()

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, root: Tensor, scale: float,
        memory: RetNetMemory, wanted: Tensor,
    ) -> Tensor:  # fmt: skip
        """Run all layers on a packed pass; new keys and values go to their pages.

        Args:
            x: ``[total, hidden]`` float32, contiguous.
            cos, sin: ``[total, key_width / 2]``, turn pair i by the token's angle i.
            root: √S ``[total, heads]``.
            scale: of keys.
            memory: what came before.
            wanted: int64 ``[n]``, ascending, the tokens whose results are; the last layer
                computes no more of the others than what later tokens need.

        Returns:
            ``[n, hidden]``, normalised. No gradient flows.

        Raises:
            ConfigurationError: a tensor does not fit, or there is no native core.
        """
        rows, total, tables = memory.rows, memory.rows.total, memory.tables
        heads, width = tables.heads, tables.key_width
        require("x", x, (total, self.hidden))
        for name, table, columns in (("cos", cos, width // 2), ("sin", sin, width // 2),
                                     ("root", root, heads)):  # fmt: skip
            require(name, table, (total, columns))
        self._check_heads(tables)
        memory.check(len(self.layers))
        require_tokens(wanted, total)
        out = torch.empty(len(wanted), self.hidden)
        model = self._struct(tables.address, scale)
        addresses = [ctypes.addressof(a) for a in (*rows.arrays, *memory.arrays, rows.blocks)]
        stores = memory.states, memory.keys, memory.values, memory.moved
        call = abi.RetNetCall(
            ctypes.addressof(model), len(rows.counts), total, *addresses,
            *[s.data_ptr() for s in stores], *[s.stride(0) for s in stores],
            memory.positions.data_ptr(), memory.pages.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            root.data_ptr(), len(wanted), wanted.data_ptr(), x.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if total:
            native.library().retort_retnet(call)
        return out

    def _check_heads(self, tables: RetentionTables) -> None:
        query, _, values = self.layers[0].projections
        heads = tables.heads
        found = (query.n, values.n // 2, self.layers[0].group_norm.weight.numel())
        wanted = (heads * tables.key_width, heads * tables.value_width, tables.value_width)
        if found != wanted:
            raise ConfigurationError(
                f"{heads} heads of widths {tables.key_width} and {tables.value_width} do not make "
                f"keys, values and group norm of {found}"
            )

    def _struct(self, tables: int, scale: float) -> abi.RetNet:
        window = max(layer.window for layer in self.layers)
        norm = self.norm
        return abi.RetNet(
            ctypes.addressof(self._layers), len(self.layers), window, tables, norm.address,
            norm.eps, scale,
        )  # fmt: skip

    @cached_property
    def _layers(self) -> ctypes.Array:
        return int64s([ctypes.addressof(layer.structs[-1]) for layer in self.layers])
