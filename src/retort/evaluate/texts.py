"""Generate the texts to be judged, on the engine that users call, and count what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retort.decode.outputs import require_whole


@dataclass(frozen=True)
class Generation:
    """Texts and token ids in the order of the prompts, and totals over all of them.

    ``steps`` are those of each row, ``seconds`` is wall time of the whole call.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    steps: tuple[int, ...]
    draft_tokens: int
    accepted_tokens: int

    @property
    def row_steps(self) -> int:
        """Steps, over all rows."""
        return sum(self.steps)

    @property
    def tokens(self) -> int:
        """Tokens generated, over all rows."""
        return sum(len(ids) for ids in self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all rows per second of wall time."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float | None:
        """Mean tokens that one row gained in one step; None if there was no step."""
        return self.tokens / self.row_steps if self.row_steps else None

    @property
    def mean_draft_length(self) -> float | None:
        """Mean drafts that one row was given in one step; None if there was no step."""
        return self.draft_tokens / self.row_steps if self.row_steps else None


def generate_texts(engine: Any, prompts: Sequence[Any], **sampling: Any) -> Generation:
    """Run ``engine.generate(prompts, **sampling)`` (a `retort.Engine`) and gather its results.

    Raises RetortError where a row failed: half a text must not be judged.
    """
    start = time.perf_counter()
    outputs = require_whole(engine.generate(list(prompts), **sampling))
    seconds = time.perf_counter() - start
    return Generation(
        texts=tuple(out.text for out in outputs),
        token_ids=tuple(tuple(out.token_ids) for out in outputs),
        seconds=seconds,
        steps=tuple(out.stats.steps for out in outputs),
        draft_tokens=sum(out.stats.draft_tokens for out in outputs),
        accepted_tokens=sum(out.stats.accepted_tokens for out in outputs),
    )
