"""What recurrent row caches share: states of float32 at least, and a tape of what came after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from retort.cache.pool import index
from retort.cache.recurrent import RecurrentRowCache
from retort.cache.rows import Spare
from retort.cache.tape import Tape
from retort.errors import ConfigurationError

TapeKind = Literal["draft", "completion"]


class TapedRowCache(RecurrentRowCache):
    """Rows that keep states (anchors), and on a tape what they read since then.

    Args:
        dtype: the model's dtype; states and tapes have it or float32, whichever is wider.
        device: where states and tapes live.
        tape: "draft" reaches back ``max_draft`` tokens at least; "completion" every token.
        max_draft: the longest rewind that "draft" must serve after a pass.
        block: tokens in a page of the tape.
    """

    tape: Tape

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        tape: TapeKind,
        max_draft: int,
        block: int,
    ) -> None:
        super().__init__(torch.device(device))
        _check(tape, max_draft, block)
        self.kind, self.max_draft = tape, max_draft
        self.dtype = torch.promote_types(dtype, torch.float32)

    def _anchor_faults(self, ends: Mapping[int, int]) -> list[str]:
        """What is inconsistent in the length at which each row's newest state stands."""
        faults = [] if set(ends) == set(self._lengths) else ["anchors of other rows"]
        for row, length in self._lengths.items():
            if ends.get(row, 0) > max(length, 0):
                faults.append(f"row {row} of {length} tokens keeps a state beyond its end")
        return faults

    def _spare_of(self, states: Tensor, free: Sequence[int]) -> Spare:
        pages = self.tape.free
        return [(states, free), (self.tape.keys, pages), (self.tape.values, pages)]

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return index(numbers, self.device)


def outside_a_pass() -> RuntimeError:
    """The error of a layer that uses the cache where no pass is open."""
    return RuntimeError("layers read and write the cache between begin() and end() only")


def _check(tape: str, max_draft: int, block: int) -> None:
    """Refuse an unknown kind of tape, and sizes that hold nothing."""
    if tape not in ("draft", "completion") or max_draft < 0 or block < 1:
        raise ConfigurationError(
            f"a tape is 'draft' or 'completion', max_draft at least 0 and block at least 1: "
            f"{tape=}, {max_draft=}, {block=}"
        )
