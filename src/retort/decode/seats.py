"""Requests and their rows in the cache: taking a seat, leaving it for a while, going back."""

from __future__ import annotations

from collections.abc import Iterable

from retort.decode.drafting import Drafting
from retort.decode.packed import PackedModel
from retort.decode.prefixes import PrefixCache
from retort.decode.request import Request
from retort.decode.stats import EngineStats


class Seats:
    """Gives requests rows of the target, and keeps ``request.fed`` at what a row holds."""

    def __init__(self, target: PackedModel, prefixes: PrefixCache, drafting: Drafting) -> None:
        self._target, self._prefixes, self._drafting = target, prefixes, drafting

    def seat(self, request: Request) -> None:
        """Give a request its row, unless it was held."""
        cache = self._target.cache
        if request.row < 0:
            parked, request.parked = request.parked, None
            room = len(request.tokens)
            request.row = cache.add_row(room) if parked is None else cache.unpark(parked, room)

    def park(self, request: Request) -> None:
        """Take a preempted row out of the cache."""
        request.parked = self._target.cache.park(request.row)
        request.row = -1
        if request.parked is None:
            request.fed = 0
        self._drafting.forget(request.id)

    def start_from_prefixes(self, unread: Iterable[Request], stats: EngineStats) -> None:
        """Rows of which nothing was read yet begin with a kept copy, where there is one."""
        for request in unread:
            if request.params.prompt_logprobs is not None:  # these need every token's logits
                continue
            if (kept := self._prefixes.find(request)) is None:
                continue
            request.parked, request.fed = kept, kept.length
            request.stats.cached_tokens = min(kept.length, len(request.prompt))
            stats.prefix_queries += len(request.prompt)
            stats.prefix_hits += request.stats.cached_tokens
            if request.row >= 0:
                self._target.free_row(request.row)
                request.row = -1
                self.seat(request)

    def rewind(self, request: Request, length: int) -> None:
        """Let the row hold at most ``length`` tokens."""
        if request.row >= 0:
            if self._target.length(request.row) > length:
                self._target.rewind(request.row, length)
            request.fed = self._target.length(request.row)

    def free(self, request: Request) -> None:
        """Let the row go, and what drafters kept for it."""
        if request.row >= 0:
            self._target.free_row(request.row)
        self._drafting.release(request.id)
