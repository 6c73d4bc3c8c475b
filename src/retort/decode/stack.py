"""All layers of a model as one native call, where every one of them is fused already.

The model's body must be embedding, rotary positions, a list of layers and a last norm, and nothing
else; two probe passes, both ways, prove it. Outside a packed pass the body's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from retort.cache.native import NativeAttentionRowCache
from retort.decode.fusion import FusedLayers, Inference, OwnForward, close, norm_of, probe_passes
from retort.errors import RetortError
from retort.ops.native.stack import NativeStack

_CHILDREN = {"embed_tokens", "layers", "norm", "rotary_emb"}


class FusedStack:
    """A model's body whose forward is one native call inside packed passes.

    Args:
        model: a causal model whose layers were fused.
        layers: the fused layers.
        inference: sets the model up for a pass.

    Raises:
        RetortError: the body is of another kind, or gives other numbers.
    """

    def __init__(self, model: Any, layers: FusedLayers, inference: Inference) -> None:
        self.layer = model.base_model  # named as in `FusedLayer`, for `OwnForward`
        self._layers = layers
        self._check_body()
        self.refresh()
        self._probe(model, inference)
        self.layer.forward = OwnForward(_forward, self, self.layer.forward)

    def refresh(self) -> None:
        """Follow layers that were packed again."""
        by_module = {id(f.layer): f for f in self._layers.fused}
        fused = [by_module[id(layer)] for layer in self.layer.layers]
        self.indices = [f.layer.self_attn.layer_idx for f in fused]
        self.native = NativeStack([f.native for f in fused], norm_of(self.layer.norm))

    def restore(self) -> None:
        """Give the body its own forward back."""
        del self.layer.forward

    def run(self, ids: Tensor, position_ids: Tensor, cache: NativeAttentionRowCache) -> Tensor:
        """Last hidden states ``[1, total, hidden]``, normalised."""
        hidden = self.layer.embed_tokens(ids)
        cos, sin = (a[0].contiguous() for a in self.layer.rotary_emb(hidden, position_ids))
        first = self.native.layers[0]
        places = cache.stack_places(self.indices, first.attention.kv_heads, first.key_width)
        return self.native(hidden.contiguous(), cos, sin, *places)

    def _check_body(self) -> None:
        body = self.layer
        if set(body._modules) != _CHILDREN or "forward" in body.__dict__:
            raise RetortError(f"{type(body).__name__} is not embedding, layers, norm and rotary")
        if {id(f.layer) for f in self._layers.fused} != set(map(id, body.layers)):
            raise RetortError("not every layer is fused")
        watched = (body, body.norm, body.layers)
        if any(m._forward_hooks or m._forward_pre_hooks for m in watched):
            raise RetortError("it has forward hooks")

    @torch.no_grad()
    def _probe(self, model: Any, inference: Inference) -> None:
        own, ours = NativeAttentionRowCache(), NativeAttentionRowCache()
        vocab = self.layer.embed_tokens.num_embeddings
        for rows, counts in probe_passes(own, ours):
            ids = torch.arange(sum(counts))[None] * 7 % vocab
            positions = own.begin(rows, counts).position_ids()
            ours.begin(rows, counts)
            with inference(model, own):
                want = self.layer(
                    input_ids=ids, position_ids=positions, past_key_values=own, use_cache=True
                ).last_hidden_state
            got = self.run(ids, positions, ours)
            own.end()
            ours.end()
            if not close(got, want):
                raise RetortError("its own forward gives other numbers than the native layers")


def _forward(
    fused: FusedStack,
    own: Callable,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The body's forward: native in a packed pass, else its own."""
    packed = (
        isinstance(past_key_values, NativeAttentionRowCache) and past_key_values.layout is not None
    )
    plain = all(value is None or value is False for value in kwargs.values())
    given = input_ids is not None and position_ids is not None
    if not (packed and plain and given) or torch.is_grad_enabled():
        return own(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
    assert input_ids is not None and position_ids is not None
    hidden = fused.run(input_ids, position_ids, past_key_values)
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
