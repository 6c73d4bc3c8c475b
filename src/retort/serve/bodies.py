"""Reading request bodies, with limits on size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from retort.serve.errors import ApiError, bad
from retort.serve.streaming import Disconnected

MAX_BODY = 4 * 2**20
SECONDS = 30.0


async def read_body(request: Request, most: int = MAX_BODY, seconds: float = SECONDS) -> bytes:
    """The body of a JSON request.

    Raises:
        ApiError: 400 for another content type, 413 for too large, 408 for too slow.
        Disconnected: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise bad("the content type must be application/json")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(seconds):
            return await _gather(request, most)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", retry=False) from None
    except ClientDisconnect:
        raise Disconnected from None


async def _gather(request: Request, most: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes")
