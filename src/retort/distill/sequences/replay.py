"""A buffer of sequences that the student wrote earlier (DistiLLM, arXiv 2402.03898, sec. 3.2)."""

from __future__ import annotations

import random
from collections import deque
from typing import Any


class ReplayBuffer:
    """The latest ``capacity`` pairs of prompt and completion ids; the oldest falls out first."""

    def __init__(self, capacity: int) -> None:
        self._pairs: deque[tuple[list[int], list[int]]] = deque(maxlen=capacity)

    @property
    def capacity(self) -> int:
        """Most pairs that are kept."""
        return self._pairs.maxlen or 0

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def is_full(self) -> bool:
        """Whether the next pair pushes one out; never so without capacity."""
        return 0 < len(self._pairs) == self._pairs.maxlen

    def add(self, prompt: list[int], completion: list[int]) -> None:
        """Keep a pair."""
        if self._pairs.maxlen:
            self._pairs.append((list(prompt), list(completion)))

    def sample(self, draw: random.Random) -> tuple[list[int], list[int]]:
        """A pair at random. Raises IndexError on an empty buffer."""
        return self._pairs[draw.randrange(len(self._pairs))]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists for a JSON checkpoint."""
        return {"pairs": [list(pair) for pair in self._pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._pairs.clear()
        self._pairs.extend(
            (list(prompt), list(completion)) for prompt, completion in state["pairs"]
        )
