"""The HTTP process's side of the engine: admission, the streams of live requests, cancellation."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from retort.errors import ConfigurationError, RetortError
from retort.serve.errors import ApiError, bad, engine_fault
from retort.serve.messages import (
    Add,
    Cancel,
    Delta,
    Failed,
    Gauges,
    Ready,
    Step,
    Stop,
    frame,
    read_from_worker,
)
from retort.serve.metrics import Metrics

log = logging.getLogger("retort.serve")


@dataclass(frozen=True)
class Limits:
    """How much is let in.

    Attributes:
        max_num_seqs: rows that decode at once.
        max_num_queued_reqs: rows that may wait beside them; each of ``n`` counts.
        max_queued_tokens: prompt and completion tokens of all rows let in, None for no limit.
    """

    max_num_seqs: int = 16
    max_num_queued_reqs: int = 256
    max_queued_tokens: int | None = None

    @property
    def rows(self) -> int:
        """Rows that may be in the server at once."""
        return self.max_num_seqs + self.max_num_queued_reqs


class Generation:
    """The deltas of one client's request, all its choices merged; leaving it cancels the rest.

    Use as ``async with client.submit(adds) as generation: async for delta in generation: ...``.
    """

    def __init__(self, client: EngineClient, adds: Sequence[Add]) -> None:
        self._client = client
        self._queue: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self.live = {add.id for add in adds}
        self.tokens = sum(_size(add) for add in adds)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Deltas as they come, those that arrived together in one list, until all choices end.

        Raises:
            ApiError: the engine failed on a choice, died, or the server shuts down.
        """
        while self.live or not self._queue.empty():
            found = [await self._queue.get()]
            while not self._queue.empty():
                found.append(self._queue.get_nowait())
            deltas = [item for item in found if isinstance(item, Delta)]
            if deltas:
                yield deltas
            fault = next((item for item in found if isinstance(item, ApiError)), None)
            if fault is not None:
                raise fault

    def put(self, item: Delta | ApiError) -> None:
        """Hand over what the engine said, or why there will be no more."""
        if isinstance(item, Delta) and item.finish is not None:
            self.live.discard(item.id)
        if isinstance(item, Delta) and item.finish == "error":
            item = engine_fault()
        self._queue.put_nowait(item)

    def close(self) -> None:
        """Cancel the choices that have not ended; safe to call again."""
        self._client.forget(self)


@dataclass
class EngineClient:
    """Owns the connection to the worker.

    Attributes:
        ready: what the engine said of itself.
        gauges: its state after the last step.
        fault: why the engine is dead, or None.
        draining: no new requests are let in.
    """

    limits: Limits
    metrics: Metrics
    ready: Ready | None = None
    gauges: Gauges = field(default_factory=Gauges)
    fault: str | None = None
    draining: bool = False
    _live: dict[str, Generation] = field(default_factory=dict)
    _tokens: int = 0
    _seconds: float = 1.0
    _writer: asyncio.StreamWriter | None = None
    _listener: asyncio.Task[None] | None = None

    async def connect(self, connection: socket.socket) -> Ready:
        """Wait until the worker's engine stands.

        Raises:
            ConfigurationError: the engine refuses what the user asked for.
            RetortError: it could not be built.
        """
        reader, self._writer = await asyncio.open_connection(sock=connection)
        first = await read_from_worker(reader)
        if isinstance(first, Failed):
            raise (ConfigurationError if first.user else RetortError)(first.message)
        if not isinstance(first, Ready):
            raise RetortError("the engine process ended before it was ready; see its messages")
        self.ready = first
        self._listener = asyncio.create_task(self._listen(reader))
        return first

    @property
    def alive(self) -> bool:
        """Whether the engine can take requests."""
        return self.ready is not None and self.fault is None

    @property
    def rows(self) -> int:
        """Rows let in and not yet ended."""
        return len(self._live)

    def submit(self, adds: Sequence[Add]) -> Generation:
        """Let a request in, with all its choices or not at all.

        Raises:
            ApiError: 400 for more than can ever be let in, 429 for more than can be now, 503 when
                the engine is dead or the server shuts down.
        """
        self._check_open()
        self._check_room(adds)
        generation = Generation(self, adds)
        self._tokens += generation.tokens
        for add in adds:
            self._live[add.id] = generation
            self._send(add)
        return generation

    def forget(self, generation: Generation) -> None:
        """Cancel what is left of a generation."""
        ids = [i for i in generation.live if i in self._live]
        for request_id in ids:
            self._live.pop(request_id)
        self._tokens -= generation.tokens
        generation.tokens = 0
        generation.live.clear()
        if ids and self.alive:
            self.metrics.finished("abort", len(ids))
            self._send(Cancel(ids))

    def end_all(self, error: ApiError) -> None:
        """End every live request with an error."""
        for generation in set(self._live.values()):
            generation.put(error)
            self.forget(generation)

    async def idle(self) -> None:
        """Wait until no request is live."""
        while self._live:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Tell the worker to end and close the connection."""
        self._send(Stop())
        if self._listener is not None:
            self._listener.cancel()
        if self._writer is not None:
            self._writer.close()

    def observe(self, seconds: float) -> None:
        """A request took this long: what `Retry-After` is made of."""
        self._seconds += 0.2 * (seconds - self._seconds)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await read_from_worker(reader)) is not None:
            if isinstance(message, Step):
                self._take(message)
        self.fault = "the engine process ended"
        log.error("%s; %d requests end with it", self.fault, len(self._live))
        self.end_all(_dead())

    def _take(self, step: Step) -> None:
        self.metrics.step(self.gauges, step.gauges)
        self.gauges = step.gauges
        for delta in step.deltas:
            generation = self._live.get(delta.id)
            if generation is None:  # cancelled while the step ran
                continue
            if delta.finish is not None:
                self._live.pop(delta.id)
            if delta.finish == "error":  # no client sees it as a delta, so it is counted here
                self.metrics.finished("error")
            generation.put(delta)

    def _send(self, message: Add | Cancel | Stop) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    def _check_open(self) -> None:
        if self.draining:
            raise shutting_down()
        if not self.alive:
            raise _dead()

    def _check_room(self, adds: Sequence[Add]) -> None:
        tokens, most = sum(_size(add) for add in adds), self.limits.max_queued_tokens
        if len(adds) > self.limits.rows or (most is not None and tokens > most):
            raise bad(
                f"{len(adds)} completions of {tokens} tokens in all are more than this server "
                "takes at once; send fewer",
                "n",
            )
        full = most is not None and self._tokens + tokens > most
        if full or len(self._live) + len(adds) > self.limits.rows:
            raise ApiError(
                429,
                "the server is full; try again later",
                code="overloaded",
                retry_after=self._retry_after(),
            )

    def _retry_after(self) -> int:
        rounds = len(self._live) / self.limits.max_num_seqs / 4
        return max(1, min(30, round(self._seconds * rounds)))


class Stopwatch:
    """Times of one request, for the metrics."""

    def __init__(self, metrics: Metrics, client: EngineClient) -> None:
        self._metrics, self._client = metrics, client
        self._start = time.monotonic()
        self._last: dict[str, float] = {}

    def delta(self, delta: Delta) -> None:
        """A choice gained tokens or ended."""
        now, last = time.monotonic(), self._last.get(delta.id)
        if delta.queued is not None:
            self._metrics.queued(delta.queued)
        if delta.tokens and last is None:
            self._metrics.first_token(now - self._start)
        elif delta.tokens and last is not None:
            self._metrics.next_tokens(now - last)
        self._metrics.generated(len(delta.tokens))
        self._last[delta.id] = now
        if delta.finish is not None:
            self._metrics.finished(delta.finish)
            self._metrics.request(now - self._start)
            self._client.observe(now - self._start)


def shutting_down() -> ApiError:
    """The server ends: clients may try another one, or this one again later."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)


def _dead() -> ApiError:
    return ApiError(503, "the engine is not running", code="engine_dead", retry_after=10)


def _size(add: Add) -> int:
    return len(add.prompt) + add.sampling.max_new_tokens
