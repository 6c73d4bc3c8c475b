"""The contract every cache keeps: each row has its own clock and can be rewound on its own.

A *row* is one sequence. A packed pass feeds new tokens of several rows as one sequence
``[1, total]``; the layout of the pass is a `PackedRows`. The life of a pass:

    layout = cache.begin(rows, counts)     # reserves space, publishes `cache.layout`
    model(input_ids=ids, position_ids=layout.position_ids(device), past_key_values=cache, ...)
    cache.end()                            # every row's length advances by its count
    cache.rewind(row, length)              # no model forward; draft tokens fall away
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from retort.errors import ConfigurationError, RetortError, RewindError

Spare = list[tuple[Tensor, Sequence[int]]]


@dataclass(frozen=True)
class PackedRows:
    """Layout of one packed pass: row ``rows[i]`` brings ``counts[i]`` tokens after ``starts[i]``.

    The tokens of row ``rows[i]`` lie at ``offsets[i] : offsets[i + 1]`` of the packed sequence.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Cumulative counts, ``len(rows) + 1`` numbers starting at 0."""
        return tuple(accumulate(self.counts, initial=0))

    @property
    def total(self) -> int:
        """Number of tokens in the pass, Σ counts."""
        return self.offsets[-1]

    def position_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """Positions of the packed tokens in their own rows, int64 ``[1, total]``."""
        spans = [range(s, s + c) for s, c in zip(self.starts, self.counts, strict=True)]
        return torch.tensor([[p for span in spans for p in span]], device=device)

    def last_indices(self, keep: Sequence[int]) -> list[int]:
        """Packed indices of the last ``keep[i]`` tokens of each row, in row order."""
        ends = self.offsets[1:]
        return [p for end, k in zip(ends, keep, strict=True) for p in range(end - k, end)]


@dataclass(frozen=True)
class Parked:
    """A row outside its cache: its length and copies of what it held, for `RowCache.unpark`."""

    length: int
    state: Any


class RowCache(ABC):
    """Per-row lengths, append at each row's own end, rewind per row without a model forward.

    Attributes:
        shares_prefixes: rows can be made of kept pieces, see `piece`.
        divisible: a piece may be any part of a row; otherwise only the state at the row's end.
    """

    shares_prefixes = True
    divisible = False

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self.layout: PackedRows | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """Ids of the live rows, ascending."""
        return tuple(sorted(self._lengths))

    def length(self, row: int) -> int:
        """Number of tokens that ``row`` holds."""
        self._require(row)
        return self._lengths[row]

    def add_row(self, room: int = 0) -> int:
        """Open an empty row and return its id, the lowest that is free.

        Args:
            room: tokens that the row will hold before long. Storage for all may be taken at once:
                a row that is read in slices is else moved to larger storage again and again, and
                a pass that moves hundreds of megabytes holds up the other rows.
        """
        row = next(i for i in range(len(self._lengths) + 1) if i not in self._lengths)
        self._lengths[row] = 0
        self._open(row)
        self._expect(row, room)
        return row

    def free_row(self, row: int) -> None:
        """Retire ``row``: its storage may be recycled, none of it may surface again."""
        self._require(row)
        del self._lengths[row]
        self._close(row)

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes a copy of row ``order[i]``; rows that are not named go.

        ``order`` may repeat rows (beams) and leave some out (compaction).
        """
        lengths = [self.length(row) for row in order]
        self._copy_rows(order)
        self._lengths = dict(enumerate(lengths))

    def park(self, row: int) -> Parked | None:
        """Take ``row`` out to make room; None where its tokens have to be read again."""
        length, state = self.length(row), self._copy_out(row)
        self.free_row(row)
        return None if state is None else Parked(length, state)

    def unpark(self, parked: Parked, room: int = 0) -> int:
        """Take a parked row in again, with the bits that it had, and return its new id.

        ``room`` is as in `add_row`.
        """
        row = self.add_row(room)
        self._copy_in(row, parked.state)
        self._lengths[row] = parked.length
        return row

    def piece(self, row: int, start: int, stop: int) -> Any:
        """A copy of what ``row`` holds of its tokens ``start : stop``, for `parked`.

        Where rows are not `divisible` this is the state after all of the row's tokens.

        Raises:
            ConfigurationError: the row does not hold these tokens, or more where it must not.
        """
        length = self.length(row)
        if not 0 <= start < stop <= length or (stop < length and not self.divisible):
            raise ConfigurationError(f"row {row} of {length} tokens has no piece {start}:{stop}")
        return self._copy_piece(row, start, stop)

    def parked(self, length: int, pieces: Sequence[Any]) -> Parked:
        """A row of ``length`` tokens, made of pieces that cover it from 0, for `unpark`.

        The pieces are only read, so that many rows can be made of them.
        """
        return Parked(length, pieces if self.divisible else pieces[-1])

    def check(self) -> None:
        """Check that what is stored fits the rows; to be called between passes.

        Raises:
            RetortError: it does not; a fault of the cache, not of its user.
        """
        faults = ["a pass is open"] if self.layout is not None else []
        faults += [f"row {r} has length {n}" for r, n in self._lengths.items() if n < 0]
        faults += self._faults()
        if faults:
            raise RetortError(f"{type(self).__name__} is inconsistent: {'; '.join(faults)}")

    def poison(self) -> None:
        """Fill storage that belongs to no row with NaN, between passes: it may never surface.

        For tests and debugging.
        """
        for storage, free in self._spare():
            storage[:, list(free)] = torch.nan

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> PackedRows:
        """Reserve room for ``counts[i]`` new tokens of ``rows[i]`` and publish the layout."""
        if len(set(rows)) != len(rows) or len(rows) != len(counts) or min(counts, default=1) < 1:
            raise ConfigurationError(
                f"a pass needs distinct rows, each with at least one token: {rows=}, {counts=}"
            )
        starts = tuple(self.length(row) for row in rows)
        self.layout = PackedRows(tuple(rows), tuple(counts), starts)
        self._reserve(self.layout)
        return self.layout

    def end(self) -> None:
        """Close the pass: each row of the layout has grown by its count."""
        if self.layout is None:
            raise ConfigurationError("end() without begin()")
        for row, start, count in zip(
            self.layout.rows, self.layout.starts, self.layout.counts, strict=True
        ):
            self._lengths[row] = start + count
        self.layout = None

    def cancel(self) -> None:
        """Drop a pass that failed: lengths stay, what it wrote beyond them is never read."""
        self.layout = None

    def rewind(self, row: int, length: int) -> None:
        """Forget every token of ``row`` from position ``length`` on.

        Raises:
            RewindError: ``length`` lies beyond the row's end, below 0, or before the earliest
                position that the cache can still reach (see `earliest`).
        """
        current, earliest = self.length(row), self.earliest(row)
        if not earliest <= length <= current:
            raise RewindError(
                f"row {row} cannot be rewound to length {length}: it holds {current} tokens "
                f"and its earliest reachable length is {earliest}"
            )
        self._rewind(row, length)
        self._lengths[row] = length

    def earliest(self, row: int) -> int:
        """The smallest length to which ``row`` can be rewound (0 for attention)."""
        return 0

    def _require(self, row: int) -> None:
        if row not in self._lengths:
            raise ConfigurationError(f"no row {row}; live rows are {list(self.rows)}")

    @abstractmethod
    def _open(self, row: int) -> None: ...

    @abstractmethod
    def _close(self, row: int) -> None: ...

    @abstractmethod
    def _reserve(self, layout: PackedRows) -> None: ...

    @abstractmethod
    def _rewind(self, row: int, length: int) -> None: ...

    @abstractmethod
    def _copy_rows(self, order: Sequence[int]) -> None:
        """Storage of row i becomes a copy of that of row ``order[i]``; lengths are the old ones."""

    def _expect(self, row: int, tokens: int) -> None:
        """The new ``row`` will soon hold so many tokens; states of fixed size need nothing."""
        self._require(row)

    def _faults(self) -> list[str]:
        """What is inconsistent in the storage."""
        return []

    def _spare(self) -> Spare:
        """Storage and its entries (along dim 1) that belong to no row."""
        return []

    def _copy_out(self, row: int) -> Any:
        """Copies of what ``row`` holds, or None to have its tokens read again."""
        return None

    def _copy_in(self, row: int, state: Any) -> None:
        """Give the empty ``row`` what `_copy_out` gave, or pieces."""
        raise RetortError(f"{type(self).__name__} copies no rows, but row {row} was to be filled")

    def _copy_piece(self, row: int, start: int, stop: int) -> Any:
        return self._copy_out(row)
