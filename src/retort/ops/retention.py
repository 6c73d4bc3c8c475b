"""Retention: decayed linear attention in its parallel, chunkwise, recurrent and blockwise forms.

With R_n = γ R_{n−1} + k_n v_nᵀ every form returns Y_n = q_n R_n; the mixer's output is
o_n = Y_n / √S_n (`normaliser`). The recurrent answer is the canonical one. Shapes: q and k are
``[B, T, H, d_k]``, v and Y are ``[B, T, H, d_v]``, all in float32 or float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retort.ops.clock import Clock

Form = Literal["chunkwise", "parallel", "recurrent", "clamped"]
CLAMP = (1.0, 5e4)
"""Bounds of the authors' row sum in their parallel mode."""


def log_decay(num_heads: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """log γ_h = log1p(−2^(−5−h)), ``[H]``, in float32 or wider."""
    heads = torch.arange(num_heads, dtype=dtype, device=device)
    return torch.log1p(-torch.exp2(-5 - heads))


def rotary_phase(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """e^(i · position · 10000^−linspace(0, 1, dim/2)), complex ``[..., dim/2]`` of ``dtype``."""
    steps = torch.linspace(0, 1, dim // 2, dtype=dtype, device=positions.device)
    angle = positions.to(dtype)[..., None] * 10000.0**-steps
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i+1) of ``x`` ``[..., H, d]`` by ``[..., d/2]``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase.unsqueeze(-2)).flatten(-2)


def normaliser(seen: Tensor, decay: Tensor) -> Tensor:
    """√S_n for ``seen`` = n ``[...]`` and log γ ``[H]``: ``[..., H]``, 1 where n = 0.

    S_n = (1−γ^n)/(1−γ) by expm1, because the plain form cancels in float32 for many heads.
    """
    n = seen.clamp_min(1).to(decay.dtype)[..., None]
    return (torch.expm1(n * decay) / torch.expm1(decay)).sqrt()


class PositionTables:
    """Rotary cosines and sines and √S_n by position, float32 on the CPU.

    Grown by whole blocks of positions, so that a position's bits are the same in every pass: torch
    computes the last few elements of a tensor by another formula than the others.
    """

    BLOCK = 1024

    def __init__(self, heads: int, key_dim: int) -> None:
        self._decay, self._dim = log_decay(heads, torch.float32), key_dim
        self._tables = [torch.empty(0, n) for n in (key_dim // 2, key_dim // 2, heads)]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin ``[n, key_dim/2]`` and √S_(p+1) ``[n, H]`` of positions p ``[n]``."""
        last = int(positions.max()) if len(positions) else -1
        while (first := len(self._tables[0])) <= last:
            new = self._block(torch.arange(first, first + self.BLOCK))
            self._tables = [torch.cat(pair) for pair in zip(self._tables, new, strict=True)]
        cos, sin, root = (table[positions] for table in self._tables)
        return cos, sin, root

    @torch.inference_mode(False)
    def _block(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phase = rotary_phase(positions, self._dim, torch.float32)
        return phase.real, phase.imag, normaliser(positions + 1, self._decay)


@lru_cache(maxsize=8)
def position_tables(heads: int, key_dim: int) -> PositionTables:
    """The tables of models with so many heads, ``key_dim`` wide each."""
    return PositionTables(heads, key_dim)


def _power(exponent: Tensor, keep: Tensor, decay: Tensor) -> Tensor:
    """γ^exponent where ``keep``, else 0: ``[..., H, n]`` of ``[..., n]``, or with two more dims.

    The exponent is masked before exp: γ^(a negative number) overflows, and inf · 0 is NaN.
    """
    power = exponent.masked_fill(~keep, 0).to(decay.dtype)
    shape = (len(decay),) + (1,) * (power.ndim - 2)
    return torch.exp(power.unsqueeze(2) * decay.view(shape)) * keep.unsqueeze(2)


def _pair_decay(clock: Clock, decay: Tensor) -> Tensor:
    """γ^(c_i − c_j) for j ≤ i in one sequence, j real: ``[B, C, H, L, L]`` of a chunked clock."""
    seen, sequence = clock.seen, clock.sequence
    causal = torch.ones(seen.shape[-1], seen.shape[-1], dtype=torch.bool, device=seen.device).tril()
    keep = causal & clock.real.unsqueeze(-2) & (sequence.unsqueeze(-1) == sequence.unsqueeze(-2))
    return _power(seen.unsqueeze(-1) - seen.unsqueeze(-2), keep, decay)


def _cut(x: Tensor, size: int) -> Tensor:
    """``[B, T, H, d]`` to chunks ``[B, C, H, size, d]``, the tail filled with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.view(len(x), -1, size, *x.shape[2:]).transpose(2, 3)


def _joined(y: Tensor, length: int) -> Tensor:
    """Inverse of `_cut`."""
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def parallel_retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, clock: Clock, clamp: bool = False
) -> Tensor:
    """Y by one decayed ``[T, T]`` matrix of q·k.

    Args:
        q, k, v: see the module.
        decay: log γ ``[H]``.
        clock: the batch's clock.
        clamp: divide row n of the matrix (over √S_n) by clamp(Σ_j |·|, 1, 5e4), detached, as
            the authors' parallel mode does. For comparison only: no linear-time form equals it.
    """
    length = q.shape[1]
    q, k, v = (_cut(x, length) for x in (q, k, v))
    scores = q @ k.mT * _pair_decay(clock.chunks(length), decay)
    if clamp:
        root = normaliser(clock.seen.view(len(clock.seen), 1, length), decay).mT.unsqueeze(-1)
        total = (scores.detach().abs() / root).sum(-1, keepdim=True)
        scores = scores / total.clamp(*CLAMP)
    return _joined(scores @ v, length)


def chunkwise_retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, clock: Clock, chunk_size: int = 64
) -> Tensor:
    """Y exactly, in time linear in T: matrices inside chunks, states between them.

    Y_i = Σ_{j≤i} γ^(c_i−c_j)(q_i·k_j) v_j + γ^(c_i−n₀) q_i R₀ and
    R' = γ^(c_L−n₀) R₀ + Σ_j γ^(c_L−c_j) k_j v_jᵀ, c counting the real tokens of one sequence.
    """
    length = q.shape[1]
    size = min(chunk_size, length)
    q, k, v = (_cut(x, size) for x in (q, k, v))
    cut = clock.chunks(size)
    y = (q @ k.mT * _pair_decay(cut, decay)) @ v
    if q.shape[1] > 1:
        read, write, carry = _state_decays(cut, decay)
        states = _chunk_states((k * write.unsqueeze(-1))[:, :-1].mT @ v[:, :-1], carry)
        y = torch.cat([y[:, :1], y[:, 1:] + (q * read.unsqueeze(-1))[:, 1:] @ states], 1)
    return _joined(y, length)


def _state_decays(cut: Clock, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of reading, writing and carrying the state of each chunk.

    ``[B, C, H, L]`` twice and ``[B, C, H, 1]``; 0 where the sequence is another one.
    """
    seen, sequence = cut.seen, cut.sequence
    last_seen, last = seen[..., -1:], sequence[..., -1:]
    if seen.shape[1] == 1:  # one uniform chunk stands for all, each counted from its start
        first_seen, first = torch.zeros_like(last_seen), last
    else:
        first_seen, first = (F.pad(t, (0, 0, 1, -1)) for t in (last_seen, last))
    read = _power(seen - first_seen, sequence == first, decay)
    write = _power(last_seen - seen, cut.real & (sequence == last), decay)
    return read, write, _power(last_seen - first_seen, last == first, decay)


def _chunk_states(added: Tensor, carry: Tensor) -> Tensor:
    """States before chunks 1, 2, …: ``[B, C−1, H, d_k, d_v]`` of what each chunk adds."""
    carry = carry.expand(-1, added.shape[1] + 1, -1, -1).unsqueeze(-1)
    states = [added[:, 0]]
    for c in range(1, added.shape[1]):
        states.append(carry[:, c] * states[-1] + added[:, c])
    return torch.stack(states, 1)


def state_output(q: Tensor, state: Tensor, decay: Tensor, clock: Clock) -> Tensor:
    """What a state before the first token adds to Y: γ^{c_i} q_i R, ``[B, T, H, d_v]``.

    Args:
        q: queries ``[B, T, H, d_k]``.
        state: R ``[B, H, d_k, d_v]``.
        decay: log γ ``[H]``.
        clock: of rows that are one sequence each.
    """
    power = torch.exp(clock.seen.to(decay.dtype).unsqueeze(-1) * decay)
    return torch.einsum("bthk,bhkv->bthv", q * power.unsqueeze(-1), state)


def state_after(state: Tensor, k: Tensor, v: Tensor, decay: Tensor, clock: Clock) -> Tensor:
    """R after the last token, γ^{c_T} R + Σ_j γ^{c_T − c_j} k_j v_jᵀ; see `state_output`."""
    last = clock.seen[:, -1:].to(decay.dtype)
    power = torch.exp((last - clock.seen).unsqueeze(-1) * decay) * clock.real.unsqueeze(-1)
    added = torch.einsum("bthk,bthv->bhkv", k * power.unsqueeze(-1), v)
    return torch.exp(last * decay)[..., None, None] * state + added


def recurrent_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, clock: Clock) -> Tensor:
    """Y one token after another: R_n = γ R_{n−1} + k_n v_nᵀ, Y_n = q_n R_n."""
    gamma = decay.exp()[:, None, None]
    first = (clock.seen == 1) & clock.real
    state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])
    outputs = []
    for t in range(q.shape[1]):
        new = first[:, t, None, None, None]
        grown = gamma * state.masked_fill(new, 0) + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = torch.where(clock.real[:, t, None, None, None], grown, state)
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


def retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, clock: Clock, form: Form, chunk_size: int
) -> Tensor:
    """Y by the named form; "clamped" is the parallel one with the authors' clamp."""
    if form == "chunkwise":
        return chunkwise_retention(q, k, v, decay, clock, chunk_size)
    if form == "recurrent":
        return recurrent_retention(q, k, v, decay, clock)
    return parallel_retention(q, k, v, decay, clock, clamp=form == "clamped")


@dataclass(frozen=True)
class BlockDecay:
    """Decays of the blockwise form for blocks of L tokens.

    A token at offset i of block b reads the state at (b−1)·L and the window of blocks b−1 and
    b, so everything below is a constant, and its bits depend on its position alone.

    Attributes:
        read: γ^(L+i+1), ``[H, L, 1]``.
        pair: γ^(L+i−j) for j ≤ L+i in the window, else 0, ``[H, L, 2L]``.
        write: γ^(L−1−i), ``[H, L, 1]``.
        carry: γ^L, ``[H, 1, 1]``.
    """

    read: Tensor
    pair: Tensor
    write: Tensor
    carry: Tensor

    @classmethod
    def of(cls, decay: Tensor, length: int) -> BlockDecay:
        """Tables for log γ ``[H]`` and blocks of ``length`` tokens."""
        i = torch.arange(length, device=decay.device)
        gap = length + i[:, None] - torch.arange(2 * length, device=decay.device)
        keep = gap >= 0
        log = decay[:, None, None]
        return cls(
            read=torch.exp((length + i + 1)[:, None] * log),
            pair=torch.exp(gap.masked_fill(~keep, 0) * log) * keep,
            write=torch.exp((length - 1 - i)[:, None] * log),
            carry=torch.exp(length * log),
        )

    def at(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """``read`` and ``pair`` of queries at ``offsets`` ``[n, M]``: ``[n, H, M, 1 or 2L]``."""
        return self.read[:, offsets].transpose(0, 1), self.pair[:, offsets].transpose(0, 1)


def block_output(
    q: Tensor,
    state: Tensor,
    before: tuple[Tensor, Tensor],
    current: tuple[Tensor, Tensor],
    decay: tuple[Tensor, Tensor],
) -> Tensor:
    """Y of queries in n blocks ``[n, H, M, d_v]``.

    Args:
        q: ``[n, H, M, d_k]``.
        state: R at the start of the block before, ``[n, H, d_k, d_v]``.
        before: keys ``[n, H, L, d_k]`` and values ``[n, H, L, d_v]`` of the block before.
        current: the same of the queries' own block.
        decay: what `BlockDecay.at` gives for the queries' offsets.
    """
    read, pair = decay
    y = q @ state * read
    for (keys, values), power in zip((before, current), pair.chunk(2, -1), strict=True):
        y = y + (q @ keys.mT * power) @ values
    return y


def block_fold(state: Tensor, k: Tensor, v: Tensor, decay: BlockDecay) -> Tensor:
    """The state one block later: γ^L R + Σ_i γ^(L−1−i) k_i v_iᵀ; any leading dims."""
    return state * decay.carry + (k * decay.write).mT @ v
