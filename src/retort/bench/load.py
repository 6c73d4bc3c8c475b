"""Open-loop load: requests arrive when they arrive, however busy the server is."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retort.bench.stream import Address, post
from retort.errors import ConfigurationError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Sample:
    """What one client saw.

    Attributes:
        sent: seconds from the run's start to the request.
        first: seconds from the request to the first text, None when there was none.
        gaps: seconds between the following pieces of text; a piece is what one step gave, with
            speculation several tokens.
        last: seconds from the request to the end.
        prompt_tokens, tokens, cached_tokens, draft_tokens, accepted_tokens, drafts: from ``usage``.
        text: the whole answer.
        error: what went wrong.
    """

    sent: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    last: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafts: int = 0
    text: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        prompts: one request each, in this order.
        rate: requests a second; arrivals are a Poisson process. Infinity sends all at once.
        max_tokens: of each answer.
        chat: through the chat template, or as bare completions.
        model: its name, where the server wants one.
        extra: more fields of every request.
        seed: of the arrivals.
        timeout: seconds until a request that has not ended is given up and counts as failed.
    """

    prompts: Sequence[str]
    rate: float = float("inf")
    max_tokens: int = 64
    chat: bool = True
    model: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout: float | None = None

    def arrivals(self) -> list[float]:
        """Seconds from the start to each request, ascending."""
        draws, at, times = random.Random(self.seed), 0.0, []
        for _ in self.prompts:
            times.append(at)
            at += draws.expovariate(self.rate) if self.rate != float("inf") else 0.0
        return times

    def body(self, prompt: str) -> dict[str, Any]:
        """One request."""
        said = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {}
        return {
            **(said or {"prompt": prompt}),
            **({} if self.model is None else {"model": self.model}),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


async def run(
    address: Address, load: Load, on_done: Callable[[Sample], None] = lambda _: None
) -> list[Sample]:
    """Put a load on a server and return what every client saw, in the order of the prompts."""
    start = time.perf_counter()
    path = CHAT if load.chat else COMPLETIONS

    async def client(at: float, prompt: str) -> Sample:
        await asyncio.sleep(at - (time.perf_counter() - start))
        sample = await ask(address, path, load.body(prompt), start, load.timeout)
        on_done(sample)
        return sample

    pairs = zip(load.arrivals(), load.prompts, strict=True)
    return list(await asyncio.gather(*(client(at, prompt) for at, prompt in pairs)))


async def ask(
    address: Address, path: str, body: dict[str, Any], start: float, timeout: float | None = None
) -> Sample:
    """One streamed request; ``start`` is the run's, by `time.perf_counter`."""
    began = time.perf_counter()
    sample, before = Sample(sent=began - start), began

    def take(event: dict[str, Any]) -> None:
        nonlocal before
        now = time.perf_counter()
        text = "".join(_text(choice) for choice in event.get("choices", []))
        if text:
            sample.text += text
            if sample.first is None:
                sample.first = now - began
            else:
                sample.gaps.append(now - before)
            before = now
        if usage := event.get("usage"):
            _count(sample, usage)

    sample.error = await post(address, path, body, take, timeout)
    sample.last = time.perf_counter() - began
    return sample


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """``prompt`` of each line of a JSON Lines file, ``count`` of them at even distances.

    Raises:
        ConfigurationError: the file cannot be read, or a line has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from None
    prompts = [_prompt(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigurationError(f"{path} holds no prompts")
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{path} line {number} has no prompt") from None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigurationError(f"{path} line {number}: the prompt must be text")
    return prompt


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _count(sample: Sample, usage: dict[str, Any]) -> None:
    sample.prompt_tokens = usage.get("prompt_tokens", 0)
    sample.tokens = usage.get("completion_tokens", 0)
    sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    details = usage.get("completion_tokens_details") or {}
    for name in ("draft_tokens", "accepted_tokens", "drafts"):
        setattr(sample, name, details.get(name, 0))
