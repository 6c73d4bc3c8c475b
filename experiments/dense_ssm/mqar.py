"""Multi-query associative recall (Zoology, arXiv 2312.04927, section 3): can a model look up?

A sequence states key–value pairs, k1 v1 k2 v2 …, then asks for every key once, in another order,
each question followed by its answer: only the answers are predicted. Keys and values are drawn
from disjoint halves of the vocabulary; a key occurs once among the pairs [ours: questions follow
each other without filler, their order is uniform].
"""

from __future__ import annotations

import numpy as np
import torch

PAIRS, VOCABULARY, IGNORED = 12, 128, -100
TRAIN, TEST = 64_000, 1_000


class Recall(torch.utils.data.Dataset):
    """``count`` sequences of 4 · PAIRS ids, drawn by ``seed``; the i-th is always the same."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((self.seed, index))
        half = VOCABULARY // 2
        keys = draw.choice(half, PAIRS, replace=False)
        values = half + draw.integers(half, size=PAIRS)
        asked = draw.permutation(PAIRS)
        pairs = np.stack([keys, values], 1).ravel()
        answers = np.stack([keys[asked], values[asked]], 1).ravel()
        ids = np.concatenate([pairs, answers]).astype(np.int32)
        labels = np.full_like(ids, IGNORED)
        labels[2 * PAIRS + 1 :: 2] = ids[2 * PAIRS + 1 :: 2]
        return {"input_ids": ids, "labels": labels}

    @property
    def digest(self) -> str:
        """What makes this data different from other data."""
        return f"mqar {PAIRS} {VOCABULARY} {self.count} {self.seed}"


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Recall, batch: int = 100) -> float:
    """Share of the answers whose likeliest token is the right one."""
    model.eval()
    right = total = 0
    for start in range(0, len(data), batch):
        rows = [data[i] for i in range(start, min(start + batch, len(data)))]
        ids, labels = (
            torch.from_numpy(np.stack([r[k] for r in rows]).astype(np.int64))
            for k in ("input_ids", "labels")
        )
        found = model(input_ids=ids).logits[:, :-1].argmax(-1)
        scored = labels[:, 1:] != IGNORED
        right += int((found == labels[:, 1:])[scored].sum())
        total += int(scored.sum())
    return right / total
