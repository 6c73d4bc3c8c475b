"""Starting, draining and ending the server: one HTTP process, one engine process."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from retort.errors import ConfigurationError
from retort.serve.app import Service, build_app
from retort.serve.client import EngineClient, Limits, shutting_down
from retort.serve.errors import bad
from retort.serve.messages import Configure, frame
from retort.serve.metrics import Metrics
from retort.serve.middleware import MAX_HEADER_BYTES
from retort.serve.prompts import Prompts
from retort.serve.streaming import ABORT

log = logging.getLogger("retort.serve")

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_HEADER_SECONDS = 15.0
_BODY_SECONDS = 60.0  # of bodies that no route reads; `bodies` answers earlier
_WORKER_SECONDS = 10.0


@dataclass
class ServeOptions:
    """Everything that `serve` needs to know; the command line's flags."""

    engine: Configure
    host: str = "127.0.0.1"
    port: int = 8000
    names: list[str] = field(default_factory=list)
    api_keys: list[str] = field(default_factory=list)
    chat_template: str | None = None
    limits: Limits = field(default_factory=Limits)
    request_timeout: float = 600.0
    send_timeout: float = 30.0
    shutdown_timeout: float = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on a request's time and on the size of its head."""

    _head = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first request's head."""
        super().connection_made(transport)
        self._start_clock(_HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what arrives before a head is complete."""
        self._head += len(data)
        super().data_received(data if self._head < 0 else _without_upgrade(data))
        if self._head > 2 * MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("the request's head is too large")

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors."""
        body = msgspec.json.encode(bad(msg).body)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins: let its answer cut the connection."""
        super().on_message_begin()
        self.scope[ABORT] = self._cut  # type: ignore[literal-required]
        self._start_clock(_HEADER_SECONDS)

    def on_headers_complete(self) -> None:
        """A head is complete: what follows is a body, which has limits of its own."""
        self._start_clock(_BODY_SECONDS)
        self._head = -(2**62)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next bytes are a head again."""
        self._stop_clock()
        self._head = 0
        super().on_message_complete()

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._timer = self.loop.call_later(seconds, self._cut)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _without_upgrade(data: bytes) -> bytes:
    """A head without the offer of another protocol, which a server may pass over.

    Java's client and ``curl --http2`` offer h2c with every request; the parser would take their
    body for that protocol's.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest


class DrainingServer(uvicorn.Server):
    """Ends at a signal once live requests are done, or at the latest after ``timeout`` seconds.

    While it drains it still listens, so that clients and balancers are told to go elsewhere.
    """

    def __init__(self, config: uvicorn.Config, client: EngineClient, timeout: float) -> None:
        super().__init__(config)
        self._client, self._timeout = client, timeout
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end at once."""
        if self._client.draining or self._loop is None:
            self._timeout, self.should_exit = 0.0, True
            return
        self._client.draining = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        log.info("shutting down; %d requests are finishing", self._client.rows)
        try:
            await asyncio.wait_for(self._client.idle(), self._timeout)
        except TimeoutError:
            log.warning("%d requests did not finish in time", self._client.rows)
            self._client.end_all(shutting_down())
        await asyncio.sleep(0.1)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take the address before anything slow happens.

    Raises:
        ConfigurationError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from None
    return taken


def start_worker(options: Configure) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the engine's process; returns it and our end of the socket to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "retort.serve.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    with suppress(ConnectionError):  # it died at once, which `connect` finds out
        ours.sendall(frame(options))
    return process, ours


def serve(options: ServeOptions, say: Callable[[str], None]) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        RetortError: the address, the model or an option is wrong.
    """
    with bind(options.host, options.port) as listener:
        process, connection = start_worker(options.engine)
        try:
            with asyncio.Runner(loop_factory=http_config(None).get_loop_factory()) as runner:
                return runner.run(_serve(options, listener, connection, say))
        finally:
            _end_process(process)


async def _serve(
    options: ServeOptions,
    listener: socket.socket,
    connection: socket.socket,
    say: Callable[[str], None],
) -> int:
    client = EngineClient(options.limits, Metrics(options.names[0]))
    tokenizer, ready = await asyncio.gather(
        asyncio.to_thread(_tokenizer, options), client.connect(connection)
    )
    client.metrics.capacity = ready.capacity
    service = Service(
        client,
        Prompts(tokenizer, options.chat_template),
        options.names,
        request_timeout=options.request_timeout,
        send_timeout=options.send_timeout,
        api_keys=options.api_keys,
    )
    server = DrainingServer(http_config(build_app(service)), client, options.shutdown_timeout)
    host, port = listener.getsockname()[:2]
    say(f"Serving {options.names[0]} on http://{f'[{host}]' if ':' in host else host}:{port}")
    await server.serve(sockets=[listener])
    await client.close()
    service.prompts.close()
    return 0


def http_config(app: Any) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # dictConfig would close other libraries' handlers
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


def _tokenizer(options: ServeOptions) -> Any:
    from retort.models.zoo import load_tokenizer

    return load_tokenizer(options.engine.model, trust_remote_code=options.engine.trust_remote_code)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for the engine's process; one that does not end is killed."""
    try:
        process.wait(_WORKER_SECONDS if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
