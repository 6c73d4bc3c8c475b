"""All layers of a DenseRetNet in one native call, where its linear layers are packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.cache.retention import RetentionRowCache
from retort.models.one_call import OneCalls, norm, packed
from retort.ops.native.retnet import NativeRetNet, NativeRetNetLayer
from retort.ops.retention import position_tables

if TYPE_CHECKING:
    from retort.models.dense_retnet import DenseRetNetModel


def native_layers(model: DenseRetNetModel, x: Tensor) -> NativeRetNet | None:
    """The layers and last norm of ``model`` as one call for ``x`` ``[..., hidden]``, or None.

    For inference in float32; the caller has a cache on the core.
    """
    if x.dtype is not torch.float32 or (model.training and model.config.dropout):
        return None
    return whole_call(model)


def whole_call(model: DenseRetNetModel) -> NativeRetNet | None:
    """As `native_layers`, for any input that the core takes."""
    layers: Any = model.layers
    return _calls.of(model, layers[0].self_attn.q_proj, (*layers, model.norm))


def run_layers(
    layers: NativeRetNet,
    model: DenseRetNetModel,
    x: Tensor,
    positions: Tensor,
    cache: RetentionRowCache,
    wanted: Tensor | None = None,
) -> Tensor:
    """Hidden states after the last norm, ``[total, hidden]``.

    Args:
        layers: of `native_layers`.
        model: whose they are.
        x: embedded tokens ``[total, hidden]`` of the pass that the cache is in.
        positions: int64 ``[total]``, each token's position in its row.
        cache: between begin() and end().
        wanted: int64, ascending, the tokens whose results are; the others' are 0. None: all.
    """
    shape = model.cache_shape
    angles = position_tables(shape.heads, shape.key_dim).at(positions)
    memory = cache.native_memory(positions.contiguous())
    some = torch.arange(len(x)) if wanted is None else wanted
    out = layers(x.contiguous(), *angles, shape.key_dim**-0.5, memory, some)
    return out if len(some) == len(x) else torch.zeros_like(x).index_copy_(0, some, out)


def _native(model: Any) -> NativeRetNet:
    window = model.config.dense_block_layers
    layers = [_native_layer(layer, min(i, window)) for i, layer in enumerate(model.layers)]
    return NativeRetNet(layers, norm(model.norm))


def _native_layer(layer: Any, window: int) -> NativeRetNetLayer:
    mixer, mlp = layer.self_attn, layer.mlp
    parts = [] if mlp is None else [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    selects = [mixer.k_select, mixer.v_select] if mixer.dense else []
    gates = [s.fc1 for s in selects if s.gated] + [s.fc2 for s in selects if s.gated]
    return NativeRetNetLayer(
        projections=[packed(m) for m in (mixer.q_proj, mixer.k_proj, mixer.vg_proj)],
        output=packed(mixer.o_proj),
        norm=norm(layer.input_layernorm),
        group_norm=norm(mixer.group_norm),
        window=window,
        selects=[packed(m) for m in gates],
        fused_norms=[norm(mixer.k_norm), norm(mixer.v_norm)] if mixer.normed else None,
        mlp=[packed(m) for m in parts],
        mlp_norm=norm(layer.post_attention_layernorm) if parts else None,
    )


_calls = OneCalls(_native)
