"""A request's state inside the engine, and what callers get back of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retort.decode.params import SamplingParams
from retort.errors import ConfigurationError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass
class RequestStats:
    """Counts of one request; mean acceptance length = 1 + accepted_tokens / drafts.

    ``cached_tokens`` of the prompt came from a kept prefix and were not read again.
    """

    steps: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0

    def record_draft(self, length: int, accepted: int) -> None:
        """Count one verified draft."""
        self.drafts += 1
        self.draft_tokens += length
        self.accepted_tokens += accepted


@dataclass
class RequestOutput:
    """A finished request.

    Attributes:
        index: place of the request in the order of `Engine.add_request`.
        sample: which of the ``n`` outputs of its prompt this is.
        token_ids: generated ids, an end-of-sequence token included.
        text: decoded without special tokens, cut before a stop string.
        finish_reason: "stop", "length", "abort" or "error".
        logprobs: for each token ``{token id: log-probability}``, where asked for; empty for tokens
            that `Engine.rewind` put in, which were not generated.
        prompt_logprobs: the same for the prompt, from its second token on.
        error: what went wrong where ``finish_reason`` is "error".
    """

    index: int
    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    stats: RequestStats
    logprobs: list[dict[int, float]] | None = None
    error: str | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    sample: int = 0


@dataclass
class Chunk:
    """New text of one request, as the stream gives it; the last one has a finish reason."""

    index: int
    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """A request inside the engine: its tokens and how many of them the cache already holds.

    Attributes:
        sample, round: which of ``n`` samples this is, and how often the row was taken back; both
            are part of its noise.
        parked: what the cache needs to take a preempted row in again, where it is not recomputed,
            or to start a row from a kept prefix.
        prefix_group: requests share kept prefixes within one group only.
        pause: tokens after which reading the prompt stops for a moment, so that the state there
            can be kept; 0 for nowhere.
        together: its caller waits until all requests that came with it have ended.
    """

    id: str
    index: int
    prompt: list[int]
    params: SamplingParams
    eos: frozenset[int]
    hold: bool = False
    drafter: str | None = None
    sample: int = 0
    round: int = 0
    row: int = -1
    parked: Any = None
    prefix_group: str = ""
    pause: int = 0
    together: bool = False
    fed: int = 0
    limit: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    text: Any = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    stats: RequestStats = field(default_factory=RequestStats)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.limit = len(self.prompt) + self.params.max_new_tokens

    @property
    def pending(self) -> list[int]:
        """Tokens that the target has not read yet; exactly one while decoding."""
        return self.tokens[self.fed :]

    @property
    def decoding(self) -> bool:
        """The prompt is read: each step yields tokens."""
        return len(self.tokens) - self.fed == 1

    @property
    def output(self) -> list[int]:
        """Generated tokens so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def room(self) -> int:
        """How many more tokens may be generated."""
        return self.limit - len(self.tokens)

    @property
    def generated(self) -> int:
        """How many tokens there are after the prompt."""
        return len(self.tokens) - len(self.prompt)

    def fail(self, error: Exception) -> None:
        """End the row with an error, unless it has ended already; it keeps its tokens."""
        if self.finish_reason is None:
            self.finish_reason, self.error = "error", f"{type(error).__name__}: {error}"

    def check_kept(self, length: int) -> None:
        """Refuse to take the row back to ``length`` tokens where it never stood.

        Raises:
            ConfigurationError: it would lose tokens of the prompt, or keep some that are not there.
        """
        if not len(self.prompt) <= length <= len(self.tokens):
            raise ConfigurationError(
                f"{self.id} can keep {len(self.prompt)} (its prompt) to {len(self.tokens)} tokens, "
                f"not {length}"
            )

    def reopen(self, length: int, append: Sequence[int], limit: int) -> None:
        """Keep ``length`` tokens, add some, and go on to ``limit`` with noise of its own."""
        self.tokens = [*self.tokens[:length], *append]
        del self.logprobs[length - len(self.prompt) :]
        if self.params.logprobs is not None:
            self.logprobs += [{} for _ in append]
        self.limit, self.finish_reason, self.error = limit, None, None
        self.round += 1
