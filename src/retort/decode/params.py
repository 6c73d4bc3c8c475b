"""How one request is continued: Hugging Face's names and meanings, checked when they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from retort.errors import ConfigurationError

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
            ("do_sample", _flag(self.do_sample), "True or False"),
            ("ignore_eos", _flag(self.ignore_eos), "True or False"),
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


def _whole(value: Any, least: int) -> bool:
    return _integer(value) and value >= least


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, Hashable) and value in (True, False)  # numpy's own, too


def _count_or_none(value: Any) -> bool:
    return value is None or _whole(value, 0)


def _within(value: Any, above: float = -math.inf, most: float = math.inf) -> bool:
    return _number(value) and math.isfinite(value) and above < value <= most


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _all(values: Any, test: Callable[[Any], Any]) -> bool:
    """Whether all pass; what can be read only once does not, since it is read again later."""
    return isinstance(values, Collection) and all(map(test, values))


def _token_ids(values: Any) -> bool:
    return _all(values, lambda token: _whole(token, 0)) and len(values) > 0


def _biases(values: Any) -> bool:
    return values is None or (
        isinstance(values, Mapping)
        and _all(values, _integer)
        and _all(values.values(), lambda v: _number(v) and v < math.inf)
    )
