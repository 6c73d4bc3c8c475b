"""Pages of one block each that hold the keys and values on the rows' tapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from retort.cache.pool import grown, index


class Pages(NamedTuple):
    """Copies of a row's pages ``[layers, n, H, L, d]``, and the blocks that they hold."""

    blocks: tuple[int, ...]
    keys: Tensor
    values: Tensor


class Tape:
    """One pool of pages for all rows, each page a block of L positions in every layer.

    Args:
        empty: gives zeros ``[layers, n, H, L, d_k]`` and ``[layers, n, H, L, d_v]`` for n pages.
    """

    def __init__(self, empty: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.keys, self.values = empty(0)
        self._table: dict[int, dict[int, int]] = {}
        self._free: list[int] = []

    @property
    def free(self) -> tuple[int, ...]:
        """Pages that belong to no row."""
        return tuple(self._free)

    def open(self, row: int) -> None:
        """Start an empty tape for ``row``."""
        self._table[row] = {}

    def close(self, row: int) -> None:
        """Give all pages of ``row`` back."""
        self._free += self._table.pop(row).values()

    def find(self, row: int, block: int) -> int | None:
        """The page of ``block``, None where the row has none."""
        return self._table[row].get(block)

    def reserve(self, row: int, block: int) -> int:
        """The page of ``block``; a new one is zeroed, so that nothing old can surface."""
        table = self._table[row]
        if block not in table:
            if not self._free:
                self._grow()
            page = table[block] = self._free.pop()
            self.keys[:, page] = 0
            self.values[:, page] = 0
        return table[block]

    def keep(self, row: int, first: int, stop: int | None = None) -> None:
        """Give back the pages of ``row`` outside blocks ``first .. stop − 1``."""
        table = self._table[row]
        for block in [b for b in table if b < first or (stop is not None and b >= stop)]:
            self._free.append(table.pop(block))

    def index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Numbers of entries as an int64 tensor on the tape's device."""
        return index(numbers, self.keys.device)

    def copy_out(self, row: int) -> Pages:
        """Copies of all that ``row`` has on tape."""
        table = self._table[row]
        numbers = self.index(list(table.values()))
        return Pages(tuple(table), self.keys[:, numbers], self.values[:, numbers])

    def copy_in(self, row: int, pages: Pages) -> None:
        """Put copied pages on the empty tape of ``row``."""
        for i, block in enumerate(pages.blocks):
            page = self.reserve(row, block)
            self.keys[:, page] = pages.keys[:, i]
            self.values[:, page] = pages.values[:, i]

    def faults(self, rows: Iterable[int]) -> list[str]:
        """What is inconsistent: every page belongs to one live row, or to none."""
        owned = [page for table in self._table.values() for page in table.values()]
        faults = [] if set(self._table) == set(rows) else ["tapes of other rows"]
        if sorted(owned + self._free) != list(range(self.keys.shape[1])):
            faults.append("pages are shared or lost")
        return faults

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes a copy of row ``order[i]``; the pool shrinks to what they use."""
        tables = [self._table[row] for row in order]
        used = self.index([p for t in tables for p in t.values()])
        self.keys, self.values = self.keys[:, used], self.values[:, used]
        numbers = iter(range(len(used)))
        self._table = {i: {b: next(numbers) for b in t} for i, t in enumerate(tables)}
        self._free = []

    def _grow(self) -> None:
        old = self.keys.shape[1]
        new = max(4, 2 * old)
        self.keys, self.values = grown(self.keys, new), grown(self.values, new)
        self._free += range(old, new)
