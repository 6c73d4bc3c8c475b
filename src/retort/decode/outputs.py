"""What callers see of a request: its output when it is finished, chunks while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retort.decode.request import Chunk, Request, RequestOutput
from retort.errors import RetortError


def output(request: Request, text: str) -> RequestOutput:
    """The output of a request that ends now, with its whole text."""
    params = request.params
    return RequestOutput(
        index=request.index,
        request_id=request.id,
        prompt_token_ids=list(request.prompt),
        token_ids=request.output,
        text=text,
        finish_reason=request.finish_reason,
        stats=replace(request.stats),
        logprobs=None if params.logprobs is None else list(request.logprobs),
        error=request.error,
        prompt_logprobs=None if params.prompt_logprobs is None else list(request.prompt_logprobs),
        sample=request.sample,
    )


def require_whole(outputs: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
    """``outputs``, where none of them failed: for callers that do not tell of each.

    Raises:
        RetortError: a row ended in an error; its number and the error are named.
    """
    for found in outputs:
        if found.finish_reason == "error":
            raise RetortError(f"row {found.index} (from 0) failed: {found.error}")
    return outputs


def chunk(request: Request, index: int, sent: dict[str, int]) -> Chunk | None:
    """What is new of a row since the last chunk, or None; ``sent`` counts its tokens by id."""
    tokens = request.tokens[sent[request.id] :]
    if not tokens and request.finish_reason is None:
        return None
    sent[request.id] = len(request.tokens)
    last = request.finish_reason is not None
    text = "" if request.text is None else request.text.take(last)
    return Chunk(index, request.id, text, tokens, request.finish_reason)
