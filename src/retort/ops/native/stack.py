"""All decoder layers of a model and the norm after them in one native call on a packed pass."""

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
from retort.ops.native.attention import RaggedLayout, RowBuffers
from retort.ops.native.decoder import NativeDecoder
from retort.ops.native.elementwise import Norm, check_angles


class StackBuffers:
    """The row buffers of all layers, in the layers' order; made again when a row moves.

    Args:
        layers: of each layer, all in the same row order.

    Raises:
        ConfigurationError: the layers' buffers differ in rows or sizes, or there are none.
    """

    def __init__(self, layers: Sequence[RowBuffers]) -> None:
        shapes = {(b.capacities, b.kv_heads, b.key_width, b.value_width) for b in layers}
        if len(shapes) != 1:
            raise ConfigurationError(f"buffers of {len(layers)} layers with {len(shapes)} shapes")
        self.layers = tuple(layers)
        count = len(layers)
        self._pointers = (ctypes.c_int64 * (2 * count))(
            *[b.keys for b in layers], *[b.values for b in layers]
        )
        self.keys = ctypes.addressof(self._pointers)
        self.values = self.keys + 8 * count


@dataclass(frozen=True, eq=False)
class NativeStack:
    """Decoder layers of equal sizes, one after the other, then a norm.

    Attributes:
        layers: at least one.
        norm: the norm after the last layer.

    Raises:
        ConfigurationError: sizes do not fit together.
    """

    layers: Sequence[NativeDecoder]
    norm: Norm

    def __post_init__(self) -> None:
        sizes = {layer.sizes for layer in self.layers}
        if len(sizes) != 1 or self.norm.weight.numel() != self.layers[0].hidden:
            raise ConfigurationError(
                f"a stack needs layers and a norm of one size, not {sorted(sizes)} and "
                f"{self.norm.weight.numel()}"
            )

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: RaggedLayout, buffers: StackBuffers
    ) -> Tensor:
        """Run all layers on a packed pass, as `NativeDecoder` runs one.

        Args:
            x: ``[..., hidden]`` float32 on the CPU with ``layout.total`` rows, contiguous.
            cos, sin: ``[total, rotated]`` float32, contiguous.
            layout: the pass.
            buffers: of every layer, in the layout's row order.

        Returns:
            Like ``x``, normalised.
        """
        if len(buffers.layers) != len(self.layers):
            raise ConfigurationError(
                f"buffers of {len(buffers.layers)} layers for {len(self.layers)} layers"
            )
        self.layers[0].check_call(x, layout, buffers.layers[0])
        check_angles(cos, sin, layout.total, self.layers[0].key_width)
        out = torch.empty(x.shape)
        call = abi.StackCall(
            self._address, layout.address, buffers.keys, buffers.values, cos.data_ptr(),
            sin.data_ptr(), cos.shape[1], layout.total, x.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if layout.total:
            native.library().retort_stack(call)
        return out

    @cached_property
    def _address(self) -> int:
        return ctypes.addressof(self._structs[-1])

    @cached_property
    def _structs(self) -> tuple:
        """What the core reads, the stack last; the layers' addresses are kept alive with it."""
        count = len(self.layers)
        layers = (ctypes.c_int64 * count)(*[layer.address for layer in self.layers])
        norm = self.norm
        stack = abi.Stack(ctypes.addressof(layers), count, norm.address, norm.eps, norm.offset)
        return layers, stack
