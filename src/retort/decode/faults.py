"""When a pass fails: memory ran out, or one row cannot be processed. What can go on, goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.decode.draft import Draft
from retort.decode.packed import PackedModel
from retort.decode.request import Request
from retort.decode.scheduler import Plan


@contextmanager
def contained(*requests: Request) -> Iterator[None]:
    """What fails in the work of some rows ends these and no others."""
    try:
        yield
    except Exception as error:
        for request in requests:
            request.fail(error)


@dataclass(frozen=True)
class _Work:
    """One row's share of the failed pass, without drafts."""

    request: Request
    tokens: list[int]
    keep: int


def salvage(
    target: PackedModel, plan: Plan, drafts: list[Draft], keep: list[int], error: Exception
) -> Tensor | None:
    """Repeat a failed pass in smaller ones, without drafts, and leave out the rows that fail alone.

    A failed pass changes no row's length, so it can be repeated. Rows that fail on their own get
    the finish reason "error" and leave ``plan`` and ``drafts``; ``keep`` follows.

    Args:
        plan, drafts: the failed pass.
        keep: logits wanted of each prompt slice and of each decoding row.
        error: what the pass raised.

    Returns:
        Logits ``[Σ keep, vocab]`` of the rows that are left, in order; None where none is.

    Raises:
        Exception: ``error`` itself where no pass succeeds: that is no fault of the rows.
    """
    works = [_Work(p.request, p.tokens, k) for p, k in zip(plan.prefills, keep, strict=False)]
    works += [_Work(r, r.pending, 1) for r in plan.decodes]
    results = _by_rows(target, works)
    saved = [(w, r) for w, r in zip(works, results, strict=True) if r is not None]
    if not saved and not _works(target):
        for work in works:
            work.request.finish_reason = work.request.error = None
        raise error
    plan.prefills = [p for p in plan.prefills if p.request.finish_reason is None]
    plan.decodes = [r for r in plan.decodes if r.finish_reason is None]
    drafts[:] = [Draft() for _ in plan.decodes]
    keep[:] = [work.keep for work, _ in saved]
    return torch.cat([logits for _, logits in saved]) if saved else None


def _by_rows(target: PackedModel, works: list[_Work]) -> list[Tensor | None]:
    """Halve the rows until they pass; None for a row that does not pass alone."""
    if len(works) == 1:
        return [_alone(target, works[0])]
    try:
        feeds = [(w.request.row, w.tokens) for w in works]
        logits = target.forward(feeds, [w.keep for w in works])
        return list(logits.split([w.keep for w in works]))
    except Exception:
        middle = len(works) // 2
        return _by_rows(target, works[:middle]) + _by_rows(target, works[middle:])


def _alone(target: PackedModel, work: _Work) -> Tensor | None:
    try:
        return _by_tokens(target, work.request.row, work.tokens, work.keep)
    except Exception as error:
        work.request.fail(error)
        work.request.fed = target.length(work.request.row)  # a part of its tokens may be read
        return None


def _by_tokens(target: PackedModel, row: int, tokens: list[int], keep: int) -> Tensor:
    """Halve a row's tokens until they pass."""
    try:
        return target.forward([(row, tokens)], [keep])
    except Exception:
        if len(tokens) == 1:
            raise
        middle = len(tokens) // 2
        late = min(keep, len(tokens) - middle)
        first = _by_tokens(target, row, tokens[:middle], keep - late)
        return torch.cat([first, _by_tokens(target, row, tokens[middle:], late)])


def _works(target: PackedModel) -> bool:
    """Whether a pass over one token of a fresh row succeeds."""
    row = target.add_row()
    try:
        target.forward([(row, [0])], [1])
    except Exception:
        return False
    finally:
        target.free_row(row)
    return True
