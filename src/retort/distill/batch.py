"""Sequences to one padded (or packed) batch of tensors, and what each loss stream reads of it.

Targets are shifted once, here: position t of a row predicts ``targets[t]``, the token at t + 1.
What counts follows from lengths, never from ``id != pad`` (several tokenizers pad with EOS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from retort.distill.losses import IGNORED
from retort.distill.packing import packed_rows
from retort.distill.spans import NO_SPAN, pair_mask

Batch = dict[str, Tensor]
"""input_ids, attention_mask, targets, span_ids: int64 ``[R, T]``; supervised, distilled,
contrasted: bool ``[R]``. Packed rows have position_ids as well: int64 ``[R, T]``, 0 where a
sequence starts and at padding."""

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

    @property
    def streams(self) -> tuple[bool, bool, bool]:
        """Whether it is supervised, distilled, contrasted."""
        return self.supervised, self.distilled, self.contrasted

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def build_batch(
    sequences: Sequence[TrainingSequence],
    pad_id: int,
    tagger: Tagger | None = None,
    pack_to: int | None = None,
) -> Batch:
    """Pad on the right and shift.

    Args:
        sequences: in the order of rows.
        pad_id: fills rows up.
        tagger: gives the completion's span ids, where wanted.
        pack_to: most tokens of a row that holds several sequences (of the same streams); None
            gives each its own row.
    """
    rows = [[s] for s in sequences] if pack_to is None else _packed(sequences, pack_to)
    shape = (len(rows), max((sum(map(len, row)) for row in rows), default=0))
    flags = torch.tensor([row[0].streams for row in rows], dtype=torch.bool).view(-1, 3)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "targets": torch.full(shape, IGNORED),
        "span_ids": torch.full(shape, NO_SPAN),
        **dict(zip(("supervised", "distilled", "contrasted"), flags.unbind(1), strict=True)),
    }
    if pack_to is not None:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for sequence in row:
            _fill(batch, number, start, sequence, tagger)
            start += len(sequence)
    return batch


def sequence_slices(batch: Batch) -> list[tuple[int, slice]]:
    """Row and places of every sequence, in the order in which `stream_mask` selects them."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        starts = [0]
        if "position_ids" in batch:
            starts = (batch["position_ids"][row, :length] == 0).nonzero()[:, 0].tolist()
        found += [(row, slice(a, b)) for a, b in pairwise([*starts, length])]
    return found


def stream_mask(batch: Batch, stream: str) -> Tensor:
    """Bool ``[R, T]``: positions whose target counts in a stream (see `objective.STREAMS`)."""
    return (batch["targets"] != IGNORED) & batch[stream][:, None]


def stream_pairs(batch: Batch, mask: Tensor) -> Tensor:
    """Neighbours within a span, bool ``[mask.sum()]`` (see `retort.distill.spans.pair_mask`)."""
    return pair_mask(batch["span_ids"], mask)


def _packed(sequences: Sequence[TrainingSequence], size: int) -> list[list[TrainingSequence]]:
    """Rows of sequences; a row's sequences belong to the same streams."""
    made = []
    for streams in dict.fromkeys(s.streams for s in sequences):
        alike = [s for s in sequences if s.streams == streams]
        made += [[alike[i] for i in row] for row in packed_rows([len(s) for s in alike], size)]
    return made


def _fill(
    batch: Batch, row: int, start: int, sequence: TrainingSequence, tagger: Tagger | None
) -> None:
    """Put ``sequence`` into a row at ``start``; its last token predicts nothing."""
    ids, stop = [*sequence.prompt, *sequence.completion], start + len(sequence)
    batch["input_ids"][row, start:stop] = torch.tensor(ids)
    batch["attention_mask"][row, start:stop] = 1
    if "position_ids" in batch:
        batch["position_ids"][row, start:stop] = torch.arange(len(ids))
    first = start + len(sequence.prompt) - 1
    batch["targets"][row, first : stop - 1] = torch.tensor(sequence.completion)
    if tagger is not None and sequence.distilled:
        batch["span_ids"][row, first : stop - 1] = torch.tensor(tagger(sequence.completion))
