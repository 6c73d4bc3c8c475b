"""One layer of DenseRetNet (`dense_retnet.py`): gated retention, and a gated MLP where wanted.

A layer computes what belongs to tokens; retention over them is the pass's, which all layers share.
Shapes: B rows, T tokens, H heads; a packed pass is ``[1, total]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from retort.models.dense import HiddenFusion, RMSNorm
from retort.models.retnet_config import DenseRetNetConfig
from retort.ops.elementwise import silu


@dataclass(frozen=True)
class RetentionPass:
    """What all layers of one forward pass share.

    Attributes:
        rotate: turns ``[B, T, H, d_k]`` by the tokens' positions.
        root: √S_n ``[B, T, H, 1]``.
        mix: (layer, q, k, v) → Y, each ``[B, T, H, d]``.
    """

    rotate: Callable[[Tensor], Tensor]
    root: Tensor
    mix: Callable[[int, Tensor, Tensor, Tensor], Tensor]


class DenseRetention(nn.Module):
    """Gated retention with fused keys and values (DenseSSM, section 3.2)."""

    def __init__(self, config: DenseRetNetConfig, layer_idx: int) -> None:
        super().__init__()
        hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.scale = (keys // self.heads) ** -0.5
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.vg_proj = nn.Linear(hidden, 2 * values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.group_norm = RMSNorm(values // self.heads, config.rms_norm_eps)
        self.dense = layer_idx > 0 and config.dense_block_layers > 0
        self.normed = self.dense or (layer_idx > 0 and config.dense_norms)
        if self.dense:
            k_gate = hidden // config.intermediate_k_select_scale
            v_gate = hidden // config.intermediate_v_select_scale
            self.k_select = HiddenFusion(hidden, keys, k_gate if config.dense_gate else None)
            self.v_select = HiddenFusion(hidden, values, v_gate if config.dense_gate else None)
        if self.normed:
            self.k_norm = RMSNorm(keys, config.rms_norm_eps)
            self.v_norm = RMSNorm(values, config.rms_norm_eps)

    def forward(
        self, x: Tensor, step: RetentionPass, *earlier: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One retention block without its residual.

        Args:
            x: normed input ``[B, T, hidden]``.
            step: the pass.
            *earlier: keys, then values, of the layers in the window.

        Returns:
            Output ``[B, T, hidden]`` and this layer's features: its keys and values before
            fusion, norm and rotary.
        """
        k = silu(self.k_proj(x)) * self.scale
        v, g = silu(self.vg_proj(x)).chunk(2, -1)
        fused_k, fused_v = self._fused(x, k, v, earlier)
        q, fused_k, fused_v = (
            t.unflatten(-1, (self.heads, -1)).to(step.root.dtype)
            for t in (silu(self.q_proj(x)), fused_k, fused_v)
        )
        q, fused_k = step.rotate(q), step.rotate(fused_k)
        y = step.mix(self.layer_idx, q, fused_k, fused_v) / step.root
        y = self.group_norm(y).to(x.dtype).flatten(-2)
        return self.o_proj(y * g), k, v

    def _fused(
        self, x: Tensor, k: Tensor, v: Tensor, earlier: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if self.dense:
            half = len(earlier) // 2
            k, v = self.k_select(x, k, earlier[:half]), self.v_select(x, v, earlier[half:])
        if self.normed:
            k, v = self.k_norm(k), self.v_norm(v)
        return k, v


class GatedMLP(nn.Module):
    """down(silu(gate x) ⊙ up x), with the names of Llama's MLP so that its weights fit."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., hidden]``."""
        return self.down_proj(silu(self.gate_proj(x), self.up_proj(x)))


class DenseRetNetLayer(GradientCheckpointingLayer):
    """Norm, retention, residual; and norm, MLP, residual where the configuration has one."""

    def __init__(self, config: DenseRetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DenseRetention(config, layer_idx)
        self.dropout = config.dropout
        self.mlp: GatedMLP | None = None
        if config.mlp_intermediate_size:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = GatedMLP(config.hidden_size, config.mlp_intermediate_size)

    def forward(
        self, hidden_states: Tensor, step: RetentionPass, *earlier: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next hidden states ``[B, T, hidden]`` and this layer's two features."""
        out, k, v = self.self_attn(self.input_layernorm(hidden_states), step, *earlier)
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        if self.mlp is not None:
            out = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        return hidden_states, k, v
