"""The requests that an engine knows: passes move them on, those that end leave with an output."""

from __future__ import annotations

from collections.abc import Sequence

from retort.decode.admission import Admission
from retort.decode.outputs import output
from retort.decode.packed import PackedModel
from retort.decode.prefixes import PrefixCache
from retort.decode.request import Request, RequestOutput
from retort.decode.scheduler import Scheduler
from retort.decode.step import Step
from retort.errors import ConfigurationError, RetortError


class Roster:
    """Requests by id, from admission until they have left, and outputs that nobody has yet.

    Args:
        step: advances the rows in work.
        target, scheduler, prefixes, admission: the engine's.
        debug: check caches when idle, and poison what rows left behind.

    Attributes:
        requests: those that are waiting, in work or held.
        finished: outputs to be handed out.
    """

    def __init__(
        self,
        step: Step,
        target: PackedModel,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        admission: Admission,
        debug: bool,
    ) -> None:
        self._step, self._target, self._scheduler = step, target, scheduler
        self._prefixes, self._admission, self._debug = prefixes, admission, debug
        self.requests: dict[str, Request] = {}
        self.finished: list[RequestOutput] = []
        self._leaving: dict[str, Request] = {}  # aborted by a function that a pass called
        self._in_pass = False

    def known(self, request_id: str) -> Request:
        """A request by its id.

        Raises:
            ConfigurationError: there is none.
        """
        if request_id not in self.requests:
            raise ConfigurationError(f"no request {request_id!r}; it is finished or never was")
        return self.requests[request_id]

    def held(self, request_id: str) -> Request:
        """A finished request whose row was kept.

        Raises:
            ConfigurationError: it is none.
        """
        request = self.known(request_id)
        if not request.hold or request.finish_reason is None or request.row < 0:
            raise ConfigurationError(
                f"{request_id} cannot be rewound: only a finished request that was added with "
                "hold=True can"
            )
        return request

    def run_pass(self) -> None:
        """One step; what finishes joins `finished`."""
        self._in_pass = True
        try:
            self._step.run()
        finally:
            self._in_pass = False
        self.finished += self._retire()

    def advance(self, ids: Sequence[str]) -> list[RequestOutput]:
        """One pass; the outputs of ``ids`` that finished, the others stay in `finished`."""
        self.run_pass()
        mine = [o for o in self.finished if o.request_id in ids]
        self.finished = [o for o in self.finished if o.request_id not in ids]
        return mine

    def abort(self, request_id: str) -> RequestOutput:
        """Stop a request; within a pass it leaves when the pass has ended."""
        request = self.known(request_id)
        request.finish_reason = request.finish_reason or "abort"
        if not self._in_pass:
            return self._finish(request, hold=False)
        request.hold = False
        self._leaving[request_id] = request
        return output(request, self._admission.text(request))

    def free(self, request: Request) -> None:
        """Forget a request, and let its row go."""
        self._scheduler.remove(request)
        self.requests.pop(request.id)
        self._leaving.pop(request.id, None)
        self._step.seats.free(request)

    def check(self) -> None:
        """See `Engine.check`."""
        self._target.cache.check()
        rows = sorted(r.row for r in self.requests.values() if r.row >= 0)
        if rows != list(self._target.cache.rows):
            raise RetortError(f"the cache holds rows {self._target.cache.rows}, requests {rows}")

    def _retire(self) -> list[RequestOutput]:
        done = {r.id: r for r in self._scheduler.running if r.finish_reason is not None}
        outputs = [self._finish(r, hold=r.hold) for r in (done | self._leaving).values()]
        if self._debug:
            self._target.cache.poison()
            if self._scheduler.idle:
                self.check()
        return outputs

    def _finish(self, request: Request, hold: bool) -> RequestOutput:
        self._scheduler.remove(request)
        finished = output(request, self._admission.text(request))
        if not hold:
            if request.row >= 0 and request.error is None:
                self._prefixes.keep_finished(request)
            self.free(request)
        return finished
