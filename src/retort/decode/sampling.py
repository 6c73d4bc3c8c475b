"""Drawing tokens with counter-based noise, and the two rules by which drafts are judged.

`coupled` (our choice, on the idea of drafter-invariant speculation by Gumbel coupling, Daliri,
Musco and Suresh 2024): the token is ``argmax(log p + g)`` where ``g`` depends only on
(key, generated index, token id). The text is then a function of key and logits alone, and a
draft is right exactly when it equals that token: speculation cannot change what is sampled.

`rejection` (speculative sampling, Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318): a draft x from q is accepted with probability min(1, p(x)/q(x)), otherwise the
token comes from the positive part of p − q. Equal in distribution, not in text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.ops import native
from retort.ops.native.race import shortlist

_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64

# Independent streams of noise for one generated index.
TOKEN, DRAFT, ACCEPT, RESAMPLE = range(4)

Number = int | Tensor

_LARGE = 512  # scores from which on the native core is worth a call


def draw(scores: Tensor, key: Number, index: Number, stream: int = TOKEN) -> Tensor:
    """Tokens ``[...]`` from ``softmax(scores)``: ``argmax(scores + g)``; −1 where none can be.

    A row's token is the same alone and in any batch.

    Args:
        scores: ``[vocab]``, or ``[n, vocab]`` with n keys.
        key, index: numbers, or int64 ``[n, 1]``.
    """
    if scores.shape[-1] >= _LARGE and scores.is_cpu and native.available():
        found = _race(scores.reshape(-1, scores.shape[-1]), key, index, stream)
        if found is not None:
            return found.view(scores.shape[:-1])
    return _draw(scores, key, index, stream)


def judge(scores: Tensor, q: Tensor, draft: Tensor, key: Number, index: Number) -> Tensor:
    """The tokens ``[...]`` that `rejection` puts in the places of drafts, themselves if accepted.

    Args:
        scores: the target's ``[..., vocab]``.
        q: probabilities ``[..., vocab]`` that the drafts were drawn from.
        draft: int64 ``[..., 1]``.
    """
    p, tokens = scores.softmax(-1), draft[..., 0]
    accepted = accepts(p, q, draft, key, index)[..., 0]
    if accepted.all():
        return tokens
    return torch.where(accepted, tokens, resample(p, q, key, index))


def accepts(p: Tensor, q: Tensor, draft: Tensor, key: Number, index: Number) -> Tensor:
    """Whether drafts are accepted, with probability min(1, p/q).

    Args:
        p, q: probabilities ``[..., vocab]`` of the target, and of what the draft was drawn from.
        draft: int64 ``[..., 1]``.

    Returns:
        Bool ``[..., 1]``.
    """
    uniform = _uniform(_bits(key, index, torch.zeros_like(draft), ACCEPT))
    return uniform * q.gather(-1, draft) < p.gather(-1, draft)


def resample(p: Tensor, q: Tensor, key: Number, index: Number) -> Tensor:
    """Tokens ``[...]`` from the positive part of p − q; from p where rounding leaves nothing."""
    residual = (p - q).clamp_min(0)
    nothing = residual.sum(-1, keepdim=True) <= 0
    return draw(torch.where(nothing, p, residual).log(), key, index, RESAMPLE)


def one_hot(draft: Tensor, like: Tensor) -> Tensor:
    """The q of drafts ``[..., 1]`` that were not drawn but given, shaped as ``like``."""
    return torch.zeros_like(like).scatter(-1, draft, 1.0)


def gumbel(key: Number, index: Number, tokens: Tensor, stream: int = TOKEN) -> Tensor:
    """Standard Gumbel noise, float64, a pure function of (key, index, stream, token id)."""
    return _noise(_bits(key, index, tokens, stream))


def stream_key(seed: int, sample: int = 0, round_: int = 0) -> int:
    """The key of one of ``n`` samples, and of one round of rewinding; ``seed`` itself for 0, 0."""
    if sample == round_ == 0:
        return seed
    mixed = _mix(_mix(_int64(seed)) + wrap(sample * _GOLDEN))
    return int(_mix(mixed + wrap(round_ * _GOLDEN + 1)))


def _draw(scores: Tensor, key: Number, index: Number, stream: int) -> Tensor:
    """`draw` by its definition."""
    possible = scores > -torch.inf  # false for NaN, too
    kept = possible.reshape(-1, scores.shape[-1]).any(0).nonzero()[:, 0]
    if len(kept) == 0:
        return torch.full(scores.shape[:-1], -1, device=scores.device)
    if len(kept) < scores.shape[-1]:
        scores, possible = scores[..., kept], possible[..., kept]
    total = gumbel(key, index, kept, stream) + scores
    if not possible.all():
        total.masked_fill_(~possible, -torch.inf)
    return torch.where(possible.any(-1), kept[torch.argmax(total, -1)], -1)


def _race(scores: Tensor, key: Number, index: Number, stream: int) -> Tensor | None:
    """`draw` of rows ``[n, vocab]``: the native core looks for the few that may win.

    Only these are compared by the exact noise, so that the token is the definition's own.
    """
    state = _state(key, index, stream).expand(len(scores), 1)
    found = shortlist(scores, state[:, 0])
    if found is None:
        return None
    row, token = found
    total = _noise(_mix(token * _GOLDEN + state[row, 0])) + scores[row, token]
    best, tokens = [-math.inf] * len(scores), [-1] * len(scores)
    for r, t, value in zip(row.tolist(), token.tolist(), total.tolist(), strict=True):
        if value > best[r]:
            best[r], tokens[r] = value, t
    return torch.tensor(tokens)


def _noise(bits: Tensor) -> Tensor:
    return _uniform(bits).log_().neg_().log_().neg_()


def _state(key: Number, index: Number, stream: int) -> Tensor:
    """What all tokens of one draw have in common."""
    return _mix(_mix(_int64(key) * _GOLDEN + _int64(index)) + wrap(stream * _GOLDEN)) + _GOLDEN


def _bits(key: Number, index: Number, tokens: Tensor, stream: int) -> Tensor:
    return _mix(tokens.to(torch.int64) * _GOLDEN + _state(key, index, stream).to(tokens.device))


def _uniform(bits: Tensor) -> Tensor:
    """53-bit uniforms inside (0, 1)."""
    return _shift(bits, 11).to(torch.float64).add_(0.5).mul_(2.0**-53)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser in wrapping int64 arithmetic, in place."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_MIX[0])
    x.bitwise_xor_(_shift(x, 27)).mul_(_MIX[1])
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _int64(number: Number) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(wrap(number))


def wrap(number: int) -> int:
    """A whole number as signed 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
