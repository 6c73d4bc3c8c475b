"""Where drafts come from: the text itself (prompt lookup), a small model, or a user's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from retort.decode.packed import PackedModel
from retort.errors import ConfigurationError


@dataclass(frozen=True)
class DraftContext:
    """One row that may be drafted for: its id, all its tokens, and the longest useful draft."""

    request_id: str
    tokens: Sequence[int]
    limit: int


@runtime_checkable
class Drafter(Protocol):
    """Proposes the next tokens of rows. Any class with these members will do.

    ``passes`` says whether drafting costs model passes: the budget then decides lengths before
    anything is drafted; otherwise drafts are made first and cut to the budget.
    """

    passes: bool

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """Return at most ``limit`` tokens for each context, in order; an empty list is fine."""
        ...

    def release(self, request_id: str) -> None:
        """The request is finished: forget what was kept for it."""
        ...


class PromptLookupDrafter:
    """Copy what followed the last occurrence of the current suffix (LLMA, arXiv 2304.04487).

    The longest suffix of ``min_match`` to ``max_match`` tokens that occurred before wins, and of
    its occurrences the most recent. EMS-SD matches the last 2 tokens; longest-first is our choice.
    """

    passes = False

    def __init__(self, min_match: int = 2, max_match: int = 4) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._indexes: dict[str, _SuffixIndex] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """Look every row up in its own text; costs no model pass."""
        return [self._lookup(c) for c in contexts]

    def release(self, request_id: str) -> None:
        """Drop the index of a finished request."""
        self._indexes.pop(request_id, None)

    def _lookup(self, context: DraftContext) -> list[int]:
        index = self._indexes.setdefault(context.request_id, _SuffixIndex(self._sizes))
        start = index.find(context.tokens)
        return list(context.tokens[start : start + context.limit]) if start else []


class _SuffixIndex:
    """For each n-gram of one row, where its latest occurrence ended; extended as the row grows."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}
        self._done = 0
        self._tail: list[int] = []

    def find(self, tokens: Sequence[int]) -> int:
        """Position after the latest earlier occurrence of the longest known suffix, or 0."""
        self._extend(tokens)
        for size in self._sizes:
            end = self._ends.get(tuple(tokens[-size:]), 0) if len(tokens) > size else 0
            if end:
                return end
        return 0

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that ends before the last token (the suffix must not find itself)."""
        if list(tokens[max(0, self._done - 8) : self._done]) != self._tail:
            self._ends.clear()
            self._done = 0
        for end in range(self._done + 1, len(tokens)):
            for size in self._sizes:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._done = max(len(tokens) - 1, 0)
        self._tail = list(tokens[max(0, self._done - 8) : self._done])


class ModelDrafter:
    """Greedy drafts of a small causal model with the target's vocabulary, all rows in one pass.

    It keeps a row cache of its own, rewound to the accepted text before it drafts on.

    Args:
        model: a causal model of transformers or Retort.
        max_draft: longest draft that it will be asked for.
    """

    passes = True

    def __init__(self, model: Any, max_draft: int = 16) -> None:
        self.packed = PackedModel(model, max_draft=max_draft)
        self._rows: dict[str, int] = {}
        self._fed: dict[str, list[int]] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """Draft ``limit`` tokens a row; rows drop out of the passes as they reach theirs."""
        drafts: dict[str, list[int]] = {c.request_id: [] for c in contexts}
        active = [c for c in contexts if c.limit > 0]
        feeds = {c.request_id: self._catch_up(c) for c in active}
        while active:
            for context, token in zip(active, self._next(active, feeds), strict=True):
                drafts[context.request_id].append(token)
                feeds[context.request_id] = [token]
            active = [c for c in active if len(drafts[c.request_id]) < c.limit]
        return list(drafts.values())

    def release(self, request_id: str) -> None:
        """Free the row of a finished request."""
        if request_id in self._rows:
            self.packed.free_row(self._rows.pop(request_id))
            del self._fed[request_id]

    def close(self) -> None:
        """Free every row; the model is as it was given. The drafter can be used again."""
        for request_id in list(self._rows):
            self.release(request_id)
        self.packed.close()

    def _catch_up(self, context: DraftContext) -> list[int]:
        """Rewind to what still stands of the row and return the tokens to read next."""
        fed, tokens = self._fed.get(context.request_id, []), context.tokens
        keep = _common_prefix(fed, tokens[: len(tokens) - 1])
        row = self._rows.get(context.request_id)
        if row is not None and keep < self.packed.cache.earliest(row):
            self.release(context.request_id)
            row, keep = None, 0
        if row is None:
            row = self._rows[context.request_id] = self.packed.add_row()
            self._fed[context.request_id] = fed = []
        self.packed.rewind(row, keep)
        del fed[keep:]
        return list(tokens[keep:])

    def _next(self, active: Sequence[DraftContext], feeds: dict[str, list[int]]) -> list[int]:
        ids = [c.request_id for c in active]
        logits = self.packed.forward([(self._rows[i], feeds[i]) for i in ids], [1] * len(ids))
        for i in ids:
            self._fed[i].extend(feeds[i])
        return torch.argmax(logits, -1).tolist()


def build_drafter(drafter: Any, target: Any) -> Drafter | None:
    """Turn what a user may give (None, a name, a folder, a model, a Drafter) into a drafter."""
    if drafter is None or drafter == "none":
        return None
    if drafter == "prompt-lookup":
        return PromptLookupDrafter()
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, str):
        from retort.models.zoo import load_model

        drafter = load_model(drafter, dtype=target.dtype)
    _check_vocabulary(drafter, target.config.get_text_config())
    return ModelDrafter(drafter)


def _check_vocabulary(model: Any, target_config: Any) -> None:
    if not hasattr(model, "config"):
        raise ConfigurationError(
            f"drafter {type(model).__name__} is neither a model nor a Drafter: give "
            "'prompt-lookup', a model name or folder, a model, or an object with passes, "
            "propose and release"
        )
    ours, theirs = model.config.get_text_config().vocab_size, target_config.vocab_size
    if ours != theirs:
        raise ConfigurationError(
            f"the drafter's vocabulary has {ours} tokens and the target's {theirs}: "
            "choose a drafter with the target's tokenizer"
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
