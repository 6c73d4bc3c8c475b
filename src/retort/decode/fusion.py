"""Decoder layers of the Llama family as one native call each, found by shape and proven by a probe.

A candidate has norms before attention and MLP, query/key/value/output and gate/up/down layers
under their usual names. Names prove nothing (residual scales, other activations, interleaved
rotary pairs), so every candidate runs two small packed passes both ways; a layer whose results
differ keeps its own forward. What it passes to the attention function (scaling, window, softcap)
is recorded in the probe. Outside a packed pass the layer's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from retort.cache.native import NativeAttentionRowCache
from retort.errors import RetortError
from retort.ops.native.decoder import AttentionOptions, NativeDecoder
from retort.ops.native.elementwise import Norm
from retort.ops.packing import PackedLinear

Inference = Callable[[Any, NativeAttentionRowCache], AbstractContextManager]

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_TOLERANCE = 1e-4


@dataclass(eq=False)
class FusedLayer:
    """A decoder layer whose forward is native inside packed passes.

    Attributes:
        layer: the model's module.
        options: what its attention asks for.
        native: its weights as the core reads them.
    """

    layer: Any
    options: AttentionOptions
    native: NativeDecoder

    def refresh(self) -> None:
        """Follow weights that were packed again."""
        self.native = _native_decoder(self.layer, self.options)


class FusedLayers:
    """The fused layers of a model; `restore` gives them their own forward back.

    Attributes:
        fused: the layers that are native now.
        skipped: module name → why a candidate keeps its own forward.
    """

    def __init__(self, model: Any, inference: Inference) -> None:
        self.fused: list[FusedLayer] = []
        self.skipped: dict[str, str] = {}
        for name, layer in model.named_modules():
            if not _is_candidate(layer):
                continue
            try:
                fused = _probe(model, name, layer, inference)
            except Exception as error:  # whatever a foreign forward raises, it keeps that forward
                self.skipped[name] = f"{type(error).__name__}: {error}"
                continue
            layer.forward = OwnForward(_forward, fused, layer.forward)
            self.fused.append(fused)

    def refresh(self) -> None:
        """Follow weights that were packed again."""
        for fused in self.fused:
            fused.refresh()

    def restore(self) -> None:
        """Give every layer its own forward back."""
        for fused in self.fused:
            del fused.layer.forward
        self.fused.clear()


class OwnForward(partial):
    """A fused layer's forward; a copy of the layer gets its class's own, without the core."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable:
        layer = self.args[0].layer
        return MethodType(type(layer).forward, deepcopy(layer, memo))


def _forward(
    fused: FusedLayer,
    own: Callable,
    hidden_states: Tensor,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """A decoder layer's forward: native in a packed pass, else its own."""
    cache = past_key_values
    packed = isinstance(cache, NativeAttentionRowCache) and cache.layout is not None
    if args or not packed or position_embeddings is None or torch.is_grad_enabled():
        return own(
            hidden_states,
            *args,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
    native, options = fused.native, fused.options
    places = cache.places(fused.layer.self_attn.layer_idx, options.kv_heads, native.key_width)
    cos, sin = (angles[0].contiguous() for angles in position_embeddings)
    return native(hidden_states.contiguous(), cos, sin, *places)


def _is_candidate(layer: nn.Module) -> bool:
    if set(layer._modules) != _CHILDREN or "forward" in layer.__dict__:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        *(getattr(attention, f"{name}_proj", None) for name in "qkvo"),
        *(getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")),
    ]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    return (
        all(isinstance(linear, PackedLinear) for linear in linears)
        and hasattr(attention, "layer_idx")
        and hasattr(attention, "head_dim")
        and not hooked
    )


class _Recorder(NativeAttentionRowCache):
    """Remembers what a layer passes to the attention function."""

    options: dict[str, Any]

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        self.options = options
        return super().attend(layer_idx, query, value_dim, **options)


@torch.no_grad()
def _probe(model: Any, name: str, layer: Any, inference: Inference) -> FusedLayer:
    """Fuse a layer and compare it with its own forward on two packed passes.

    Raises:
        RetortError: it cannot be fused, or the results differ.
    """
    rotary = _rotary(model, name)
    own, ours = _Recorder(), NativeAttentionRowCache()
    passes = probe_passes(own, ours)
    inputs = _probe_inputs(layer, [sum(counts) for _, counts in passes])
    with inference(model, own):
        want = [
            _run(layer.forward, rotary, own, *p, x) for p, x in zip(passes, inputs, strict=True)
        ]
    fused = _fuse(layer, own.options)
    forward = partial(_forward, fused, layer.forward)
    got = [_run(forward, rotary, ours, *p, x) for p, x in zip(passes, inputs, strict=True)]
    for a, b in zip(got, want, strict=True):
        if not close(a, b):
            raise RetortError("its own forward gives other numbers than the native layer")
    return fused


def probe_passes(*caches: NativeAttentionRowCache) -> list[tuple[tuple, tuple]]:
    """Rows and token counts of two passes; the caches get the rows."""
    for cache in caches:
        cache.add_row(), cache.add_row()
    return [((0, 1), (3, 2)), ((1, 0), (1, 4))]


def close(got: Tensor, want: Tensor) -> bool:
    """Whether two ways of computing the same agree up to rounding."""
    return torch.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE * float(want.abs().max()))


def _fuse(layer: Any, options: dict[str, Any]) -> FusedLayer:
    attention = layer.self_attn
    heads, kv_heads = (
        p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)
    )
    known = AttentionOptions(heads, kv_heads, **options)
    native = _native_decoder(layer, known)
    if native.key_width != native.value_width:
        raise RetortError("keys and values of unequal width")
    return FusedLayer(layer, known, native)


def _native_decoder(layer: Any, options: AttentionOptions) -> NativeDecoder:
    attention, mlp = layer.self_attn, layer.mlp
    return NativeDecoder(
        projections=[getattr(attention, f"{name}_proj").packed for name in "qkv"],
        output=attention.o_proj.packed,
        gate=mlp.gate_proj.packed,
        up=mlp.up_proj.packed,
        down=mlp.down_proj.packed,
        attention_norm=norm_of(layer.input_layernorm),
        mlp_norm=norm_of(layer.post_attention_layernorm),
        attention=options,
        query_norm=norm_of(getattr(attention, "q_norm", None)),
        key_norm=norm_of(getattr(attention, "k_norm", None)),
    )


def norm_of(module: Any) -> Any:
    """The RMSNorm of a module, its offset (0 or 1) left to the probe: 0 unless it is Gemma's."""
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise RetortError(f"{type(module).__name__} is no RMSNorm with a weight")
    return Norm(module.weight.detach(), eps)


def _probe_inputs(layer: Any, totals: Sequence[int]) -> list[Tensor]:
    """Random hidden states; a generator of our own leaves the caller's random state alone."""
    generator, hidden = torch.Generator().manual_seed(0), layer.self_attn.q_proj.in_features
    return [torch.randn(1, total, hidden, generator=generator) for total in totals]


def _rotary(model: Any, name: str) -> Any:
    """The rotary module beside the list of layers."""
    parent = model.get_submodule(name.rsplit(".", 2)[0]) if name.count(".") > 1 else model
    rotary = getattr(parent, "rotary_emb", None)
    if rotary is None:
        raise RetortError("no rotary positions beside its layer list")
    return rotary


def _run(
    forward: Callable,
    rotary: Any,
    cache: NativeAttentionRowCache,
    rows: Sequence[int],
    counts: Sequence[int],
    x: Tensor,
) -> Tensor:
    layout = cache.begin(rows, counts)
    positions = layout.position_ids()
    try:
        return forward(
            x,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rotary(x, positions),
        )
    finally:
        cache.end()
