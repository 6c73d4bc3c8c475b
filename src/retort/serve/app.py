"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import retort
from retort.serve.answers import Formatter
from retort.serve.bodies import read_body
from retort.serve.client import EngineClient, Generation, Stopwatch
from retort.serve.errors import ApiError, bad
from retort.serve.jobs import Job, Jobs
from retort.serve.metrics import CONTENT_TYPE
from retort.serve.middleware import (
    KEY,
    ApiKeys,
    HeaderLimits,
    RefusedBodies,
    RequestIds,
    error_response,
)
from retort.serve.openapi import document
from retort.serve.playground import page
from retort.serve.prompts import Prompts
from retort.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    TokenizeRequest,
    parse,
)
from retort.serve.streaming import DONE, Disconnected, EventStream, event, until_disconnect


@dataclass
class Service:
    """What the routes need.

    Attributes:
        client: the engine.
        prompts: its tokenizer.
        names: the names under which the model is served, the first in answers.
        request_timeout: seconds for a request; a request's ``timeout`` may only shorten it.
        send_timeout: seconds after which a client that reads nothing is cut off.
        api_keys: without any, everyone is let in.
    """

    client: EngineClient
    prompts: Prompts
    names: list[str]
    request_timeout: float = 600.0
    send_timeout: float = 30.0
    api_keys: list[str] = field(default_factory=list)
    started: int = field(default_factory=lambda: int(time.time()))

    def jobs(self, request: Request) -> Jobs:
        """Makes a client's jobs for the engine; every API key has kept prefixes of its own.

        Raises:
            ApiError: 503 while there is no engine.
        """
        if self.client.ready is None:
            raise ApiError(503, "the engine is not running", code="engine_dead", retry_after=10)
        key = str(request.scope.get(KEY))
        return Jobs(self.client.ready, self.prompts, self.client.limits.rows, key)

    # Routes
    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        spec = await self._read(request, CompletionRequest)
        return await self._answer(request, await self.jobs(request).completion(spec))

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        spec = await self._read(request, ChatRequest)
        return await self._answer(request, await self.jobs(request).chat(spec))

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: ids of a text or of a conversation."""
        spec = await self._read(request, TokenizeRequest)
        if (spec.prompt is None) == (spec.messages is None):
            raise bad("give either prompt or messages")
        if spec.messages is not None:
            ids = await self.prompts.chat(spec.messages)
        else:
            ids = await self.prompts.text(spec.prompt or "", spec.add_special_tokens is not False)
        ready = self.client.ready
        most = ready.max_model_len if ready is not None else None
        return _json({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return _json({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{name}``."""
        name = request.path_params["name"]
        self._check_model(name)
        return _json(self._model(name))

    async def load_model(self, request: Request) -> Response:
        """``POST /load_model``: `transformers chat` asks so; the model is loaded or unknown."""
        spec = parse(await read_body(request), LoadRequest)
        self._check_model(spec.model)

        async def ready() -> AsyncIterator[bytes]:
            yield event({"status": "ready", "model": spec.model, "cached": True})

        return EventStream(ready(), self.send_timeout)

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while requests are answered, 503 otherwise."""
        if self.client.draining:
            return _json({"status": "shutting down"}, 503)
        if not self.client.alive:
            return _json({"status": "the engine is not running"}, 503)
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return _json({"version": retort.__version__})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics`` for Prometheus."""
        return Response(self.client.metrics.text(), media_type=CONTENT_TYPE)

    async def schema(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return _json(document())

    async def playground(self, request: Request) -> Response:
        """``GET /``."""
        content, policy = page()
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
        return Response(content, headers=headers, media_type="text/html")

    # Details
    async def _read(self, request: Request, kind: type[Any]) -> Any:
        spec = parse(await read_body(request), kind)
        if spec.model is not None:
            self._check_model(spec.model)
        return spec

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; served: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    def _model(self, name: str) -> dict[str, Any]:
        ready = self.client.ready
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "retort",
            "max_model_len": ready.max_model_len if ready is not None else None,
        }

    async def _answer(self, request: Request, job: Job) -> Response:
        job.created = int(time.time())
        fingerprint = f"retort-{retort.__version__}"
        formatter = Formatter(job, self.names[0], self.prompts, fingerprint)
        watch = Stopwatch(self.client.metrics, self.client)
        generation = self.client.submit(job.adds)
        self.client.metrics.prompt(sum(len(p) for p in job.prompts))
        if job.spec.stream:
            events = self._events(job, generation, formatter, watch)
            return EventStream(events, self.send_timeout, generation.close)
        with _closing(generation):
            work = self._whole(job, generation, formatter, watch)
            return _json(await until_disconnect(request.receive, work))

    async def _whole(
        self, job: Job, generation: Generation, formatter: Formatter, watch: Stopwatch
    ) -> dict[str, Any]:
        async with _Deadline(self._seconds(job)):
            async for deltas in generation.batches():
                for delta in deltas:
                    watch.delta(delta)
                    formatter.choice(delta).grow(delta)
        return formatter.whole()

    async def _events(
        self, job: Job, generation: Generation, formatter: Formatter, watch: Stopwatch
    ) -> AsyncIterator[bytes]:
        deadline = time.monotonic() + self._seconds(job)
        batches = generation.batches()
        while True:
            async with _Deadline(deadline - time.monotonic()):
                deltas = await anext(batches, None)
            if deltas is None:
                break
            for delta in deltas:
                watch.delta(delta)
            chunks = (formatter.chunk(delta) for delta in deltas)
            if data := b"".join(event(chunk) for chunk in chunks if chunk is not None):
                yield data
        if job.spec.usage_chunk:
            yield event(formatter.usage_chunk())
        yield DONE

    def _seconds(self, job: Job) -> float:
        return min(job.spec.timeout or self.request_timeout, self.request_timeout)


def build_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/load_model", service.load_model),
        ("GET", "/health", service.health),
        ("GET", "/version", service.version),
        ("GET", "/metrics", service.metrics),
        ("GET", "/openapi.json", service.schema),
        ("GET", "/", service.playground),
    ]
    inner = Starlette(
        routes=[Route(path, handler, methods=[method]) for method, path, handler in routes],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Disconnected: _disconnected,
            Exception: _own_fault,
        },
    )
    return RefusedBodies(RequestIds(HeaderLimits(ApiKeys(inner, service.api_keys))))


class _Deadline:
    """A time limit whose end is an answer that SDKs do not repeat."""

    def __init__(self, seconds: float) -> None:
        self._timeout = asyncio.timeout(max(seconds, 0.0))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise ApiError(
                408, "the request's time is over", code="deadline", retry=False
            ) from None


class _closing:
    """Cancels what is left of a generation at the end of a block."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._generation.close()


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    response = error_response(ApiError(error.status_code, f"{error.detail}: {asked}"))
    response.headers.update(error.headers or {})
    return response


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _own_fault(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed on this request", code="internal"))
