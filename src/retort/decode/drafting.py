"""Drafts for the rows of one step: which drafter, how long, and what is fit to be verified."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import index
from typing import Any

from torch import Tensor

from retort.decode.budget import Candidate, DraftBudget
from retort.decode.draft import Draft, DraftContext, as_draft
from retort.decode.drafter import Drafter, ModelDrafter, build_drafter
from retort.decode.packed import PackedModel
from retort.decode.profile import pass_profile
from retort.decode.request import Request
from retort.errors import ConfigurationError

DEFAULT = "default"
_REFUSED = 8  # steps whose drafts did not pay, after which drafters are asked less often
_LONG = 32  # of these, after which they are asked a step later each, by
_RAREST = 3  # at most


@contextmanager
def _harmless(helper: object) -> Iterator[None]:
    """A drafter or budget that fails costs speed and never a request."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"{type(helper).__name__} failed, which costs no more than speed: {error}",
            stacklevel=3,
        )


class Drafting:
    """The engine's drafters by name, and the budget that their drafts compete for.

    Args:
        drafter: what `Engine` was given: None, one drafter, or a mapping of names to drafters,
            whose first is the default.
        target: the model that verifies; the budget learns what its passes cost.
        budget: gives draft lengths.
        coupled: model drafters draw with the target's noise, see `DraftContext`.

    Raises:
        ConfigurationError: a drafter that cannot serve the target.
    """

    def __init__(
        self, drafter: Any, target: PackedModel, budget: DraftBudget, coupled: bool = True
    ) -> None:
        self.budget, self._coupled = budget, coupled
        self._target = target
        self._vocab = target.model.config.get_text_config().vocab_size
        self._drafters = self._build(drafter)
        self._refused = 0
        self._profiled = False

    @property
    def default(self) -> Drafter | None:
        """The drafter of requests that name none."""
        return next(iter(self._drafters.values()), None)

    def resolve(self, name: str | None) -> str | None:
        """The key of a request's drafter, or None for no speculation.

        Raises:
            ConfigurationError: no drafter of that name.
        """
        if name is None or (name == DEFAULT and not self._drafters):
            return None
        if name == DEFAULT:
            return next(iter(self._drafters))
        if name not in self._drafters:
            raise ConfigurationError(
                f"drafter={name!r}: this engine has {', '.join(self._drafters) or 'no drafter'}"
            )
        return name

    def propose(self, rows: Sequence[Request], queued: bool = False) -> list[Draft]:
        """Drafts of the decoding rows, in order; empty where nothing is worth verifying.

        Drafts that cost nothing are made first; then all rows' draft positions compete for the
        step, and models draft as long as they were given.

        Args:
            rows: requests that decode.
            queued: others wait for a place among them.
        """
        if all(row.drafter is None for row in rows):
            return [Draft() for _ in rows]
        if self._resting(len(rows)):
            return [Draft() for _ in rows]
        self._profile_once()
        most = {row.id: max(min(self.budget.max_draft, row.room - 1), 0) for row in rows}
        drafts = self._ask(rows, most, passes=False)
        together = not queued and all(row.together for row in rows)
        lengths = self._allocate(rows, most, drafts, together)
        drafts |= self._ask(rows, lengths, passes=True)
        return [drafts[row.id].cut(lengths[row.id]) for row in rows]

    def _resting(self, rows: int) -> bool:
        """Where drafting does not pay, asking is not free either: 0.1 ms, and some 25 µs a row.

        That is 2 % of a step of one row, and 1.5 % of one of 16: many rows are asked rarely, and
        all the more rarely the longer nothing paid.
        """
        if self._refused < _REFUSED:
            return False
        self._refused += 1
        longer = min(self._refused // _LONG, _RAREST)
        return self._refused % (1 + rows // 2 + longer) != 0

    def observe(self, request: Request, draft: Draft, accepted: int) -> None:
        """A draft of the request was verified."""
        name = request.drafter or ""
        with _harmless(self.budget):
            self.budget.observe(request.id, name, len(draft), accepted, draft.match)

    def time_step(self, rows: int, tokens: int, seconds: float) -> None:
        """A pass over ``tokens`` tokens of ``rows`` decoding rows took ``seconds``."""
        with _harmless(self.budget):
            self.budget.time_step(rows, tokens, seconds)

    def forget(self, request_id: str) -> None:
        """Drop what drafters keep for a request; they begin again when they are asked again."""
        for drafter in self._drafters.values():
            with _harmless(drafter):
                drafter.release(request_id)

    def release(self, request_id: str) -> None:
        """The request is finished."""
        self.forget(request_id)
        with _harmless(self.budget):
            self.budget.release(request_id)

    def close(self) -> None:
        """Let draft models go; they are as they were given."""
        for drafter in self._drafters.values():
            if isinstance(drafter, ModelDrafter):
                drafter.close()

    def _build(self, drafter: Any) -> dict[str, Drafter]:
        given = drafter if isinstance(drafter, Mapping) else {DEFAULT: drafter}
        built: dict[str, Drafter] = {}
        try:
            for name, each in given.items():
                if (made := build_drafter(each, self._target.model)) is not None:
                    built[name] = made
        except BaseException:
            self._drafters = built
            self.close()
            raise
        return built

    def _allocate(
        self,
        rows: Sequence[Request],
        most: Mapping[str, int],
        drafts: Mapping[str, Draft],
        together: bool,
    ) -> dict[str, int]:
        """Draft lengths by request."""
        candidates = []
        for row in rows:
            passes = row.drafter is not None and self._drafters[row.drafter].passes
            wanted = most[row.id] if passes else len(drafts[row.id])
            match = 0 if passes else drafts[row.id].match
            left = row.room if together else None
            candidates.append(Candidate(row.id, row.drafter or "", wanted, passes, match, left))
        lengths = self._lengths(candidates)
        if any(lengths):
            self._refused = 0
        elif any(c.wanted for c in candidates):
            self._refused += 1
        return {c.row: min(n, c.wanted) for c, n in zip(candidates, lengths, strict=True)}

    def _lengths(self, candidates: Sequence[Candidate]) -> list[int]:
        with _harmless(self.budget):
            lengths = [index(n) for n in self.budget.allocate(candidates)]
            if len(lengths) != len(candidates) or min(lengths) < 0:
                raise ValueError(f"allocate() gave {lengths} for {len(candidates)} rows")
            return lengths
        return [0] * len(candidates)

    def _ask(
        self, rows: Sequence[Request], limits: Mapping[str, int], passes: bool
    ) -> dict[str, Draft]:
        """Drafts by request of the drafters that cost passes, or of those that do not."""
        drafts = {} if passes else {row.id: Draft() for row in rows}
        for name, drafter in self._drafters.items():
            group = [row for row in rows if row.drafter == name]
            if group and drafter.passes == passes:
                drafts |= self._guarded(name, group, limits)
        return drafts

    def _guarded(
        self, name: str, rows: Sequence[Request], limits: Mapping[str, int]
    ) -> dict[str, Draft]:
        """A drafter's drafts by request, empty ones where it fails."""
        drafter = self._drafters[name]
        contexts = [DraftContext.of(row, limits[row.id], self._coupled) for row in rows]
        with _harmless(drafter):
            started = time.perf_counter()
            drafts = [as_draft(d) for d in drafter.propose(contexts)]
            fit = {c.request_id: self._fit(c, d) for c, d in zip(contexts, drafts, strict=True)}
            self._time_draft(name, contexts, time.perf_counter() - started)
            return fit
        return {row.id: Draft() for row in rows}

    def _time_draft(self, name: str, contexts: Sequence[DraftContext], elapsed: float) -> None:
        drafter, depth = self._drafters[name], max(c.limit for c in contexts)
        if drafter.passes and depth:
            seconds = getattr(drafter, "pass_seconds", elapsed / depth)
            if seconds is not None:
                with _harmless(self.budget):
                    self.budget.time_draft(name, seconds)

    def _fit(self, context: DraftContext, draft: Draft) -> Draft:
        """Cut what a drafter should not have proposed: too many tokens, or unknown ones.

        Raises:
            Exception: token ids that are no whole numbers, or a q that belongs to other tokens.
        """
        fit = draft.cut(context.limit)
        tokens = [index(token) for token in fit.tokens]
        bad = (i for i, token in enumerate(tokens) if not 0 <= token < self._vocab)
        fit = Draft(tokens, fit.probs, fit.match).cut(next(bad, len(tokens)))
        if fit.probs is not None and not self._coupled:
            _check_probs(fit.probs, (len(fit), self._vocab))
        return fit

    def _profile_once(self) -> None:
        """Tell the budget what passes cost; where measuring fails, live times have to teach it."""
        if self._profiled:
            return
        self._profiled = True
        cost = getattr(getattr(self.budget, "cost", None), "profile", None)
        if cost is not None and not cost.seconds_at:
            with suppress(Exception):
                cost.learn(pass_profile(self._target))


def _check_probs(probs: Any, shape: tuple[int, int]) -> None:
    """Refuse what `rejection` cannot weigh.

    Raises:
        ValueError: it is no finite distribution for each token.
    """
    if not isinstance(probs, Tensor) or tuple(probs.shape) != shape:
        found = getattr(probs, "shape", type(probs).__name__)
        raise ValueError(f"probs must be a tensor of {shape}, not {found}")
    if probs.numel():
        low, high = probs.aminmax()
        if not (low >= 0 and high < float("inf")):  # false for NaN, too
            raise ValueError("probs must be finite and not negative")
