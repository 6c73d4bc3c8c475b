"""Naive recurrences, written from the formulas one token at a time: the ground truth of tests.

Nothing here is fast and nothing is shared with the forms it judges. Inputs keep their dtype;
give float64. One sequence at a time, so that padding does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def retention_sum(q: Tensor, k: Tensor, v: Tensor, gamma: Sequence[float]) -> Tensor:
    """o_n = (Σ_{j≤n} γ^(n−j) (q_n·k_j) v_j) / √S_n with S_n = Σ_{i<n} γ^i.

    Args:
        q: queries ``[T, H, d_k]``.
        k: keys ``[T, H, d_k]``.
        v: values ``[T, H, d_v]``.
        gamma: decay of each head, H numbers.

    Returns:
        ``[T, H, d_v]``.
    """
    rows = []
    for n in range(len(q)):
        heads = []
        for h, g in enumerate(gamma):
            terms = [g ** (n - j) * (q[n, h] @ k[j, h]) * v[j, h] for j in range(n + 1)]
            heads.append(
                sum(terms, torch.zeros_like(v[0, h])) / sum(g**i for i in range(n + 1)) ** 0.5
            )
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def retention_state(k: Tensor, v: Tensor, gamma: Sequence[float]) -> Tensor:
    """R_T by R_n = γ R_{n−1} + k_n v_nᵀ, ``[H, d_k, d_v]``; shapes as in `retention_sum`."""
    decay = torch.tensor(gamma, dtype=k.dtype)[:, None, None]
    state = k.new_zeros(k.shape[1], k.shape[2], v.shape[2])
    for n in range(len(k)):
        state = decay * state + k[n][:, :, None] * v[n][:, None, :]
    return state


def hidden_fusion(
    x: Tensor, own: Tensor, earlier: Sequence[Tensor], fc1: Tensor, fc2: Tensor
) -> Tensor:
    """own + silu(fc2 silu(fc1 x)) ⊙ Σ earlier, token by token (DenseSSM, equations 4 to 6).

    Args:
        x: the layer's normed input ``[T, hidden]``.
        own: this layer's feature ``[T, d]``.
        earlier: the features of at most m layers before it, each ``[T, d]``.
        fc1: weight ``[inner, hidden]``.
        fc2: weight ``[d, inner]``.
    """
    rows = []
    for t in range(len(x)):
        inner = fc1 @ x[t]
        gate = fc2 @ (inner / (1 + torch.exp(-inner)))
        gate = gate / (1 + torch.exp(-gate))
        rows.append(own[t] + gate * sum(f[t] for f in earlier))
    return torch.stack(rows)


def selective_states(a: Tensor, dt: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t of one sequence (Mamba, section 3), ``[T, N, D]``.

    Args:
        a: A ``[N, D]``, negative.
        dt: Δ ``[T, D]``.
        b: B ``[T, N]``.
        u: inputs ``[T, D]``.
    """
    state, states = torch.zeros_like(a), []
    for t in range(len(u)):
        state = torch.exp(dt[t] * a) * state + dt[t] * b[t][:, None] * u[t]
        states.append(state)
    return torch.stack(states)


def dense_readout(c: Tensor, own: Tensor, gate: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """y_t = C_t·(h_t + a_t ⊙ Σ h_t^{l−i}), ``[T, D]`` (DenseMamba, without D u_t).

    Args:
        c: C ``[T, N]``.
        own: this layer's states ``[T, N, D]``.
        gate: a ``[T, D]``.
        earlier: states of at most m layers before it, each ``[T, N, D]``.
    """
    rows = []
    for t in range(len(c)):
        fused = own[t] + gate[t] * sum((h[t] for h in earlier), torch.zeros_like(own[t]))
        rows.append((c[t][:, None] * fused).sum(0))
    return torch.stack(rows)


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_t = bias + Σ_j weight_{K−1−j} x_{t−j} for each channel of one sequence ``[T, D]``.

    Args:
        x: inputs ``[T, D]``.
        weight: ``[D, K]``.
        bias: ``[D]``.
    """
    kernel = weight.shape[1]
    rows = []
    for t in range(len(x)):
        taps = [weight[:, kernel - 1 - j] * x[t - j] for j in range(min(kernel, t + 1))]
        rows.append(bias + sum(taps, torch.zeros_like(bias)))
    return torch.stack(rows)
