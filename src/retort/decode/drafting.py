"""Drafts for the rows of one step: which drafter, how long, and what is fit to be verified."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from retort.decode.budget import DraftBudget
from retort.decode.drafter import DraftContext, Drafter, ModelDrafter, build_drafter
from retort.decode.packed import PackedModel
from retort.decode.profile import profile_passes
from retort.decode.request import Request
from retort.errors import ConfigurationError

DEFAULT = "default"


class Drafting:
    """The engine's drafters by name, and the budget that their drafts compete for.

    Args:
        drafter: what `Engine` was given: None, one drafter, or a mapping of names to drafters,
            whose first is the default.
        target: the model that verifies; the budget learns what its passes cost.
        budget: gives draft lengths.

    Raises:
        ConfigurationError: a drafter that cannot serve the target.
    """

    def __init__(self, drafter: Any, target: PackedModel, budget: DraftBudget) -> None:
        self.budget = budget
        self._target = target
        self._vocab = target.model.config.get_text_config().vocab_size
        self._drafters = self._build(drafter)

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

    def propose(self, rows: Sequence[Request]) -> list[list[int]]:
        """Drafts of the decoding rows, in order; empty where nothing is worth verifying."""
        drafts: dict[str, list[int]] = {row.id: [] for row in rows}
        if any(row.drafter is not None for row in rows):
            self._profile_once()
        for name, drafter in self._drafters.items():
            group = [row for row in rows if row.drafter == name]
            if group:
                others = len(rows) - len(group) + sum(map(len, drafts.values()))
                drafts |= self._guarded(drafter, group, others)
        return list(drafts.values())

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A draft of the request was verified."""
        self.budget.observe(request.id, drafted, accepted)

    def release(self, request_id: str) -> None:
        """The request is finished."""
        for drafter in self._drafters.values():
            drafter.release(request_id)
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

    def _guarded(
        self, drafter: Drafter, rows: Sequence[Request], others: int
    ) -> dict[str, list[int]]:
        """A drafter that fails costs speed and never a request."""
        try:
            drafts = self._propose(drafter, rows, others)
        except Exception as error:
            warnings.warn(
                f"{type(drafter).__name__} failed and drafts nothing in this step: {error}",
                stacklevel=2,
            )
            drafts = [[] for _ in rows]
        return {row.id: self._fit(row, d) for row, d in zip(rows, drafts, strict=True)}

    def _propose(self, drafter: Drafter, rows: Sequence[Request], others: int) -> list[list[int]]:
        ids = [row.id for row in rows]
        wanted = [max(min(self.budget.max_draft, row.room - 1), 0) for row in rows]
        if drafter.passes:
            wanted = self.budget.allocate(ids, wanted, drafting=True, others=others)
        started = time.perf_counter()
        drafts = drafter.propose(
            [DraftContext(row.id, row.tokens, w) for row, w in zip(rows, wanted, strict=True)]
        )
        if drafter.passes:
            if any(wanted):
                self.budget.time_draft(max(wanted), time.perf_counter() - started)
            return drafts
        lengths = self.budget.allocate(ids, [len(d) for d in drafts], drafting=False, others=others)
        return [draft[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def _fit(self, row: Request, draft: Sequence[int]) -> list[int]:
        """Cut what a drafter should not have proposed: too many tokens, or unknown ones."""
        fit = list(draft[: max(min(self.budget.max_draft, row.room - 1), 0)])
        bad = (i for i, token in enumerate(fit) if not 0 <= token < self._vocab)
        return fit[: next(bad, len(fit))]

    def _profile_once(self) -> None:
        cost = getattr(self.budget, "cost", None)
        if cost is not None and not cost.seconds_at:
            for tokens, seconds in profile_passes(self._target):
                cost.record(tokens, seconds)
