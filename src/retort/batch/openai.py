"""OpenAI's batch format: ``custom_id``, ``method``, ``url``, ``body``, answered as a server does.

Bodies are read, checked and answered by the server's own code, without a server.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any

import msgspec

import retort
from retort.batch.rows import Answer, BadLine, Item, Part, asked, key
from retort.decode.engine import Engine
from retort.decode.request import RequestOutput
from retort.serve.answers import Formatter
from retort.serve.errors import ApiError, bad, engine_fault
from retort.serve.jobs import Job, Jobs
from retort.serve.messages import Configure, Delta
from retort.serve.prompts import Prompts
from retort.serve.protocol import ChatRequest, CompletionRequest, parse
from retort.serve.worker import describe, end_tokens, params_of

_KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_ROWS = 1024  # most completions of one line


@dataclass(frozen=True)
class _Place:
    """Where an answer belongs: the line's own id, and the hash of what it asked."""

    custom_id: str
    asked: str

    def row(self, status: int, body: Any) -> Answer:
        """An output line; its id repeats what was asked."""
        response = {"status_code": status, "request_id": f"req-{self.custom_id}", "body": body}
        ids = {"id": f"batch-{self.asked}", "custom_id": self.custom_id}
        return {**ids, "response": response, "error": None}

    def error(self, error: ApiError) -> Answer:
        """The output line of a request that the server would refuse."""
        return self.row(error.status, error.body)


class OpenAIBatch:
    """Makes items of lines in OpenAI's batch format.

    A request without a seed gets one from its ``custom_id``, so that a run which was killed and
    one which was not give the same answers.

    Args:
        engine: tells vocabulary and context; its tokenizer is used.
        name: of the model in answers; what ``body.model`` says is not looked at.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._name = name
        self._prompts = Prompts(engine.tokenizer)
        self._eos = end_tokens(engine)
        self._jobs = Jobs(describe(engine, Configure(name)), self._prompts, _ROWS)
        self._loop = asyncio.Runner()

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._loop.close()
        self._prompts.close()

    def item(self, number: int, row: dict[str, Any]) -> Item | BadLine:
        """The item of one row; a body that the server would refuse is answered with its error."""
        custom_id = row.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            return BadLine(number, "has no custom_id")
        known = isinstance(row["url"], str) and row["url"] in _KINDS
        if row.get("method", "POST") != "POST" or not known:
            return BadLine(number, f"is not a POST to {' or '.join(_KINDS)}")
        place = _Place(custom_id, asked(json.dumps([row["url"], row["body"]], sort_keys=True)))
        try:
            job = self._loop.run(self._job(_KINDS[row["url"]], custom_id, row["body"]))
        except ApiError as error:
            told = place.error(error)
            return Item(number, key(custom_id), [], lambda _: told, True, place.asked)
        parts = [
            Part(
                add.prompt,
                params_of(add, self._eos),
                add.sample,
                "default" if add.speculate else None,
            )
            for add in job.adds
        ]
        return Item(
            number,
            key(custom_id),
            parts,
            lambda outputs: self._answer(place, job, outputs),
            errors_are_rows=True,
            asked=place.asked,
        )

    async def _job(self, kind: Any, custom_id: str, body: Any) -> Job:
        spec = parse(json.dumps(body).encode(), kind)
        if spec.seed is None:
            spec = msgspec.structs.replace(
                spec, seed=zlib.crc32(custom_id.encode("utf-8", "surrogatepass"))
            )
        if spec.stream:
            raise bad("stream: a line of a batch has one answer", "stream", "unsupported")
        if isinstance(spec, ChatRequest):
            return await self._jobs.chat(spec)
        return await self._jobs.completion(spec)

    def _answer(self, place: _Place, job: Job, outputs: list[RequestOutput]) -> Answer:
        if any(output.finish_reason == "error" for output in outputs):
            return place.error(engine_fault())
        job.created = int(time.time())
        name = f"retort-{retort.__version__}"
        formatter = Formatter(job, self._name, self._prompts, name)
        for add, output in zip(job.adds, outputs, strict=True):
            delta = _delta(add.id, output)
            formatter.choice(delta).grow(delta)
        return place.row(200, msgspec.to_builtins(formatter.whole()))


def _delta(request_id: str, output: RequestOutput) -> Delta:
    return Delta(
        request_id,
        list(output.token_ids),
        output.text,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        finish=output.finish_reason,
        stats=replace(output.stats),
    )
