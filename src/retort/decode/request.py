"""What a caller asks of the engine, what it gets back, and a request's state in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal

from retort.errors import ConfigurationError

FinishReason = Literal["stop", "length", "abort", "error"]
LogitsProcessor = Callable[[Sequence[int], Any], Any]
StoppingCriterion = Callable[[Sequence[int]], bool]

_COLDEST = 1e-100  # scores divided by a temperature must stay finite


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued; names and meanings are Hugging Face's.

    Args:
        max_new_tokens: most tokens to generate.
        min_new_tokens: no end-of-sequence token before this many.
        do_sample: draw from the model's distribution instead of taking the most likely token.
        temperature, top_k, top_p, min_p: shape the distribution that is drawn from.
        repetition_penalty: over prompt and output (Hugging Face).
        presence_penalty, frequency_penalty: over the output only (OpenAI).
        logit_bias: added to the logits of the given token ids.
        bad_words_ids: token sequences that are never generated.
        logits_processors: functions of (all tokens of the row, scores ``[vocab]``) that return new
            scores; they are called once for each token, in order, before temperature. Drafts go
            through their attribute ``for_drafts``, a function of the same kind, where they have it.
        stopping_criteria: functions of all tokens of the row, called after each token; the row
            ends where one returns True.
        eos_token_id: one id or several that end the row; None takes the model's.
        ignore_eos: go on after an end-of-sequence token.
        stop_strings: text that ends the row; the output's text ends before it.
        seed: with the same seed a sampled row is the same text in any company, with any drafter.
        n: outputs of `Engine.generate` for each prompt; each draws noise of its own.
        logprobs: give the log-probability of every token, and of this many alternatives.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    bad_words_ids: list[list[int]] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    eos_token_id: int | list[int] | None = None
    ignore_eos: bool = False
    stop_strings: str | list[str] | None = None
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, ok, rule in self._rules():
            if not ok:
                value = getattr(self, name)
                raise ConfigurationError(f"{name}={value!r} is wrong: it must be {rule}")

    @classmethod
    def build(cls, **options: Any) -> SamplingParams:
        """Build from keywords; an unknown keyword is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigurationError(
                f"unknown sampling option {unknown[0]!r}; known: {', '.join(known)}"
            )
        return cls(**options)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        given = self.stop_strings
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    @property
    def bad_words(self) -> Sequence[Sequence[int]]:
        """The forbidden sequences, empty without any."""
        return self.bad_words_ids or ()

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("max_new_tokens", _whole(self.max_new_tokens, 0), "a whole number of at least 0"),
            (
                "min_new_tokens",
                _whole(self.min_new_tokens, 0) and _whole(self.max_new_tokens, self.min_new_tokens),
                "between 0 and max_new_tokens",
            ),
            ("temperature", _within(self.temperature, _COLDEST), f"finite and above {_COLDEST}"),
            ("top_k", _whole(self.top_k, 0), "0 (off) or a positive whole number"),
            ("top_p", _within(self.top_p, 0, 1), "above 0 and at most 1"),
            ("min_p", self.min_p == 0 or _within(self.min_p, 0, 1), "between 0 and 1"),
            (
                "repetition_penalty",
                _within(self.repetition_penalty, 0, math.inf),
                "a finite number above 0",
            ),
            ("presence_penalty", _within(self.presence_penalty), "finite"),
            ("frequency_penalty", _within(self.frequency_penalty), "finite"),
            ("logit_bias", _biases(self.logit_bias), "token ids with numbers, none NaN or +inf"),
            (
                "bad_words_ids",
                _all(self.bad_words, _token_ids),
                "a list of non-empty lists of token ids",
            ),
            (
                "logits_processors",
                _all(self.logits_processors, callable),
                "a list of functions of (tokens, scores)",
            ),
            (
                "stopping_criteria",
                _all(self.stopping_criteria, callable),
                "a list of functions of the row's tokens",
            ),
            (
                "eos_token_id",
                self.eos_token_id is None
                or _integer(self.eos_token_id)
                or _all(self.eos_token_id, _integer),
                "a token id or a list of them",
            ),
            ("seed", _integer(self.seed), "a whole number"),
            ("n", _whole(self.n, 1), "a whole number of at least 1"),
            (
                "stop_strings",
                self.stop_strings is None
                or (_all(self.stop_strings, _text) and "" not in self.stops),
                "non-empty text",
            ),
            ("logprobs", _count_or_none(self.logprobs), "None or a whole number of at least 0"),
            (
                "prompt_logprobs",
                _count_or_none(self.prompt_logprobs),
                "None or a whole number of at least 0",
            ),
        ]


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


def _whole(value: Any, least: int) -> bool:
    return _integer(value) and value >= least


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count_or_none(value: Any) -> bool:
    return value is None or _whole(value, 0)


def _within(value: Any, above: float = -math.inf, most: float = math.inf) -> bool:
    return _number(value) and math.isfinite(value) and above < value <= most


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _all(values: Any, test: Callable[[Any], Any]) -> bool:
    return isinstance(values, Iterable) and all(map(test, values))


def _token_ids(values: Any) -> bool:
    return bool(values) and _all(values, lambda token: _whole(token, 0))


def _biases(values: Any) -> bool:
    return values is None or (
        isinstance(values, Mapping)
        and _all(values, _integer)
        and _all(values.values(), lambda v: _number(v) and v < math.inf)
    )
