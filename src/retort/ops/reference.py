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
