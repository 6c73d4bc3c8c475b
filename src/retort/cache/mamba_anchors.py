"""The states of Mamba rows that are kept: which lengths of a row have one, and where it lies.

Anchors besides a row's end [ours]: the start of the last pass, so that a rejected draft replays
only what was accepted of it, and two that keep the tape short while ``max_draft`` tokens can be
taken back. `tape="completion"` keeps an anchor every 64 tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from retort.cache.pool import grown, index
from retort.cache.taped import TapeKind

EMPTY = -1  # stands for the state before the first token, which needs no slot
GRID = 64  # tokens between the anchors of a completion tape


class Anchors:
    """One pool of states for all rows, and of each row the lengths that have a slot in it.

    Args:
        empty: gives zeros ``[layers, n, N, D]`` for n states.
        kind, max_draft: see `MambaRowCache`.

    Attributes:
        states: the pool.
        slots: of each row, length → slot.
        free: slots that belong to no row.
    """

    def __init__(self, empty: Callable[[int], Tensor], kind: TapeKind, max_draft: int) -> None:
        self.states = empty(0)
        self.slots: dict[int, dict[int, int]] = {}
        self.free: list[int] = []
        self._kind, self._max_draft = kind, max_draft

    def open(self, row: int) -> None:
        """Start ``row`` from nothing."""
        self.slots[row] = {0: EMPTY}

    def close(self, row: int) -> None:
        """Give all slots of ``row`` back."""
        self.release(self.slots.pop(row).values())

    def forget(self, row: int, length: int) -> None:
        """Give back the slots of ``row`` beyond ``length``."""
        anchors = self.slots[row]
        self.release(anchors.pop(end) for end in [end for end in anchors if end > length])

    def replace(self, row: int, anchors: dict[int, int]) -> None:
        """Let ``row`` have these, and give back the slots of others that it had."""
        old = self.slots[row]
        self.release(slot for end, slot in old.items() if end not in anchors)
        self.slots[row] = anchors

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes a copy of row ``order[i]``; the pool shrinks to what they use."""
        sources = [self.slots[row] for row in order]
        used = [slot for anchors in sources for slot in anchors.values() if slot != EMPTY]
        self.states = self.states[:, index(used, self.states.device)]
        numbers = iter(range(len(used)))
        self.slots = {
            i: {end: slot if slot == EMPTY else next(numbers) for end, slot in anchors.items()}
            for i, anchors in enumerate(sources)
        }
        self.free = []

    def copy_out(self, row: int) -> tuple[dict[int, bool], Tensor]:
        """The lengths of ``row``'s anchors and whether they have a state, and copies of those."""
        anchors = self.slots[row]
        slots = [slot for slot in anchors.values() if slot != EMPTY]
        filled = {end: slot != EMPTY for end, slot in anchors.items()}
        return filled, self.states[:, index(slots, self.states.device)]

    def copy_in(self, row: int, filled: dict[int, bool], kept: Tensor) -> None:
        """Give ``row``, which starts from nothing, what `copy_out` gave."""
        self.slots[row] = {end: self.slot() if full else EMPTY for end, full in filled.items()}
        slots = [slot for slot in self.slots[row].values() if slot != EMPTY]
        self.states[:, index(slots, self.states.device)] = kept

    def faults(self) -> list[str]:
        """What is inconsistent: every slot belongs to one anchor, or to none."""
        used = [s for anchors in self.slots.values() for s in anchors.values() if s != EMPTY]
        whole = sorted(used + self.free) == list(range(self.states.shape[1]))
        return [] if whole else ["states are shared or lost"]

    def slot(self) -> int:
        """A free slot, which is the caller's from now on."""
        if not self.free:
            old = self.states.shape[1]
            self.states = grown(self.states, max(4, 2 * old))
            self.free += range(old, self.states.shape[1])
        return self.free.pop()

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back."""
        self.free += [slot for slot in slots if slot != EMPTY]

    def after(self, row: int, start: int, end: int) -> dict[int, int]:
        """The anchors that ``row`` will have after a pass, with new slots for those in the pass."""
        old = self.slots[row]
        wanted = self._wanted(sorted({*old, *self._candidates(start, end)}), start, end)
        return {place: old[place] if place in old else self.slot() for place in sorted(wanted)}

    def _candidates(self, start: int, end: int) -> list[int]:
        """Lengths inside a pass whose states are taken, ascending."""
        places = {end}
        if self._kind == "completion":
            places |= set(range((start // GRID + 1) * GRID, end, GRID))
        elif end - self._max_draft > start:
            places.add(end - self._max_draft)
        return sorted(places)

    def _wanted(self, ends: list[int], start: int, end: int) -> set[int]:
        """Which anchors remain: see the module."""
        cut = bisect_left(ends, end - self._max_draft + 1)
        wanted = {start, end, ends[max(cut - 1, 0)], ends[min(cut, len(ends) - 1)]}
        if self._kind == "completion":
            return wanted | {0} | {place for place in ends if place % GRID == 0}
        return {place for place in wanted if place >= ends[max(cut - 1, 0)]}
