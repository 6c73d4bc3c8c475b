"""Sequences to one padded batch of tensors, and the rows of it that each loss stream reads.

Targets are shifted once, here: position t of a row predicts ``targets[t]``, the token at t + 1.
What counts follows from lengths, never from ``id != pad`` (several tokenizers pad with EOS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.distill.losses import IGNORED
from retort.distill.spans import NO_SPAN, pair_mask

Batch = dict[str, Tensor]
"""input_ids, attention_mask, targets, span_ids: int64 ``[R, T]``; supervised, distilled,
contrasted: bool ``[R]``."""

Tagger = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with a completion (at least one token each), and the streams that it belongs to."""

    prompt: list[int]
    completion: list[int]
    supervised: bool
    distilled: bool
    source: str = "dataset"
    contrasted: bool = False


def build_batch(
    sequences: Sequence[TrainingSequence], pad_id: int, tagger: Tagger | None = None
) -> Batch:
    """Pad on the right and shift. ``tagger`` gives the completion's span ids, where wanted."""
    width = max((len(s.prompt) + len(s.completion) for s in sequences), default=0)
    shape = (len(sequences), width)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "targets": torch.full(shape, IGNORED),
        "span_ids": torch.full(shape, NO_SPAN),
        "supervised": torch.tensor([s.supervised for s in sequences], dtype=torch.bool),
        "distilled": torch.tensor([s.distilled for s in sequences], dtype=torch.bool),
        "contrasted": torch.tensor([s.contrasted for s in sequences], dtype=torch.bool),
    }
    for row, sequence in enumerate(sequences):
        _fill(batch, row, sequence, tagger)
    return batch


def stream_mask(batch: Batch, stream: str) -> Tensor:
    """Bool ``[R, T]``: positions whose target counts in a stream (see `objective.STREAMS`)."""
    return (batch["targets"] != IGNORED) & batch[stream][:, None]


def stream_pairs(batch: Batch, mask: Tensor) -> Tensor:
    """Neighbours within a span, bool ``[mask.sum()]`` (see `retort.distill.spans.pair_mask`)."""
    return pair_mask(batch["span_ids"], mask)


def _fill(batch: Batch, row: int, sequence: TrainingSequence, tagger: Tagger | None) -> None:
    ids = [*sequence.prompt, *sequence.completion]
    first, last = len(sequence.prompt) - 1, len(ids) - 1
    batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
    batch["attention_mask"][row, : len(ids)] = 1
    batch["targets"][row, first:last] = torch.tensor(sequence.completion)
    if tagger is not None and sequence.distilled:
        batch["span_ids"][row, first:last] = torch.tensor(tagger(sequence.completion))
