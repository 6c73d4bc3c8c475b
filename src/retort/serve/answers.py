"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import Any

from retort.decode.request import RequestStats
from retort.serve.jobs import Job
from retort.serve.messages import Delta, Entry
from retort.serve.prompts import Prompts
from retort.serve.protocol import ChatRequest, CompletionRequest

_LEAST = -9999.0  # JSON has no infinity

Answer = dict[str, Any]


class Choice:
    """One completion as it grows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[Entry] = []
        self.prompt_logprobs: list[Entry] = []
        self.finish: str | None = None
        self.stats = RequestStats()
        self.started = False
        self.offset = 0  # characters that the log-probabilities' tokens have spelled so far
        self._spelled = getincrementaldecoder("utf-8")("replace")

    def grow(self, delta: Delta) -> None:
        """Add what one step gave."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs += delta.prompt_logprobs or []
        self.finish = delta.finish or self.finish
        self.stats = delta.stats or self.stats

    def spell(self, data: bytes) -> int:
        """Where in the text a token begins: in the character that it continues, if any.

        Half a character moves nothing until another token shows that it stays half, one ``U+FFFD``.
        """
        half = self._spelled.getstate()[0]
        start = self.offset + (not _goes_on(half, data[:1]))
        self.offset += len(self._spelled.decode(data))
        return start


class Formatter:
    """Writes the answers of one job.

    Args:
        job: what was asked.
        model: the served name.
        prompts: turns ids into text.
        fingerprint: names what serves.
    """

    def __init__(self, job: Job, model: str, prompts: Prompts, fingerprint: str) -> None:
        self._job, self._prompts = job, prompts
        self._chat = isinstance(job.spec, ChatRequest)
        self._base = {
            "id": job.id,
            "created": job.created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.choices = [Choice(index) for index in range(len(job.adds))]

    def choice(self, delta: Delta) -> Choice:
        """The choice that a delta belongs to."""
        return self.choices[self._job.positions[delta.id]]

    def whole(self) -> Answer:
        """The answer to a request that does not stream."""
        shape = self._whole_chat if self._chat else self._whole_completion
        return {
            **self._base,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [shape(choice) for choice in self.choices],
            "usage": self.usage(),
        }

    def chunk(self, delta: Delta) -> Answer | None:
        """The event that tells a client of one step, or None where it would be empty."""
        choice = self.choice(delta)
        choice.grow(delta)
        first, choice.started = not choice.started, True
        shown = (delta.text, delta.logprobs, delta.finish, delta.spans)
        if not any(shown) and not (first and (self._chat or self._job.echoes is not None)):
            choice.started = not first
            return None
        shape = self._chat_piece(choice, delta, first) if self._chat else None
        body = shape or self._completion_piece(choice, delta, first)
        if self._job.spec.origins:
            body["retort"] = {"spans": delta.spans or [], **_speculation(choice.stats)}
        return self._event([{"index": choice.index, **body, "finish_reason": delta.finish}])

    def usage_chunk(self) -> Answer:
        """The last event of a stream that was asked for its usage."""
        return {**self._event([]), "usage": self.usage()}

    def usage(self) -> Answer:
        """Token counts; each prompt counts once, whatever ``n`` is."""
        prompt = sum(len(p) for p in self._job.prompts)
        completion = sum(len(c.tokens) for c in self.choices)
        stats = _sum(c.stats for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached()},
            "completion_tokens_details": {
                "accepted_prediction_tokens": stats.accepted_tokens,
                "rejected_prediction_tokens": stats.draft_tokens - stats.accepted_tokens,
                **_speculation(stats),
            },
        }

    def _cached(self) -> int:
        """Prompt tokens that were not read again; a prompt of several choices counts once."""
        n = self._job.spec.choices
        firsts = (self.choices[i : i + n] for i in range(0, len(self.choices), n))
        return sum(min(c.stats.cached_tokens for c in group) for group in firsts)

    def _event(self, choices: list[Answer]) -> Answer:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        event = {**self._base, "object": kind, "choices": choices}
        return {**event, "usage": None} if self._job.spec.usage_chunk else event

    def _whole_chat(self, choice: Choice) -> Answer:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._chat_logprobs(choice.tokens, choice.logprobs),
            "finish_reason": choice.finish,
        }

    def _whole_completion(self, choice: Choice) -> Answer:
        return {
            "index": choice.index,
            "text": self._echo(choice) + choice.text,
            "logprobs": self._logprobs(choice, choice.tokens, choice.logprobs, first=True),
            "finish_reason": choice.finish,
        }

    def _chat_piece(self, choice: Choice, delta: Delta, first: bool) -> Answer:
        said: Answer = {"role": "assistant", "content": delta.text} if first else {}
        if delta.text:
            said["content"] = delta.text
        return {"delta": said, "logprobs": self._chat_logprobs(delta.tokens, delta.logprobs)}

    def _completion_piece(self, choice: Choice, delta: Delta, first: bool) -> Answer:
        return {
            "text": (self._echo(choice) if first else "") + delta.text,
            "logprobs": self._logprobs(choice, delta.tokens, delta.logprobs, first),
        }

    def _echo(self, choice: Choice) -> str:
        echoes = self._job.echoes
        return "" if echoes is None else echoes[choice.index // self._job.spec.choices]

    def _chat_logprobs(self, tokens: Sequence[int], entries: list[Entry] | None) -> Answer | None:
        spec = self._job.spec
        if not isinstance(spec, ChatRequest) or not spec.logprobs:
            return None
        most = spec.top_logprobs or 0
        content = [
            {**self._token(t, e[t]), "top_logprobs": [self._token(*p) for p in _best(e, most)]}
            for t, e in zip(tokens, entries or [], strict=False)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Answer:
        pieces = self._prompts.pieces
        return {
            "token": pieces.text(token),
            "logprob": max(logprob, _LEAST),
            "bytes": list(pieces.data(token)),
        }

    def _logprobs(
        self, choice: Choice, tokens: Sequence[int], entries: list[Entry] | None, first: bool
    ) -> Answer | None:
        """Completions' parallel lists, the prompt's tokens first where it is echoed."""
        spec = self._job.spec
        if not isinstance(spec, CompletionRequest) or spec.logprobs is None:
            return None
        pieces, rows, offsets = self._prompts.pieces, list[tuple[int, Entry | None]](), list[int]()
        if first and self._job.echoes is not None:
            prompt = self._job.prompts[choice.index // spec.choices]
            rows = list(zip(prompt, [None, *choice.prompt_logprobs], strict=False))
            offsets = [choice.spell(pieces.data(t)) for t, _ in rows]
        rows += list(zip(tokens, entries or [], strict=False))
        offsets += [choice.spell(pieces.shown(t)) for t, _ in rows[len(offsets) :]]
        return {**self._lists(rows, spec.logprobs), "text_offset": offsets}

    def _lists(self, rows: list[tuple[int, Entry | None]], most: int) -> Answer:
        pieces = self._prompts.pieces
        return {
            "tokens": [pieces.text(t) for t, _ in rows],
            "token_logprobs": [None if e is None else max(e[t], _LEAST) for t, e in rows],
            "top_logprobs": [None if e is None else self._top(t, e, most) for t, e in rows],
        }

    def _top(self, token: int, entry: Entry, most: int) -> dict[str, float]:
        """The token itself and the best alternatives, as completions give them."""
        kept = [*_best(entry, most), (token, entry[token])]
        return {self._prompts.pieces.text(t): max(value, _LEAST) for t, value in kept}


def _goes_on(half: bytes, byte: bytes) -> bool:
    """Whether ``byte`` continues the first bytes of a character, or there are none."""
    try:
        getincrementaldecoder("utf-8")().decode(half + byte)
    except UnicodeDecodeError:
        return not half
    return True


def _best(entry: Entry, most: int) -> list[tuple[int, float]]:
    return sorted(entry.items(), key=lambda item: -item[1])[:most]


def _sum(stats: Iterable[RequestStats]) -> RequestStats:
    total = RequestStats()
    for one in stats:
        total.steps += one.steps
        total.drafts += one.drafts
        total.draft_tokens += one.draft_tokens
        total.accepted_tokens += one.accepted_tokens
    return total


def _speculation(stats: RequestStats) -> Answer:
    return {
        "steps": stats.steps,
        "drafts": stats.drafts,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }
