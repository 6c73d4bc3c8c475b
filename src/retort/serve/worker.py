"""The engine's process: sole owner of the model, one loop of messages and steps.

``python -m retort.serve.worker FD`` speaks `messages` over the inherited socket ``FD``. It ends
when told to, or when the other end of the socket is gone, so that no worker outlives its server.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from retort.errors import RetortError
from retort.serve.messages import (
    Add,
    Cancel,
    Channel,
    Configure,
    Delta,
    Failed,
    Gauges,
    Ready,
    Step,
    Stop,
    ToWorker,
)
from retort.serve.rows import Row

if TYPE_CHECKING:
    from retort.decode.engine import Engine
    from retort.decode.params import SamplingParams

log = logging.getLogger("retort.serve.worker")

_DEFAULT_CONTEXT = 8192  # of models without a limit of their own


class Worker:
    """Runs one engine for one channel.

    Requests wait here, first in, first out, until a row is free.

    Args:
        engine: not used by anyone else.
        channel: where requests come from and steps go.
        options: limits.
        on_gone: called from the listening thread when the other end is gone.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        options: Configure,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.channel = engine, channel
        self._options = options
        self._max_rows = options.max_num_seqs
        self._eos = end_tokens(engine)
        self._inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._waiting: deque[tuple[Add, float]] = deque()
        self._rows: dict[str, Row] = {}
        self._stopped = False
        self._on_gone = on_gone

    def run(self) -> None:
        """Serve until told to stop."""
        threading.Thread(target=self._listen, name="retort-listen", daemon=True).start()
        self.channel.send(describe(self.engine, self._options))
        while not self._stopped:
            touched = self._take_messages()
            rejected = self._admit()
            if self._rows:
                rejected += self._step()
            if touched or rejected:
                self.channel.send(Step(rejected, self._gauges()))

    def _listen(self) -> None:
        while (message := self.channel.receive()) is not None:
            self._inbox.put(message)
        self._inbox.put(None)
        self._on_gone()

    def _take_messages(self) -> bool:
        """Take what has arrived, waiting for it when there is nothing else to do."""
        touched = not (self._rows or self._waiting)
        if touched:
            self._take(self._inbox.get())
        while not self._inbox.empty():
            self._take(self._inbox.get())
            touched = True
        return touched

    def _take(self, message: ToWorker | None) -> None:
        if isinstance(message, Add):
            self._waiting.append((message, time.monotonic()))
        elif isinstance(message, Cancel):
            self._cancel(set(message.ids))
        elif message is None or isinstance(message, Stop):
            self._stopped = True

    def _cancel(self, ids: set[str]) -> None:
        self._waiting = deque(item for item in self._waiting if item[0].id not in ids)
        for request_id in ids & self._rows.keys():
            self._rows.pop(request_id)
            self.engine.abort(request_id)

    def _admit(self) -> list[Delta]:
        """Start waiting requests while there is room; returns those that the engine refuses."""
        refused: list[Delta] = []
        while self._waiting and len(self._rows) < self._max_rows:
            add, since = self._waiting.popleft()
            try:
                self._rows[add.id] = self._start(add, time.monotonic() - since)
            except Exception as error:
                log.exception("request %s refused", add.id)
                refused.append(Delta(add.id, finish="error", error=str(error)))
        return refused

    def _start(self, add: Add, queued: float) -> Row:
        drafter = "default" if add.speculate else None
        self.engine.add_request(
            add.prompt,
            params_of(add, self._eos),
            request_id=add.id,
            drafter=drafter,
            sample=add.sample,
            prefix_group=add.prefix_group,
        )
        return Row(add, self.engine.request(add.id), queued)

    def _step(self) -> list[Delta]:
        try:
            self.engine.step()
        except Exception as error:
            log.exception("a step failed; its %d requests end", len(self._rows))
            self._fail_all(error)
        deltas = [d for row in self._rows.values() if (d := row.delta()) is not None]
        for delta in deltas:
            if delta.finish is not None:
                self._rows.pop(delta.id)
            if delta.error is not None:
                log.error("request %s failed: %s", delta.id, delta.error)
        return deltas

    def _fail_all(self, error: Exception) -> None:
        for row in self._rows.values():
            row.request.finish_reason, row.request.error = "error", str(error)
            self.engine.abort(row.add.id)

    def _gauges(self) -> Gauges:
        stats, scheduler = self.engine.stats, self.engine.scheduler
        return Gauges(
            running=len(scheduler.running),
            waiting=len(self._waiting) + len(scheduler.waiting),
            cached_tokens=sum(row.request.fed for row in self._rows.values()),
            steps=stats.steps,
            preemptions=stats.preemptions,
            packed_tokens=stats.packed_tokens,
            drafts=stats.drafts,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            accepted_per_position=stats.accepted_per_position,
        )


def build_engine(options: Configure) -> Engine:
    """Load the model and warm it up, so that the first request meets a measured engine.

    Raises:
        RetortError: the model or the drafter cannot be served.
    """
    from retort.decode.engine import Engine
    from retort.decode.stats import EngineStats

    engine = Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        drafter=options.drafter,
        draft_budget=options.draft_budget,
        max_batch_size=options.max_num_seqs,
        max_prefill_tokens=options.max_prefill_tokens,
        prefill_stretch=options.prefill_stretch,
        max_cached_tokens=options.max_cache_tokens,
        prefix_cache_tokens=options.prefix_cache_tokens,
        cpu_backend=options.cpu_backend,
    )
    engine.generate([[0, 1] * 4], max_new_tokens=8, ignore_eos=True)
    engine.stats = EngineStats()
    engine.prefixes.clear()
    return engine


def main(descriptor: int) -> int:
    """Run the worker on an inherited socket; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server says when to stop
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    options = channel.receive()
    if not isinstance(options, Configure):
        return 1
    try:
        worker = Worker(build_engine(options), channel, options, on_gone=lambda: os._exit(0))
    except RetortError as error:
        channel.send(Failed(str(error), user=True))
        return 2
    except Exception as error:
        log.exception("the engine could not be built")
        channel.send(Failed(f"{type(error).__name__}: {error}", user=False))
        return 1
    worker.run()
    return 0


def describe(engine: Engine, options: Configure) -> Ready:
    """What the HTTP process must know of an engine."""
    longest = context_of(engine, options)
    return Ready(
        vocab_size=engine.model.config.get_text_config().vocab_size,
        max_model_len=longest,
        capacity=options.max_cache_tokens or options.max_num_seqs * longest,
        speculates=engine.drafting.default is not None,
        backend=engine.target.backend.name,
    )


def context_of(engine: Engine, options: Configure) -> int:
    """The longest prompt with its completion that can be served."""
    from retort.decode.support import max_length

    own = max_length(engine.model.config)
    given = options.max_model_len or own or _DEFAULT_CONTEXT
    limits = (given, own, options.max_cache_tokens)
    return min(limit for limit in limits if limit is not None)


def end_tokens(engine: Engine) -> list[int]:
    """Ids that end a row where a request names none."""
    model = engine.model
    configs = (getattr(model, "generation_config", None), model.config.get_text_config())
    given = (getattr(config, "eos_token_id", None) for config in configs)
    found: int | list[int] = next((eos for eos in given if eos is not None), [])
    return [found] if isinstance(found, int) else list(found)


def params_of(add: Add, eos: list[int]) -> SamplingParams:
    """Stop ids end a row even where the model's own end token is ignored."""
    if not add.stop_token_ids:
        return add.sampling.params()
    ends = [*([] if add.sampling.ignore_eos else eos), *add.stop_token_ids]
    return replace(add.sampling.params(), eos_token_id=ends, ignore_eos=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(int(sys.argv[1])))
