"""Tokenised rows, a small capture of them, and what is done to its files."""

import torch

from retort.distill.capture import capture
from retort.distill.capture_facts import CaptureSettings
from tests.distill.toys import llama, tokenizer

SMALL = CaptureSettings(top_k=5, batch_size=2, shard_tokens=12)


def rows(count=9):
    """Tokenised rows of lengths 1 … 7; ids of the 258."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, 258, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(1 + i % 4), "completion_ids": ids(1 + (5 * i) % 7)} for i in range(count)
    ]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if "shard" in path.name}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def make(folder):
    """The small capture of the rows."""
    return capture(llama(), tokenizer(), rows(), folder, SMALL)
