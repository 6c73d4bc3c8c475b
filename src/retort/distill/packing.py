"""Packing: several sequences in one row, each with positions of its own and blind to the others.

A packed row goes to a model with ``position_ids`` that start again at 0 for each sequence and
without an attention mask; transformers' masks (eager, sdpa, flex, flash) and DenseRetNet's and
DenseMamba's scans then keep the sequences apart. A model that ignores this would mix them
silently, so `require_packing` tries it once on the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.errors import UnsupportedModelError

if TYPE_CHECKING:
    from retort.distill.hidden import HeadlessModel

_TRIED = 5
"""Tokens of each of the two sequences of the trial."""


def packed_rows(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of the sequences in each row: first-fit decreasing, equals in their given order.

    A row holds at most ``size`` tokens; a longer sequence has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if lengths[index] <= free), None)
        if row is None:
            rows.append([])
            room.append(size)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


@torch.no_grad()
def require_packing(headless: HeadlessModel, who: str) -> None:
    """Raise UnsupportedModelError, naming the model, unless packed rows leave it unchanged.

    Two sequences in a row are tried: the second must not change by a bit when the first is
    another one, and must be, up to rounding, what it is in a row of its own.

    Args:
        headless: the model.
        who: "student" or "teacher", for the message.
    """
    training = [module for module in headless.model.modules() if module.training]
    headless.model.eval()
    try:
        fault = _fault(headless)
    finally:
        for module in training:
            module.training = True
    if fault is not None:
        raise UnsupportedModelError(
            f"packing: the {who} ({type(headless.model).__name__}) {fault}; leave packing out"
        )


def _fault(headless: HeadlessModel) -> str | None:
    size = headless.model.config.get_text_config().vocab_size
    first, other, second = (
        (torch.arange(_TRIED, device=headless.model.device) + start) % size
        for start in (0, 2 * _TRIED, _TRIED)
    )
    try:
        packed = _second(headless, first, second)
        beside_other = _second(headless, other, second)
    except (TypeError, ValueError) as error:
        return f"does not take packed rows ({' '.join(str(error).split())})"
    if not torch.equal(packed, beside_other):
        return "lets a sequence see the one before it in a packed row"
    positions = torch.arange(_TRIED, device=second.device)[None]
    alone = headless.hidden(second[None], None, positions=positions)[0]
    allowed = 8 * float(torch.finfo(alone.dtype).eps) ** 0.75 * float(alone.abs().max())
    if float((packed - alone).abs().max()) > allowed:
        return "does not start each sequence of a packed row at position 0"
    return None


def _second(headless: HeadlessModel, first: Tensor, second: Tensor) -> Tensor:
    """What the model makes of ``second`` behind ``first`` in one row, ``[_TRIED, D]``."""
    positions = torch.arange(_TRIED, device=second.device).repeat(2)
    ids = torch.cat([first, second])
    hidden: Any = headless.hidden(ids[None], None, positions=positions[None])
    return hidden[0, _TRIED:]
