"""The dense connection of DenseSSM (arXiv 2403.00818): earlier layers' hidden features, fused.

A layer l of a state-space model has *features* of each token (retention: its keys and values;
Mamba: its hidden states). From layer 1 on they are fused with those of up to m layers before:

    fused = own + silu(fc2 silu(fc1 x)) ⊙ Σ_{i=1..min(m,l)} feature^{l−i}

x is the layer's normed input: equation 4 is the selective transition (its projection is the
identity, as in the authors' code), equation 5 the sum over the window, equation 6 the fusion.
Features belong to tokens, so nothing of this needs a cache: in every pass, packed or not, the
earlier layers' features of the same tokens come from the pass itself.

To add it to another model: one `HiddenFusion` a feature in every layer from 1 on, and one
`FeatureWindow` a forward pass; see `dense_retnet.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retort.ops.elementwise import rms_norm, silu


class RMSNorm(nn.Module):
    """RMSNorm over the last ``dim`` features, in the input's dtype (float64-clean)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``; half precision is reduced in float32."""
        return rms_norm(x, self.weight, self.eps)


class HiddenFusion(nn.Module):
    """Selective transition and fusion of one feature (equations 4 and 6).

    Args:
        hidden_size: width of the layer's input.
        feature_size: width d of the feature, or of the gate where it broadcasts over the rest.
        gate_size: inner width of the gate; None leaves it out: earlier features are added as
            they are, with no weight (an ablation).
    """

    def __init__(self, hidden_size: int, feature_size: int, gate_size: int | None) -> None:
        super().__init__()
        self.gated = gate_size is not None
        if gate_size is None:
            return
        self.fc1 = nn.Linear(hidden_size, gate_size, bias=False)
        self.fc2 = nn.Linear(gate_size, feature_size, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """silu(fc2 silu(fc1 x)), ``[..., d]`` of ``[..., hidden]``."""
        return silu(self.fc2(silu(self.fc1(x))))

    def forward(self, x: Tensor, own: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """The fused feature ``[..., d]`` of the layer's own and the earlier ones."""
        total = sum(earlier[1:], earlier[0])
        return own + (self.gate(x) * total if self.gated else total)


class FeatureWindow:
    """The features of the last m layers of one forward pass (equation 5's window)."""

    def __init__(self, layers: int) -> None:
        self._features: deque[tuple[Tensor, ...]] = deque(maxlen=layers)

    def push(self, *features: Tensor) -> None:
        """Add a layer's features; those of the oldest layer fall out."""
        self._features.append(features)

    def flat(self) -> list[Tensor]:
        """All features, kind after kind: m keys, then m values, for a model that has both.

        Flat, because gradient checkpointing tracks tensors that are arguments of their own.
        """
        return [tensor for kind in zip(*self._features, strict=True) for tensor in kind]
