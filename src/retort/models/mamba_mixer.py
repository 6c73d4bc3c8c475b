"""One layer of DenseMamba (`dense_mamba.py`): norm, selective state-space mixer, residual.

A mixer computes what belongs to tokens; the scan over them is the pass's (`mamba_passes.py`).
The real tokens of all rows lie on one axis ``[n, ...]``, row after row.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from retort.errors import ConfigurationError
from retort.models.dense import HiddenFusion, RMSNorm
from retort.models.mamba_config import DenseMambaConfig
from retort.models.mamba_native import SILU
from retort.models.mamba_passes import MambaPass, PassConvolution
from retort.ops.elementwise import silu, softplus
from retort.ops.selective_scan import ScanInputs

# A mark on the linear itself: loading a Mamba checkpoint initialises missing leaves only.
STARTS_AT_ZERO = "_starts_at_zero"


class DenseMambaMixer(nn.Module):
    """The selective state-space mixer (Mamba, section 3.4) with the dense readout."""

    def __init__(self, config: DenseMambaConfig, layer_idx: int) -> None:
        super().__init__()
        hidden, inner, states = config.hidden_size, config.intermediate_size, config.state_size
        self.config, self.layer_idx = config, layer_idx
        self.rank = int(config.time_step_rank)
        self.act = silu if config.hidden_act in SILU else ACT2FN[config.hidden_act]
        self.conv1d = PassConvolution(
            inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1,
            bias=config.use_conv_bias,
        )  # fmt: skip
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=config.use_bias)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=config.use_bias)
        self.select: HiddenFusion | None = None
        if layer_idx > 0 and config.dense_block_layers > 0:
            gate = hidden // config.intermediate_select_scale if config.dense_gate else None
            self.select = HiddenFusion(hidden, inner, gate)
            if gate is not None:
                setattr(self.select.fc2, STARTS_AT_ZERO, True)

    def forward(
        self, x: Tensor, step: MambaPass, *earlier: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One mixer without its residual.

        Args:
            x: normed input ``[n, hidden]``.
            step: the pass.
            *earlier: features of the layers in the window.

        Returns:
            Output ``[n, hidden]`` and this layer's features, as the pass wants them.
        """
        if not isinstance(self.conv1d, nn.Conv1d):
            raise ConfigurationError(
                "conv1d is wrapped (an adapter?), but a pass reads its own weights: leave it out"
            )
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.act(self.conv1d(u, self.layer_idx, step))
        states = self.A_log.shape[1]
        dt, b, c = self.x_proj(u).split([self.rank, states, states], -1)
        wide = partial(torch.Tensor.to, dtype=torch.promote_types(x.dtype, torch.float32))
        inputs = ScanInputs(
            a=-wide(self.A_log).exp().t().contiguous(),
            dt=softplus(wide(self.dt_proj(dt))),
            b=wide(b),
            u=wide(u),
        )
        fuse = None if self.select is None else partial(self._fused, x)
        y, features = step.mix(self.layer_idx, inputs, wide(c), fuse, earlier)
        y = y + wide(self.D) * inputs.u
        y = silu(z, y) if self.act is silu else y * self.act(z)
        return self.out_proj(y.to(x.dtype)), features

    def _fused(self, x: Tensor, own: Tensor, earlier: list[Tensor]) -> Tensor:
        """own + a ⊙ Σ earlier, of states ``[n, N, D]`` or of what C reads of them ``[n, D]``."""
        assert self.select is not None
        return self.select(x.unsqueeze(1) if own.ndim == 3 else x, own, earlier)

    @torch.no_grad()
    def initialise(self) -> None:
        """Mamba's initial values (its authors')."""
        config, inner = self.config, len(self.D)
        init.copy_(self.A_log, torch.arange(1.0, config.state_size + 1).log().expand(inner, -1))
        init.ones_(self.D)
        std = self.rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, std)
        else:
            init.uniform_(self.dt_proj.weight, -std, std)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = (low + torch.rand(inner) * (high - low)).exp().clamp(min=config.time_step_floor)
        init.copy_(self.dt_proj.bias, dt + (-torch.expm1(-dt)).log())  # inverse of softplus
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        if config.rescale_prenorm_residual:
            init.copy_(self.out_proj.weight, self.out_proj.weight / config.num_hidden_layers**0.5)


class DenseMambaBlock(GradientCheckpointingLayer):
    """Norm, mixer, residual."""

    def __init__(self, config: DenseMambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = DenseMambaMixer(config, layer_idx)

    def forward(
        self, hidden_states: Tensor, step: MambaPass, *earlier: Tensor
    ) -> tuple[Tensor, ...]:
        """Next hidden states ``[n, hidden]``, then this layer's features."""
        x = self.norm(hidden_states.to(self.norm.weight.dtype))
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(
                torch.promote_types(hidden_states.dtype, torch.float32)
            )
        out, features = self.mixer(x, step, *earlier)
        return hidden_states + out, *features
