"""One step of the engine, in the order of the paper (EMS-SD, arXiv 2405.07542)."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from retort.decode.draft import Draft
from retort.decode.drafting import Drafting
from retort.decode.faults import contained, salvage
from retort.decode.pace import PrefillPace
from retort.decode.packed import PackedModel
from retort.decode.prefixes import PrefixCache
from retort.decode.request import Request
from retort.decode.scheduler import Plan, Scheduler
from retort.decode.scoring import score_prompts, wanted
from retort.decode.seats import Seats
from retort.decode.stats import EngineStats
from retort.decode.verify import greedy, verify

Drafts = list[Draft]


class Step:
    """Schedule, draft, one packed forward, verify row by row, rewind what was rejected, emit."""

    def __init__(
        self,
        target: PackedModel,
        scheduler: Scheduler,
        drafting: Drafting,
        prefixes: PrefixCache,
        pace: PrefillPace,
        verification: str,
    ) -> None:
        self._target, self._scheduler, self._drafting = target, scheduler, drafting
        self._prefixes, self._pace, self._verification = prefixes, pace, verification
        self.seats = Seats(target, prefixes, drafting)
        self.stats = EngineStats()

    def run(self) -> None:
        """Advance every row in work by one pass."""
        plan = self.schedule()
        with self._clock(plan):
            drafts = self._drafting.propose(plan.decodes, queued=bool(self._scheduler.waiting))
            logits = self.forward(plan, drafts)
            self.accept(plan, drafts, logits)

    def schedule(self) -> Plan:
        """Who takes part, and which rows come and go for it."""
        scheduler = self._scheduler
        if self._prefixes.enabled:
            self.seats.start_from_prefixes(scheduler.unread(), self.stats)
        scheduler.slice = self._pace.slice(sum(r.decoding for r in scheduler.running))
        plan = scheduler.schedule()
        for request in plan.preempted:
            self.seats.park(request)
            self.stats.preemptions += 1
        for request in plan.admitted:
            self.seats.seat(request)
        return plan

    def forward(self, plan: Plan, drafts: Drafts) -> Tensor | None:
        """Prompt slices, pending tokens and drafts in one pass; logits of what is verified."""
        feeds = [(p.request.row, p.tokens) for p in plan.prefills]
        decodes = zip(plan.decodes, drafts, strict=True)
        feeds += [(row.row, [*row.pending, *draft.tokens]) for row, draft in decodes]
        rows = [*(p.request for p in plan.prefills), *plan.decodes]
        if not feeds:
            return None
        keep = [wanted(p) for p in plan.prefills] + [1 + len(d) for d in drafts]
        started = time.perf_counter()
        logits: Tensor | None
        try:
            logits = self._target.forward(feeds, keep, greedy=all(map(greedy, rows)))
        except Exception as error:
            logits = salvage(self._target, plan, drafts, keep, error)
        else:
            if not plan.prefills:
                tokens, seconds = sum(len(t) for _, t in feeds), time.perf_counter() - started
                self._drafting.time_step(len(feeds), tokens, seconds)
        return None if logits is None else score_prompts(plan, keep, logits)

    def accept(self, plan: Plan, drafts: Drafts, logits: Tensor | None) -> None:
        """Count what was read, and verify, which gives each row the tokens that it gains."""
        for prefill in plan.prefills:
            with contained(prefill.request):
                self._count_read(prefill.request, len(prefill.tokens))
        if logits is None:
            return
        ready = [p.request for p in plan.prefills if p.last]
        requests, drafts = ready + plan.decodes, [Draft() for _ in ready] + drafts
        gains = verify(requests, drafts, logits, self._verification)
        for request, draft, tokens in zip(requests, drafts, gains, strict=True):
            with contained(request):
                self._emit(request, draft, tokens)

    def _count_read(self, request: Request, tokens: int) -> None:
        if request.fed == 0 and self._prefixes.enabled:  # looked up and not found
            self.stats.prefix_queries += len(request.prompt)
        request.fed += tokens
        self.stats.prompt_tokens += tokens
        self._prefixes.keep(request)

    def _emit(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        self.seats.rewind(request, len(request.tokens) - 1)
        request.stats.steps += 1
        self.stats.generated_tokens += len(tokens)
        if draft.tokens:
            self._record_draft(request, draft, tokens)

    def _record_draft(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        accepted = sum(map(operator.eq, tokens, draft.tokens))
        request.stats.record_draft(len(draft), accepted)
        self.stats.record_draft(len(draft), accepted)
        ended = accepted == len(tokens)  # inside the draft: nobody looked at the rest
        self._drafting.observe(request, draft.cut(accepted) if ended else draft, accepted)

    @contextmanager
    def _clock(self, plan: Plan) -> Iterator[None]:
        """Count a step; only steps without prompt slices tell the decoding speed."""
        started, before = time.perf_counter(), self.stats.generated_tokens
        drafted = self.stats.draft_tokens
        yield
        seconds, new = time.perf_counter() - started, self.stats.generated_tokens - before
        self.stats.packed_tokens = self._target.forward_tokens
        self.stats.padding_tokens = self._target.padding_tokens
        decoded = len(plan.decodes) + self.stats.draft_tokens - drafted
        self._pace.observe(decoded, sum(len(p.tokens) for p in plan.prefills), seconds)
        self.stats.record_step(seconds, len(plan.decodes), new, prompts=bool(plan.prefills))
