"""Server-sent events, and racing an answer against its client's disconnect.

sse-starlette is not used: it ends every stream at SIGTERM, where this server drains them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retort.serve.errors import ApiError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# Characters at which clients that read with Python's `str.splitlines` (transformers chat,
# huggingface_hub, httpx's `iter_lines`) would cut an event; JSON itself escapes the ASCII ones.
_LINE_ENDS = {mark.encode(): b"\\u%04x" % ord(mark) for mark in "\x85\u2028\u2029"}
ABORT = "retort.abort"  # scope key: closes the connection without flushing it


class Disconnected(Exception):
    """The client is gone; nobody reads the answer."""


def event(value: Any) -> bytes:
    """One event: JSON without any character that some client takes for a line's end."""
    data = msgspec.json.encode(value)
    for mark, escaped in _LINE_ENDS.items():
        data = data.replace(mark, escaped)
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends events until they end, the client leaves, or it stops reading.

    Args:
        events: bytes of one or more events each; an `ApiError` becomes a last event.
        send_timeout: seconds for one send; a client that reads nothing for so long is cut off.
        on_end: called once at the end, however it came.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        send_timeout: float,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout, self._on_end = events, send_timeout, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        try:
            await until_disconnect(receive, self._produce(send))
        except Disconnected:
            return
        except TimeoutError:
            scope.get(ABORT, lambda: None)()
        finally:
            self._on_end()

    async def _produce(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, head)
        try:
            async for data in self._events:
                await self._send(send, _body(data))
        except ApiError as error:
            await self._send(send, _body(event(error.body)))
        await self._send(send, _body(b"", more=False))

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._timeout):
            await send(message)


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        Disconnected: the client left first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
