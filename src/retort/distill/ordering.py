"""In which order rows are read, for `train_sampling_strategy="group_by_length"`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler


class GroupedByLength(LengthGroupedSampler):
    """transformers' grouping of rows of like lengths, from the seed and the epoch alone.

    Its own draws from the global generator, which rollouts move: processes would disagree on the
    order, and a resumed run would go on with another one.

    Args:
        rows: tokenised rows with ``prompt_ids`` and ``completion_ids``.
        batch_size: rows of an optimiser step on this process.
        seed: of the run's data order.
    """

    def __init__(self, rows: Dataset, batch_size: int, seed: int) -> None:
        ids = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        lengths = [len(prompt) + len(completion) for prompt, completion in ids]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, resumed ones too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices of the epoch's rows."""
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()
