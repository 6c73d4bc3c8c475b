"""What a teacher says about each token: dense logits, or its top-k with the mass of the tail.

Losses take a *signal*, never a teacher, so that a live model and a signal captured to disk train
the same student. Shapes: N rows (one per predicted token), V_t the teacher's vocabulary as padded
in its head, W the width shared with the student, K the ids kept by a top-k signal.

Every signal is a distribution over the whole vocabulary. A top-k signal spreads its tail mass
evenly over the V_t − K ids it did not keep [our choice], which also defines how it is cut to a
shared width and how its temperature changes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from retort.errors import ConfigurationError

FLOOR = -1e4
"""Log-probability of the impossible: exp(FLOOR) is 0 in every dtype, and FLOOR − FLOOR is 0."""

TRAINING_ADVICE = (
    "Logit distillation needs one vocabulary: use the teacher's tokenizer, or method 'sft'."
)

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [n, D] to logits [n, V]; usually the model's `lm_head` module."""


class Signal(Protocol):
    """A teacher's predictions for N rows, as a distribution over its vocabulary."""

    def __len__(self) -> int:
        """Number of rows N."""

    def rows(self, start: int, stop: int) -> Signal:
        """The signal of rows start … stop − 1."""

    @property
    def vocab_size(self) -> int:
        """The teacher's padded vocabulary V_t."""

    def log_probs(self, width: int, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N, width] over the first `width` ids, renormalised; no gradient."""

    def support(self, width: int) -> Tensor | None:
        """Ids [N, K] known one by one (−1: slot unused), or None if every id is known."""


class SignalSource(Protocol):
    """Anything that yields a signal for a range of rows: a signal, or hidden states and a head."""

    def __len__(self) -> int:
        """Number of rows N."""

    def rows(self, start: int, stop: int) -> Signal:
        """The signal of rows start … stop − 1."""


@dataclass
class DenseSignal:
    """Teacher logits [N, V_t] of any float dtype; computed on in float32 at least."""

    logits: Tensor

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """The teacher's padded vocabulary V_t."""
        return self.logits.shape[-1]

    def rows(self, start: int, stop: int) -> DenseSignal:
        """The signal of rows start … stop − 1 (a view)."""
        return DenseSignal(self.logits[start:stop])

    @torch.no_grad()
    def log_probs(self, width: int, temperature: float = 1.0) -> Tensor:
        """Log-softmax [N, width] of the first `width` logits divided by the temperature."""
        return log_probabilities(self.logits, width, temperature)

    def support(self, width: int) -> None:
        """None: every id is known."""

    @torch.no_grad()
    def top_k(self, k: int) -> TopKSignal:
        """Keeps the k likeliest ids of each row and the log of the mass of all others."""
        log_probs = log_probabilities(self.logits, self.vocab_size)
        kept, indices = log_probs.topk(min(k, self.vocab_size), dim=-1)
        _, tail = split(log_probs, indices)
        return TopKSignal(indices, kept, tail, self.vocab_size)


@dataclass
class TopKSignal:
    """The K likeliest ids of each row with the mass of the rest, at temperature 1.

    indices: integers [N, K], distinct within a row. log_probs: floats [N, K]. log_tail: floats
    [N], the log of 1 − Σ exp(log_probs) (FLOOR or −inf where nothing is left). Raises
    ConfigurationError when the shapes disagree.
    """

    indices: Tensor
    log_probs_kept: Tensor
    log_tail: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.indices, self.log_probs_kept, self.log_tail)]
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[0][:1] != shapes[2]:
            raise ConfigurationError(
                f"A top-k signal needs indices and log-probabilities [N, K] and a tail [N], got "
                f"{shapes}: check how the capture was written."
            )

    def __len__(self) -> int:
        return self.indices.shape[0]

    def rows(self, start: int, stop: int) -> TopKSignal:
        """The signal of rows start … stop − 1 (views)."""
        kept = [t[start:stop] for t in (self.indices, self.log_probs_kept, self.log_tail)]
        return TopKSignal(kept[0], kept[1], kept[2], self.vocab_size)

    @torch.no_grad()
    def log_probs(self, width: int, temperature: float = 1.0) -> Tensor:
        """The whole distribution [N, width], the tail spread evenly over the ids not kept."""
        kept = at_least_float32(self.log_probs_kept)
        missing = self.vocab_size - self.indices.shape[1]
        each = self.log_tail.to(kept.dtype) - math.log(missing) if missing else None
        fill = kept.new_full((len(self), 1), FLOOR) if each is None else each.unsqueeze(1)
        full = fill.expand(-1, self.vocab_size).scatter(1, self.indices.long(), kept)
        return log_probabilities(full, width, temperature)

    def support(self, width: int) -> Tensor:
        """The kept ids [N, K], with −1 in place of ids beyond the shared width."""
        indices = self.indices.long()
        return indices.where(indices < width, -1)


@dataclass
class HeadSignal:
    """A live teacher before its head: hidden states [N, D'] whose logits are made on demand.

    A source for chunked losses: [N, V_t] never exists, only the logits of the rows asked for.
    """

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> DenseSignal:
        """Runs the head on rows start … stop − 1, without gradient."""
        return DenseSignal(self.head(self.hidden[start:stop]))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is widened to float32; float32 and float64 stay as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def log_probabilities(logits: Tensor, width: int, temperature: float = 1.0) -> Tensor:
    """Log-softmax [N, width] of the first `width` of logits [N, V] divided by the temperature.

    Bounded below by FLOOR, so that logits masked with −inf give 0 · FLOOR and not NaN.
    """
    scaled = at_least_float32(logits[:, :width])
    scaled = scaled if temperature == 1.0 else scaled / temperature
    return scaled.log_softmax(-1).clamp_min(FLOOR)


def split(log_probs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Divides a distribution [N, W] into chosen ids and the rest.

    ids: [N, M], −1 for an unused slot, otherwise distinct within a row. Returns the
    log-probabilities [N, M] at the ids (FLOOR in unused slots) and the log of the mass of all
    other ids [N], summed directly rather than as 1 − Σ, which would cancel.
    """
    spare = log_probs.shape[1]
    slots = ids.where(ids >= 0, spare)
    padded = F.pad(log_probs, (0, 1), value=FLOOR)
    return padded.gather(1, slots), padded.scatter(1, slots, FLOOR).logsumexp(1)


def check_vocabularies(
    teacher: Any, student: Any, advice: str = TRAINING_ADVICE, who: str = "Teacher and student"
) -> None:
    """Raises ConfigurationError, naming the first difference, unless two tokenizers agree.

    They agree when every token has the same id in both and a probe text is encoded equally;
    how far each model pads its head, and which token means end of text, may differ. ``advice``
    ends the message: why they must agree here and what to do; ``who`` begins it.
    """
    known = [{i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    for index in sorted(known[0].keys() | known[1].keys()):
        left, right = known[0].get(index), known[1].get(index)
        if left != right:
            raise ConfigurationError(
                f"{who} tokenizers differ at id {index}: {left!r} against {right!r}. {advice}"
            )
    _check_probe(teacher, student, advice, who)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what `check_vocabularies` compares: ids of all tokens and a probe's encoding."""
    known = sorted((i, t) for t, i in tokenizer.get_vocab().items())
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    text = json.dumps([known, list(probe)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_PROBE = "It's 12.5°C, naïve — don't\n\tpanic: 🙂 日本語 <tag> x_1+=2;"


def _check_probe(teacher: Any, student: Any, advice: str, who: str) -> None:
    left, right = (t.encode(_PROBE, add_special_tokens=False) for t in (teacher, student))
    if left != right:
        where = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 0)
        raise ConfigurationError(
            f"{who} tokenizers share a vocabulary and split text differently (piece {where} of "
            f"{_PROBE!r}). {advice}"
        )
