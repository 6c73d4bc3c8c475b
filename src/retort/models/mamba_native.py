"""A DenseMamba pass on the native core: every layer over all tokens at once, no states in memory.

Where the linear layers are packed too, all layers are one call (`native_layers`); else a layer's
parts are calls of their own (`NativePass`).

A layer's features are the inputs of its recurrence. Whoever reads its states scans them again from
the state that the row had before the pass: with the states in registers that is cheaper than to
write tokens × states × channels numbers and read them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retort.cache.mamba import MambaRowCache
from retort.models.mamba_passes import Fuse, PassConvolution
from retort.models.one_call import OneCalls, UnknownPart, norm, packed
from retort.ops import native
from retort.ops.native.mamba import NativeMamba, NativeMambaLayer
from retort.ops.native.scan import ScanRows, ragged_convolution, ragged_scan
from retort.ops.segments import Span
from retort.ops.selective_scan import ScanInputs

SILU = ("silu", "swish")

if TYPE_CHECKING:
    from retort.models.carried import MambaState
    from retort.models.dense_mamba import DenseMambaModel
    from retort.models.mamba_config import DenseMambaConfig


class NativePass:
    """See `retort.models.mamba_passes.MambaPass`; for inference in float32 on a CPU.

    Args:
        counts: tokens of each segment.
        cache: between begin() and end(), or None where every segment starts from nothing.
    """

    def __init__(self, counts: tuple[int, ...], cache: MambaRowCache | None) -> None:
        self._counts, self._cache = counts, cache
        self._span = Span(0, sum(counts))
        self._read = ScanRows(counts, (-1,) * len(counts))
        self._keep: ScanRows | None = None
        if cache is not None and counts:
            self._keep = cache.scan_rows()
            self._read = ScanRows(counts, self._keep.initial)
        self._fed: Tensor | None = None

    def __iter__(self) -> Iterator[Span]:
        """The whole axis as one piece, none where there is no token."""
        return iter([self._span] if self._counts else [])

    def convolve(self, layer: int, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """See `MambaPass.convolve`."""
        segments, width = slice(0, len(self._counts)), conv.kernel_size[0] - 1
        if self._cache is None:
            history = x.new_zeros(len(self._counts), width, x.shape[1])
        else:
            history = self._cache.history(layer, segments)
        self._fed = x
        return ragged_convolution(
            x, history.contiguous(), conv.weight.detach()[:, 0].contiguous(), conv.bias,
            self._counts,
        )  # fmt: skip

    def mix(
        self,
        layer: int,
        inputs: ScanInputs,
        c: Tensor,
        fuse: Fuse | None,
        earlier: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `MambaPass.mix`."""
        y = self._own(layer, inputs, c)
        if fuse is not None:
            count = len(earlier) // len(inputs)
            window = [ScanInputs(*earlier[i::count]) for i in range(count)]
            layers = range(layer - count, layer)
            y = fuse(y, [self._scan(i, x, c) for i, x in zip(layers, window, strict=True)])
        return y, tuple(inputs)

    def _own(self, layer: int, inputs: ScanInputs, c: Tensor) -> Tensor:
        """The layer's own scan, whose kept states and inputs go to the cache."""
        if self._cache is None or self._keep is None or self._fed is None:
            return self._scan(layer, inputs, c)
        states = self._cache.states[layer]
        y = ragged_scan(inputs, c, self._keep, states, states)
        self._cache.tape_inputs(layer, self._span, self._fed, inputs)
        assert y is not None
        return y

    def _scan(self, layer: int, inputs: ScanInputs, c: Tensor) -> Tensor:
        states = inputs.a.new_empty(0, *inputs.a.shape)
        if self._cache is not None:
            states = self._cache.states[layer]
        y = ragged_scan(inputs, c, self._read, states)
        assert y is not None
        return y


def serves(config: DenseMambaConfig, x: Tensor, cache: MambaRowCache | MambaState | None) -> bool:
    """Whether a pass over ``x`` ``[..., hidden]`` runs here: inference in float32 on a CPU.

    Without a cache only where no form was asked for; states that the caller carries stay in torch.
    """
    fits = x.dtype is torch.float32 and x.device.type == "cpu"
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not fits:
        return False
    if config.hidden_act not in SILU:
        return False
    if cache is None:
        return config.scan_form == "auto" and native.available()
    return isinstance(cache, MambaRowCache) and cache.on_core


def native_layers(model: DenseMambaModel) -> NativeMamba | None:
    """The layers and last norm of ``model`` as one call, or None; for passes that `serves`."""
    layers: Any = model.layers
    return _calls.of(model, layers[0].mixer.in_proj, (*layers, model.norm_f))


def run_layers(layers: NativeMamba, x: Tensor, cache: MambaRowCache) -> Tensor:
    """Hidden states after the last norm.

    Args:
        layers: of `native_layers`.
        x: embedded tokens ``[total, hidden]`` of the pass that the cache is in.
        cache: between begin() and end().
    """
    return layers(x.contiguous(), cache.native_memory([layer.a for layer in layers.layers]))


def _native(model: Any) -> NativeMamba:
    window = model.config.dense_block_layers
    layers = [_native_layer(layer, min(i, window)) for i, layer in enumerate(model.layers)]
    return NativeMamba(layers, norm(model.norm_f))


def _native_layer(block: Any, window: int) -> NativeMambaLayer:
    mixer = block.mixer
    conv, select = mixer.conv1d, mixer.select
    if type(conv) is not PassConvolution or conv.weight.dtype is not torch.float32:
        raise UnknownPart(f"conv1d is {type(conv).__name__}")
    return NativeMambaLayer(
        input=packed(mixer.in_proj),
        parameters=packed(mixer.x_proj),
        step=packed(mixer.dt_proj),
        output=packed(mixer.out_proj),
        norm=norm(block.norm),
        convolution=conv.weight.detach()[:, 0].contiguous(),
        convolution_bias=None if conv.bias is None else conv.bias.detach(),
        a=-mixer.A_log.detach().exp().t().contiguous(),
        d=mixer.D.detach(),
        window=window,
        select=[packed(select.fc1), packed(select.fc2)] if select and select.gated else [],
    )


_calls = OneCalls(_native)
