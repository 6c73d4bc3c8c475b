"""Rows of like lengths in one step, in an order that nothing but seed and epoch decides."""

import pytest
import torch
from datasets import Dataset

from retort import DistillConfig
from retort.distill.ordering import GroupedByLength
from retort.errors import ConfigurationError

LENGTHS = [3 + 7 * i % 41 for i in range(203)]
ROWS = Dataset.from_dict(
    {"prompt_ids": [[1]] * len(LENGTHS), "completion_ids": [[2] * (n - 1) for n in LENGTHS]}
)


def order(epoch: int = 0, seed: int = 5) -> list[int]:
    sampler = GroupedByLength(ROWS, batch_size=4, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def spread(indices: list[int]) -> float:
    """Mean difference of the longest and shortest row of a batch."""
    batches = [indices[i : i + 4] for i in range(0, len(indices) - 3, 4)]
    found = [[LENGTHS[i] for i in batch] for batch in batches]
    return sum(max(each) - min(each) for each in found) / len(found)


def test_every_row_once_and_batches_are_alike():
    assert sorted(order()) == list(range(len(LENGTHS)))
    assert spread(order()) < 0.2 * spread(list(range(len(LENGTHS))))


def test_seed_and_epoch_decide_and_not_the_global_generator():
    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first
    assert order(epoch=1) != first and order(seed=6) != first


def test_what_changes_the_size_of_batches_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="use 'group_by_length'"):
        DistillConfig(output_dir=str(tmp_path), train_sampling_strategy="batch_rebalance")
