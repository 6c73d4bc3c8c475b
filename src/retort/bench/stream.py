"""One streamed HTTP request with as little work as possible between the bytes and the clock.

A load generator shares its machine with the server that it measures; a parser in C and one pass
over the events keep it from being what is measured.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from retort.errors import ConfigurationError

OnEvent = Callable[[dict[str, Any]], None]

_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it wants."""

    host: str
    port: int
    tls: bool = False
    base: str = ""
    key: str | None = None

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Address:
        """From ``http://host:port``, with or without a path such as ``/v1`` behind it.

        Raises:
            ConfigurationError: not such a URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigurationError(f"--base-url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"--base-url {url!r} is not like http://127.0.0.1:8000")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, parts.scheme == "https", base, key)

    def request(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST, after which the connection closes."""
        lines = [
            f"POST {self.base}{path} HTTP/1.1",
            f"host: {self.host}:{self.port}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if self.key:
            lines.append(f"authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode() + body


async def post(
    address: Address,
    path: str,
    body: dict[str, Any],
    on_event: OnEvent,
    timeout: float | None = None,
) -> str | None:
    """Send a request and hand over its events as they arrive.

    Args:
        timeout: seconds until an answer that has not ended is given up; None waits for ever.

    Returns:
        None, or what went wrong: the server's error, or how the connection failed.
    """
    reading = _Reading(on_event)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=True if address.tls else None
            )
            writer.write(address.request(path, msgspec.json.encode(body)))
            while data := await reader.read(65536):
                reading.feed(data)
    except TimeoutError:
        return f"no end after {timeout:g} seconds"
    except (OSError, httptools.HttpParserError, msgspec.DecodeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    return reading.fault()


@dataclass
class _Reading:
    """What has come of one answer; httptools calls ``on_body``."""

    on_event: OnEvent
    body: bytes = b""
    failed: str | None = None
    done: bool = False
    parser: Any = field(init=False)

    def __post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Bytes from the socket."""
        self.parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """A part of the body: the events that it completes are handed over."""
        self.body += data
        if self.parser.get_status_code() != 200:
            return
        *whole, self.body = _BLANK.split(self.body)
        for part in whole:
            self._event(_data(part))

    def _event(self, data: bytes) -> None:
        if not data:  # a comment, such as those that keep a connection alive
            return
        if data == b"[DONE]":
            self.done = True
            return
        event = msgspec.json.decode(data)
        if "error" in event:
            self.failed = str(event["error"].get("message", "error"))
        else:
            self.on_event(event)

    def fault(self) -> str | None:
        """What went wrong, once the answer has ended."""
        status = self.parser.get_status_code()
        if status != 200:
            return f"HTTP {status}: {self.body.decode('utf-8', 'replace')[:300]}"
        return self.failed or (None if self.done else "the stream ended before its end")


def _data(event: bytes) -> bytes:
    """The data lines of a server-sent event; comments and other fields say nothing here."""
    lines = (line for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)
