"""A request inside the worker: what of it has been sent, and who wrote which part of its text."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from retort.decode.request import Request, RequestStats
from retort.serve.messages import Add, Delta

ACCEPTED, CORRECTED, PLAIN = "a", "c", "p"


class Row:
    """Turns the growth of an engine's request into deltas.

    Args:
        add: the request as it was asked for.
        request: its live state in the engine.
        queued: seconds that it waited.
    """

    def __init__(self, add: Add, request: Request, queued: float) -> None:
        self.add, self.request = add, request
        self._queued: float | None = queued
        self._tokens = 0
        self._characters = 0
        self._drafted = self._accepted = 0
        self._origins: list[str] = []

    def delta(self) -> Delta | None:
        """What is new since the last call, or None."""
        request, start = self.request, self._tokens
        tokens = request.output[start:]
        if not tokens and request.finish_reason is None:
            return None
        self._tokens += len(tokens)
        self._note_origins(len(tokens))
        text = "" if request.text is None else request.text.take(request.finish_reason is not None)
        return Delta(
            request.id,
            tokens,
            text,
            logprobs=request.logprobs[start:] if request.params.logprobs is not None else None,
            prompt_logprobs=self._prompt_logprobs(first=self._queued is not None),
            spans=self._spans(len(text)) if self.add.origins else None,
            finish=request.finish_reason,
            error=request.error,
            queued=self._take_queued(),
            stats=self._stats(),
        )

    def _stats(self) -> RequestStats | None:
        wanted = self.add.origins or self.request.finish_reason is not None
        return replace(self.request.stats) if wanted else None

    def _prompt_logprobs(self, first: bool) -> list[dict[int, float]] | None:
        asked = self.request.params.prompt_logprobs is not None
        return list(self.request.prompt_logprobs) if asked and first else None

    def _take_queued(self) -> float | None:
        queued, self._queued = self._queued, None
        return queued

    def _note_origins(self, new: int) -> None:
        """One step verifies one draft: its accepted tokens come first, then one of the target's."""
        stats = self.request.stats
        drafted = stats.draft_tokens - self._drafted
        accepted = stats.accepted_tokens - self._accepted
        self._drafted, self._accepted = stats.draft_tokens, stats.accepted_tokens
        last = CORRECTED if accepted < drafted else PLAIN
        self._origins += ([ACCEPTED] * accepted + [last])[:new]

    def _spans(self, characters: int) -> list[tuple[str, int]]:
        """Runs of one origin in the next ``characters`` of the text."""
        start, end = self._characters, self._characters + characters
        self._characters = end
        ends = [*self.request.text.ends, end] if self.request.text is not None else [end]
        origins = [*self._origins, self._origins[-1] if self._origins else PLAIN]
        pieces, at = [], start
        for stop, origin in zip(ends, origins, strict=False):
            if min(stop, end) > at:
                pieces.append((origin, min(stop, end) - at))
                at = min(stop, end)
        runs = groupby(pieces, key=lambda piece: piece[0])
        return [(origin, sum(n for _, n in run)) for origin, run in runs]
