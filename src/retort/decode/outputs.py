"""What callers see of a request: its output when it is finished, chunks while it grows."""

from __future__ import annotations

from dataclasses import replace

from retort.decode.request import Chunk, Request, RequestOutput


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


def chunk(request: Request, index: int, sent: dict[str, int]) -> Chunk | None:
    """What is new of a row since the last chunk, or None; ``sent`` counts its tokens by id."""
    tokens = request.tokens[sent[request.id] :]
    if not tokens and request.finish_reason is None:
        return None
    sent[request.id] = len(request.tokens)
    last = request.finish_reason is not None
    text = "" if request.text is None else request.text.take(last)
    return Chunk(index, request.id, text, tokens, request.finish_reason)
