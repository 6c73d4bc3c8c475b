"""What a pass costs by its number of tokens, measured on the target itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

from retort.decode.packed import PackedModel

_SIZES = (1, 4, 8, 12, 16, 24, 32, 64)


def profile_passes(target: PackedModel, repeats: int = 2) -> Iterator[tuple[int, float]]:
    """Yield ``(tokens, seconds)``: the best of ``repeats`` passes over a scratch row, by size."""
    passes, tokens = target.forward_passes, target.forward_tokens
    _seconds(target, max(_SIZES))
    for size in _SIZES:
        yield size, min(_seconds(target, size) for _ in range(repeats))
    target.forward_passes, target.forward_tokens = passes, tokens


def _seconds(target: PackedModel, size: int) -> float:
    row = target.add_row()
    try:
        started = time.perf_counter()
        target.forward([(row, [0] * size)], [size])
        return time.perf_counter() - started
    finally:
        target.free_row(row)
