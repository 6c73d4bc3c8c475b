"""Where drafts come from: the text itself (prompt lookup), a small model, or a user's class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from retort.decode.choosing import Place, choose
from retort.decode.draft import Draft, DraftContext
from retort.decode.packed import PackedModel
from retort.decode.processors import warp
from retort.decode.sampling import DRAFT, TOKEN
from retort.decode.support import check_supported
from retort.errors import ConfigurationError


@runtime_checkable
class Drafter(Protocol):
    """Proposes the next tokens of rows. Any class with these members will do.

    ``passes`` says whether drafting costs model passes: the budget then decides lengths before
    anything is drafted; otherwise drafts are made first and cut to the budget.
    """

    passes: bool

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Draft | Sequence[int]]:
        """Return at most ``limit`` tokens for each context, in order; an empty list is fine.

        Tokens that were drawn and not copied go with their distributions as a `Draft`.
        """
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

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Look every row up in its own text; costs no model pass."""
        return [self._lookup(c) for c in contexts]

    def release(self, request_id: str) -> None:
        """Drop the index of a finished request."""
        self._indexes.pop(request_id, None)

    def _lookup(self, context: DraftContext) -> Draft:
        index = self._indexes.setdefault(context.request_id, _SuffixIndex(self._sizes))
        start, tokens = index.find(context.tokens), context.tokens
        if not start:
            return Draft()
        return Draft(list(tokens[start : start + context.limit]), match=_match(tokens, start))


def _match(tokens: Sequence[int], end: int, most: int = 8) -> int:
    """How many tokens before ``end`` equal the row's last ones, at most ``most``."""
    most = min(most, end)
    return next((i for i in range(most) if tokens[end - 1 - i] != tokens[-1 - i]), most)


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
    """Drafts of a small causal model with the target's vocabulary, all rows in one pass.

    Tokens are chosen as the target chooses its own: through the same processors, and when sampling
    with the same noise (`coupled`) or with the drafter's own and q (`rejection`). The drafter keeps
    a row cache, rewound to the accepted text before it drafts on.

    Args:
        model: a causal model of transformers or Retort.
        max_draft: longest draft that it will be asked for.

    Attributes:
        pass_seconds: mean time of the latest call's passes over one token a row; None where a
            call had none, since reading what a row missed says nothing about drafting.
    """

    passes = True
    pass_seconds: float | None = None

    def __init__(self, model: Any, max_draft: int = 16) -> None:
        self.packed = PackedModel(model, max_draft=max_draft)
        self._rows: dict[str, int] = {}
        self._fed: dict[str, list[int]] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Draft ``limit`` tokens a row; rows drop out of the passes as they reach theirs."""
        writings = [_Writing(c) for c in contexts]
        active = [w for w in writings if w.context.limit > 0]
        feeds = {w.context.request_id: self._catch_up(w.context) for w in active}
        seconds: list[float] = []
        while active:
            ids = [w.context.request_id for w in active]
            started, short = time.perf_counter(), all(len(feeds[i]) <= 2 for i in ids)
            logits = self._forward(ids, feeds)
            seconds += [time.perf_counter() - started] if short else []
            for writing, token in zip(active, _write(active, logits), strict=True):
                feeds[writing.context.request_id] = [token]
            active = [w for w in active if w.goes_on]
        self.pass_seconds = sum(seconds) / len(seconds) if seconds else None
        return [w.draft for w in writings]

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

    def _forward(self, ids: Sequence[str], feeds: dict[str, list[int]]) -> Tensor:
        logits = self.packed.forward([(self._rows[i], feeds[i]) for i in ids], [1] * len(ids))
        for i in ids:
            self._fed[i].extend(feeds[i])
        return logits


class _Writing:
    """One row's draft in the making."""

    def __init__(self, context: DraftContext) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.probs: list[Tensor] = []

    @property
    def place(self) -> Place:
        """Where the next token is chosen."""
        c = self.context
        output = [*c.tokens[c.prompt_length :], *self.tokens]
        return Place(c.params, c.tokens[: c.prompt_length], output, c.eos, c.key)

    @property
    def goes_on(self) -> bool:
        """Whether another token is wanted, and the last one could be told."""
        return self.tokens[-1] >= 0 and len(self.tokens) < self.context.limit

    @property
    def draft(self) -> Draft:
        """What was written, with q where tokens were drawn with noise of their own."""
        return Draft(self.tokens, torch.stack(self.probs) if self.probs else None)


def _write(writings: Sequence[_Writing], logits: Tensor) -> list[int]:
    """Add a token to each draft, chosen as the target chooses; ``logits`` ``[rows, vocab]``."""
    tokens, places = torch.argmax(logits, -1).tolist(), [w.place for w in writings]
    shaped = [i for i, place in enumerate(places) if not place.plain]
    if shaped:
        scores = logits[shaped].to(torch.float64)
        for each, i in zip(scores, shaped, strict=True):
            places[i].adjust(each, drafting=True)
        scores = warp(scores, [places[i].params for i in shaped])
        coupled = writings[0].context.coupled
        drawn = choose(scores, [places[i] for i in shaped], TOKEN if coupled else DRAFT)
        for each, i, token in zip(scores, shaped, drawn, strict=True):
            tokens[i] = token
            if places[i].params.do_sample and not coupled:
                writings[i].probs.append(each.softmax(-1))
    for writing, token in zip(writings, tokens, strict=True):
        writing.tokens.append(token)
    return tokens


def build_drafter(drafter: Any, target: Any) -> Drafter | None:
    """Turn what a user may give (None, a name, a folder, a model, a Drafter) into a drafter."""
    if drafter is None or drafter == "none":
        return None
    if drafter == "prompt-lookup":
        return PromptLookupDrafter()
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, str):
        from retort.models.zoo import load_config, load_model

        check_supported(load_config(drafter))
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
