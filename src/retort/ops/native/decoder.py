"""A decoder layer of the Llama family in one native call on a packed pass.

``h = x + attention(norm(x))``, ``y = h + down(silu(gate(norm(h))) * up(norm(h)))``, with rotary
positions in the half-split form and, where a model has them, norms on query and key heads
(Qwen 3). Every step has the arithmetic of the separate kernels, so a row's bits ignore its company.
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
from retort.ops.native.attention import RaggedLayout, RowBuffers
from retort.ops.native.elementwise import Norm, check_angles
from retort.ops.panels import PackedWeight, gated


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Heads of an attention layer and what it does to scores, as in `ragged_attention`."""

    heads: int
    kv_heads: int
    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NativeDecoder:
    """Weights of one layer.

    Attributes:
        projections: query, key and value layers.
        output, gate, up, down: the other linear layers.
        attention_norm, mlp_norm: norms before attention and MLP.
        query_norm, key_norm: norms on each head, or None.
        attention: heads and score options.

    Raises:
        ConfigurationError: sizes do not fit together (when first called).
    """

    projections: Sequence[PackedWeight]
    output: PackedWeight
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    attention_norm: Norm
    mlp_norm: Norm
    attention: AttentionOptions
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: RaggedLayout, buffers: RowBuffers
    ) -> Tensor:
        """Run the layer on a packed pass; new keys and values go into ``buffers``.

        Args:
            x: ``[..., hidden]`` float32 on the CPU with ``layout.total`` rows, contiguous.
            cos, sin: ``[total, rotated]`` float32, contiguous.
            layout: the pass.
            buffers: this layer's buffers in the layout's row order.

        Returns:
            Like ``x``.
        """
        self.check_call(x, layout, buffers)
        check_angles(cos, sin, layout.total, self.key_width)
        out = torch.empty(x.shape)
        call = abi.DecoderCall(
            self.address, layout.address, buffers.keys, buffers.values, cos.data_ptr(),
            sin.data_ptr(), cos.shape[1], layout.total, x.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if layout.total:
            native.library().retort_decoder(call)
        return out

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.projections[0].k

    @cached_property
    def key_width(self) -> int:
        """Width of a query or key head."""
        return self.projections[0].n // self.attention.heads

    @cached_property
    def value_width(self) -> int:
        """Width of a value head."""
        return self.projections[2].n // self.attention.kv_heads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Hidden, query, key/value and inner width, heads, key/value heads."""
        query, _, value = self.projections
        heads = self.attention.heads, self.attention.kv_heads
        return (self.hidden, query.n, value.n, self.gate.n, *heads)

    @cached_property
    def address(self) -> int:
        """Where the layer lies."""
        return ctypes.addressof(self._structs[-1])

    @cached_property
    def _structs(self) -> tuple:
        """What the core reads, the decoder last; the others are kept alive with it."""
        self._check_sizes()
        options, sinks = self.attention, self.attention.sinks
        heads = abi.Heads(
            options.heads, options.kv_heads, self.key_width, self.value_width, options.scaling,
            options.softcap or 0.0, options.sliding_window or 0,
            None if sinks is None else sinks.data_ptr(),
        )  # fmt: skip
        projections = (abi.Linear * 3)(*[p.layer for p in self.projections])
        pair = gated(self.gate, self.up)
        norms = (self.attention_norm, self.mlp_norm, self.query_norm, self.key_norm)
        decoder = abi.Decoder(
            ctypes.addressof(projections), self.output.address, pair.address, self.down.address,
            *[None if n is None else n.address for n in norms],
            *[0.0 if n is None else n.eps for n in norms],
            *[0.0 if n is None else n.offset for n in norms],
            ctypes.addressof(heads),
        )  # fmt: skip
        return heads, projections, pair, decoder

    def _check_sizes(self) -> None:
        heads, kv_heads, hidden = self.attention.heads, self.attention.kv_heads, self.hidden
        query, key, value = self.projections
        sizes = {
            "heads": (heads % kv_heads, 0),
            "query": ((query.n, query.k), (heads * self.key_width, hidden)),
            "key": ((key.n, key.k), (kv_heads * self.key_width, hidden)),
            "value": ((value.n, value.k), (kv_heads * self.value_width, hidden)),
            "output": ((self.output.n, self.output.k), (hidden, heads * self.value_width)),
            "gate": (self.gate.k, hidden),
            "down": ((self.down.n, self.down.k), (hidden, self.gate.n)),
            "attention_norm": (self.attention_norm.weight.numel(), hidden),
            "mlp_norm": (self.mlp_norm.weight.numel(), hidden),
        }
        for name, norm in (("query_norm", self.query_norm), ("key_norm", self.key_norm)):
            if norm is not None:
                sizes[name] = (norm.weight.numel(), self.key_width)
        wrong = {name: got for name, (got, want) in sizes.items() if got != want}
        if wrong:
            raise ConfigurationError(f"sizes of a decoder layer do not fit together: {wrong}")

    def check_call(self, x: Tensor, layout: RaggedLayout, buffers: RowBuffers) -> None:
        """Refuse what `__call__` cannot read."""
        fits = x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()
        if not fits or x.shape[-1:] != (self.hidden,) or x.numel() != layout.total * self.hidden:
            raise ConfigurationError(
                f"expected contiguous float32 rows of {self.hidden} for {layout.total} tokens on "
                f"the CPU, not {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        got = buffers.kv_heads, buffers.key_width, buffers.value_width
        if got != (self.attention.kv_heads, self.key_width, self.value_width):
            raise ConfigurationError(f"buffers of heads and widths {got} do not fit this layer")
        if buffers.capacities != layout.capacities:
            raise ConfigurationError("the layout and the buffers speak of different rows")
