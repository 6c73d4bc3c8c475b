"""Pure ASGI middleware: refused bodies, request ids, header limits, the API key."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retort.serve.errors import ApiError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
LINGER = 5.0  # seconds for which the rest of a refused body is read and dropped
OPEN_PATHS = ("/health",)
KEY = "retort.key"  # scope: which of the keys let the request in

_ID = re.compile(rb"[\w.-]{1,64}")


class RefusedBodies:
    """Reads what a client is still sending before it is told an error.

    A socket closed with unread input is reset, and a reset takes the answer with it before a client
    that writes first and reads afterwards has seen it. A client that asks first has sent nothing,
    and one that was too slow has had its time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        more = scope["type"] == "http" and _header(scope, b"expect").lower() != b"100-continue"

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = more and bool(message.get("more_body"))
            return message

        async def after_the_body(message: Message) -> None:
            refused = message["type"] == "http.response.start" and message["status"] >= 400
            if refused and message["status"] != 408:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        while more:
                            await counted()
            await send(message)

        await self._app(scope, counted, after_the_body)


class RequestIds:
    """Puts ``x-request-id`` on every answer: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(16).encode()

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, tagged)


class HeaderLimits:
    """Refuses requests with many or large headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        headers = scope.get("headers", [])
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            await error_response(ApiError(431, "the request's headers are too large"))(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets requests in that carry one of the keys; without keys, all.

    A key comes as ``Authorization: Bearer KEY``, or as the password of Basic authentication, which
    is how a browser opens the playground.

    Args:
        keys: compared in constant time.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        guarded = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        number = self._number(_credential(scope)) if guarded and self._digests else None
        if guarded and self._digests and number is None:
            response = error_response(
                ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            )
            scheme = "Basic" if scope["path"] == "/" else "Bearer"
            response.headers["www-authenticate"] = f'{scheme} realm="retort"'
            await response(scope, receive, send)
            return
        await self._app({**scope, KEY: number}, receive, send)

    def _number(self, key: bytes) -> int | None:
        """Which key it is, found in the same time whichever it is; None for none."""
        given = _digest(key)
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        return same.index(True) if any(same) else None


def error_response(error: ApiError) -> Response:
    """An error as an HTTP answer."""
    body = msgspec.json.encode(error.body)
    return Response(body, error.status, error.headers, media_type="application/json")


def _credential(scope: Scope) -> bytes:
    scheme, _, value = _header(scope, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
