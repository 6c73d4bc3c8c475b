"""Which rows take part in the next pass, and with how many tokens. Knows nothing of tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from retort.decode.request import Request


@dataclass(frozen=True)
class Prefill:
    """A slice of a prompt to read in this pass; ``last`` when it is the prompt's end."""

    request: Request
    tokens: list[int]
    last: bool


@dataclass
class Plan:
    """One pass: prompt slices, and the rows that decode."""

    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)


class Scheduler:
    """First in, first out; at most ``max_batch_size`` rows; prompts in chunks beside decoding rows.

    Args:
        max_batch_size: rows that may be in work at once; held rows do not count.
        max_prefill_tokens: prompt tokens a pass, so that a long prompt does not stall the others.
    """

    def __init__(self, max_batch_size: int, max_prefill_tokens: int = 512) -> None:
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for place in (self.running, self.waiting):
            if request in place:
                place.remove(request)

    def admit(self) -> list[Request]:
        """Move waiting requests into work while there is room; returns those moved."""
        free = max(0, self.max_batch_size - len(self.running))
        new = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        self.running += new
        return new

    def plan(self) -> Plan:
        """Slices for rows that still read their prompt (oldest first), then the decoding rows."""
        live = [r for r in self.running if r.finish_reason is None]
        prefills = list(self._slices(r for r in live if not r.decoding))
        return Plan(prefills, [r for r in live if r.decoding])

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def _slices(self, requests: Iterable[Request]) -> Iterable[Prefill]:
        left = self.max_prefill_tokens
        for request in requests:
            if left <= 0:
                return
            pending = request.pending
            tokens = pending[:left]
            left -= len(tokens)
            yield Prefill(request, tokens, last=len(tokens) == len(pending))
