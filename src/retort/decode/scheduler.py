"""Which rows take part in the next pass, and with how many tokens. Knows nothing of tensors.

Decisions follow from what the scheduler was told alone; a recorded run can be replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.errors import ConfigurationError


@dataclass(frozen=True)
class Prefill:
    """A slice of a prompt to read in this pass; ``last`` when it is the prompt's end."""

    request: Request
    tokens: list[int]
    last: bool


@dataclass
class Plan:
    """One pass: prompt slices, and the rows that decode.

    Attributes:
        preempted: rows that must leave the cache before the pass.
        admitted: rows that enter it.
    """

    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class RowState:
    """What the scheduler looks at in a request."""

    id: str
    length: int
    fed: int
    limit: int
    pause: int
    draft: int
    live: bool
    scored: bool


@dataclass(frozen=True)
class Event:
    """What the scheduler was told: a request came, went, or a pass is due (with all rows).

    ``slice`` is how many prompt tokens a due pass may read.
    """

    kind: Literal["add", "remove", "schedule"]
    rows: tuple[RowState, ...]
    slice: int


@dataclass(frozen=True)
class Decision:
    """A plan without its tokens."""

    preempted: tuple[str, ...]
    admitted: tuple[str, ...]
    prefills: tuple[tuple[str, int, bool], ...]
    decodes: tuple[str, ...]


class Scheduler:
    """First in, first out; at most ``max_batch_size`` rows; prompts in chunks beside decoding rows.

    A row needs its tokens and its longest draft. Where the rows' need passes
    ``max_cached_tokens``, the youngest makes room and waits in front of the queue; the oldest
    never does, and nobody overtakes, so that every request ends.

    Args:
        max_batch_size: rows that may be in work at once; held rows do not count.
        max_prefill_tokens: prompt tokens a pass, so that a long prompt does not stall the others.
        max_cached_tokens: tokens that the rows in work may hold together; None for no limit.
        max_draft: longest draft of a row that has a drafter.
        record: keep ``events`` and ``decisions``, for `replay`.

    Attributes:
        slice: prompt tokens of the next pass, where less than ``max_prefill_tokens``.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_prefill_tokens: int = 512,
        max_cached_tokens: int | None = None,
        max_draft: int = 0,
        record: bool = False,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_prefill_tokens", max_prefill_tokens),
            ("max_cached_tokens", 1 if max_cached_tokens is None else max_cached_tokens),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
        self.max_batch_size, self.max_prefill_tokens = max_batch_size, max_prefill_tokens
        self.max_cached_tokens, self.max_draft = max_cached_tokens, max_draft
        self.slice = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.record = record
        self.events: list[Event] = []
        self.decisions: list[Decision] = []

    def check(self, request_id: str, limit: int) -> None:
        """Refuse a request that could not end.

        Raises:
            ConfigurationError: it may grow to ``limit`` tokens and there is never so much room.
        """
        if self.max_cached_tokens is not None and limit > self.max_cached_tokens:
            raise ConfigurationError(
                f"{request_id} may grow to {limit} tokens and max_cached_tokens is "
                f"{self.max_cached_tokens}: lower max_new_tokens or shorten the prompt"
            )

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self._note("add", [request])
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for place in (self.running, self.waiting):
            if request in place:
                self._note("remove", [request])
                place.remove(request)

    def schedule(self) -> Plan:
        """Make room, admit, and plan the next pass: prompts (oldest first), then decoding rows."""
        self._note("schedule", [*self.running, *self.waiting])
        plan = Plan(preempted=self._preempt(), admitted=self._admit())
        live = [r for r in self.running if r.finish_reason is None]
        plan.prefills = list(self._slices(r for r in live if not r.decoding))
        plan.decodes = [r for r in live if r.decoding]
        if self.record:
            self.decisions.append(_decision(plan))
        return plan

    def unread(self) -> list[Request]:
        """Rows in work, and requests next in line for one, of which nothing was read yet."""
        free = max(self.max_batch_size - len(self.running), 0)
        near = [*self.running, *islice(self.waiting, free)]
        return [r for r in near if r.fed == 0 and r.finish_reason is None]

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def _preempt(self) -> list[Request]:
        out: list[Request] = []
        while len(self.running) > 1 and self._needed(self.running) > self._room:
            out.append(self.running.pop())
            self.waiting.appendleft(out[-1])
        return out

    def _admit(self) -> list[Request]:
        new: list[Request] = []
        while self.waiting and len(self.running) < self.max_batch_size:
            if self.running and self._needed([*self.running, self.waiting[0]]) > self._room:
                break
            request = self.waiting.popleft()
            if request.room <= 0 and request.params.prompt_logprobs is None:
                request.finish_reason = "length"
            new.append(request)
            self.running.append(request)
        return new

    @property
    def _room(self) -> float:
        return float("inf") if self.max_cached_tokens is None else self.max_cached_tokens

    def _needed(self, requests: Iterable[Request]) -> int:
        """Tokens that the rows hold at most once their next pass is done, drafts included."""
        return sum(min(len(r.tokens) + self._draft(r), r.limit) for r in requests)

    def _draft(self, request: Request) -> int:
        return 0 if request.drafter is None else self.max_draft

    def _slices(self, requests: Iterable[Request]) -> Iterable[Prefill]:
        left = min(self.slice, self.max_prefill_tokens)
        for request in requests:
            if left <= 0:
                return
            pending = request.pending
            most = request.pause - request.fed if request.pause > request.fed else left
            tokens = pending[: min(left, most)]
            left -= len(tokens)
            yield Prefill(request, tokens, last=len(tokens) == len(pending))

    def _note(self, kind: Any, requests: Iterable[Request]) -> None:
        if self.record:
            self.events.append(Event(kind, tuple(self._state(r) for r in requests), self.slice))

    def _state(self, r: Request) -> RowState:
        live, scored = r.finish_reason is None, r.params.prompt_logprobs is not None
        return RowState(r.id, len(r.tokens), r.fed, r.limit, r.pause, self._draft(r), live, scored)


def replay(events: Sequence[Event], **limits: Any) -> list[Decision]:
    """The decisions of a new `Scheduler` with these limits that is told the same events."""
    scheduler = Scheduler(**{**limits, "record": True})
    requests: dict[str, Request] = {}
    for event in events:
        for state in event.rows:
            _restore(requests.setdefault(state.id, _stand_in(state)), state)
        scheduler.slice = event.slice
        if event.kind == "schedule":
            scheduler.schedule()
        else:
            getattr(scheduler, event.kind)(requests[event.rows[0].id])
    return scheduler.decisions


def _stand_in(state: RowState) -> Request:
    params = SamplingParams(prompt_logprobs=0 if state.scored else None)
    return Request(state.id, 0, [], params, frozenset())


def _restore(request: Request, state: RowState) -> None:
    request.tokens, request.fed, request.limit = [0] * state.length, state.fed, state.limit
    request.pause = state.pause
    request.drafter = "any" if state.draft else None
    request.finish_reason = None if state.live else "stop"


def _decision(plan: Plan) -> Decision:
    return Decision(
        tuple(r.id for r in plan.preempted),
        tuple(r.id for r in plan.admitted),
        tuple((p.request.id, len(p.tokens), p.last) for p in plan.prefills),
        tuple(r.id for r in plan.decodes),
    )
