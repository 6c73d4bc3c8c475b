"""The attention row cache on the native core: append and attention of all rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retort.cache.attention import AttentionRowCache
from retort.cache.rows import PackedRows
from retort.ops.native.attention import RaggedLayout, RowBuffers, ragged_attention
from retort.ops.native.stack import StackBuffers


class NativeAttentionRowCache(AttentionRowCache):
    """For float32 models on a CPU; a row's bits do not depend on its company."""

    def __init__(self, poison: float | None = None) -> None:
        super().__init__(poison)
        self._new: tuple[Tensor, Tensor] | None = None
        self._ragged: RaggedLayout | None = None
        self._stack: tuple[tuple, StackBuffers] | None = None
        self._pointers: dict[int, tuple[tuple, RowBuffers]] = {}
        self._single: dict[int, dict[int, RowBuffers]] = {}  # of each row and layer
        self._generation = 0

    def places(self, layer_idx: int, kv_heads: int, width: int) -> tuple[RaggedLayout, RowBuffers]:
        """The pass and the buffers of a layer that appends and attends by itself."""
        assert self._ragged is not None
        self._open_layer(layer_idx, torch.empty(1, kv_heads, 0, width))
        return self._ragged, self._row_buffers(layer_idx)

    def stack_places(
        self, layers: Sequence[int], kv_heads: int, width: int
    ) -> tuple[RaggedLayout, StackBuffers]:
        """`places` of all layers at once; found again at each pass only when a row moved."""
        assert self._ragged is not None
        key = (self._active().rows, self._generation)
        if self._stack is None or self._stack[0] != key:
            buffers = [self.places(layer, kv_heads, width)[1] for layer in layers]
            key = (key[0], self._generation)  # new rows were given buffers
            self._stack = key, StackBuffers(buffers)
        return self._ragged, self._stack[1]

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        """Append, then attention of packed queries ``[1, heads, total, head_dim]``."""
        assert self._new is not None and self._ragged is not None
        keys, values = (t[0].transpose(0, 1) for t in self._new)
        out = ragged_attention(
            query[0].transpose(0, 1),
            keys,
            values,
            self._ragged,
            self._row_buffers(layer_idx),
            **options,
        )
        return out.view(out.shape[0], query.shape[1], value_dim)

    def _reserve(self, layout: PackedRows) -> None:
        super()._reserve(layout)
        capacities = [self.capacity(row) for row in layout.rows]
        self._ragged = RaggedLayout(layout.starts, layout.counts, capacities)

    def _grow(self, row: int, used: int, capacity: int) -> None:
        self._generation += 1
        self._single.pop(row, None)
        super()._grow(row, used, capacity)

    def _close(self, row: int) -> None:
        self._generation += 1
        self._pointers.clear()
        self._single.pop(row, None)
        self._stack = None
        super()._close(row)

    def _copy_in(self, row: int, state: Any) -> None:
        self._generation += 1
        self._single.pop(row, None)
        super()._copy_in(row, state)

    def _append(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        """Remember the new keys and values; `attend` stores them where it reads them."""
        self._new = keys, values
        self._open_layer(layer_idx, keys)

    def _open_layer(self, layer_idx: int, like: Tensor) -> None:
        """Give rows that are new to a layer a buffer in it."""
        for row in self._active().rows:
            if layer_idx not in self._buffers[row]:
                self._generation += 1
                self._buffer(row, layer_idx, like)

    def _row_buffers(self, layer_idx: int) -> RowBuffers:
        """Addresses of a layer's buffers, made anew only when a row joined, left or grew."""
        key = (self._active().rows, self._generation)
        known = self._pointers.get(layer_idx)
        if known is None or known[0] != key:
            known = key, RowBuffers.joined([self._row(row, layer_idx) for row in key[0]])
            self._pointers[layer_idx] = known
        return known[1]

    def _row(self, row: int, layer_idx: int) -> RowBuffers:
        """One row's buffer of a layer: made once, since some row of a batch grows at most steps."""
        layers = self._single.setdefault(row, {})
        if layer_idx not in layers:
            keys, values = self._buffers[row][layer_idx]
            layers[layer_idx] = RowBuffers([keys], [values])
        return layers[layer_idx]


def serves(model: Any) -> bool:
    """Whether the native kernels fit a model's device and dtype."""
    return model.device.type == "cpu" and model.dtype == torch.float32
