"""From what a user gives (text, ids, chat messages, parameters) to a request, checked up front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.decode.stopping import TextBuffer
from retort.decode.support import max_length
from retort.errors import ConfigurationError

Prompt = str | Sequence[int] | Sequence[dict]


class Admission:
    """Turns prompts into requests for one model and tokenizer, or refuses them.

    Args:
        model: the target; its configuration gives vocabulary, context and end-of-sequence ids.
        tokenizer: needed for text and chat prompts, stop strings and text output.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._config = model.config.get_text_config()
        self._generation = getattr(model, "generation_config", None)
        self._tokenizer = tokenizer
        self._limit = max_length(model.config)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of one prompt.

        Raises:
            ConfigurationError: empty, too long for the context, or ids outside the vocabulary.
        """
        ids = encode(prompt, self._tokenizer)
        check(ids, self._config.vocab_size, self._limit)
        return ids

    def request(
        self, request_id: str, index: int, prompt: Prompt, params: SamplingParams, hold: bool
    ) -> Request:
        """A request ready to be scheduled."""
        check_params(params)
        self._check_ids("logit_bias", params.logit_bias or {})
        self._check_ids("bad_words_ids", (t for word in params.bad_words for t in word))
        self._check_ids("eos_token_id", _as_ids(params.eos_token_id))
        ids = self.encode(prompt)
        request = Request(request_id, index, ids, params, self._eos(params), hold)
        if params.stops:
            _need(self._tokenizer, "stop string in a")
        if self._tokenizer is not None:
            request.text = TextBuffer(self._tokenizer, params.stops)
        self.limit(request)
        return request

    def limit(self, request: Request) -> None:
        """Let a request grow to the context length at most."""
        if self._limit is not None:
            request.limit = min(request.limit, self._limit)

    def continuation(
        self, length: int, append: Sequence[int], max_new_tokens: int | None
    ) -> list[int]:
        """The tokens to put after a row's first ``length``, as ids that the model can read.

        Raises:
            ConfigurationError: unknown ids, more than the context holds, or a negative count.
        """
        if (max_new_tokens or 0) < 0:
            raise ConfigurationError(f"max_new_tokens={max_new_tokens} must be at least 0")
        ids = encode(append, self._tokenizer)
        self._check_ids("append", ids)
        if self._limit is not None and length + len(ids) > self._limit:
            raise ConfigurationError(
                f"append: {length} + {len(ids)} tokens exceed the model's context of {self._limit}"
            )
        return ids

    def replay(self, request: Request) -> None:
        """Make the text state anew after a row's tokens were replaced."""
        if request.text is not None:
            request.text = TextBuffer(self._tokenizer, request.params.stops)
            for token in request.output:
                request.text.push(token)

    def text(self, request: Request) -> str:
        """The request's whole output text."""
        return "" if request.text is None else request.text.full(request.output)

    def _eos(self, params: SamplingParams) -> frozenset[int]:
        candidates = (params, self._generation, self._config)
        given = (getattr(c, "eos_token_id", None) for c in candidates)
        return frozenset(_as_ids(next((g for g in given if g is not None), None)))

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        size = self._config.vocab_size
        bad = next((t for t in ids if not 0 <= t < size), None)
        if bad is not None:
            raise ConfigurationError(f"{name}: token id {bad} is outside the vocabulary of {size}")


def check_params(params: Any) -> None:
    """Refuse what is no `SamplingParams`.

    Raises:
        ConfigurationError: so it is.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigurationError(f"params={params!r:.80} is wrong: it must be SamplingParams")


def check_row(request_id: Any, sample: Any, prefix_group: Any) -> None:
    """Refuse what names no request, no sample of a prompt or no group of prefixes.

    Raises:
        ConfigurationError: so it is.
    """
    if not isinstance(request_id, str):
        raise ConfigurationError(f"request_id={request_id!r} must be text")
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ConfigurationError(f"sample={sample!r} must be a whole number of at least 0")
    if not isinstance(prefix_group, str):
        raise ConfigurationError(f"prefix_group={prefix_group!r} must be text")


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Ids of one prompt: text as it stands, messages through the chat template, ids unchanged."""
    if isinstance(prompt, str):
        _check_text(prompt)
        return list(_need(tokenizer, "text")(prompt).input_ids)
    found: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    items: list[Any] = list(found) if isinstance(found, Iterable) else [found]
    if items and all(isinstance(item, dict) for item in items):
        return _chat(items, _need(tokenizer, "chat"))
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
    if whole and isinstance(found, Iterable) and not isinstance(found, bytes | bytearray):
        return items
    raise ConfigurationError(
        f"a prompt must be text, a list of token ids or a list of chat messages, not {prompt!r:.80}"
    )


def check(ids: Sequence[int], vocab_size: int, limit: int | None) -> None:
    """Refuse what the model cannot read.

    Raises:
        ConfigurationError: empty, an id outside the vocabulary, or at or over the context length.
    """
    if not ids:
        raise ConfigurationError("the prompt is empty: give at least one token")
    bad = next((t for t in ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise ConfigurationError(
            f"token id {bad} in the prompt is outside the vocabulary of {vocab_size}"
        )
    if limit is not None and len(ids) >= limit:
        raise ConfigurationError(
            f"the prompt has {len(ids)} tokens and the model's context is {limit}: shorten it "
            f"to at most {limit - 1}"
        )


def _check_text(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the prompt is not Unicode text: character {error.start} is a lone surrogate; "
            "check how it was decoded"
        ) from None


def _chat(messages: list[dict], tokenizer: Any) -> list[int]:
    for text in (value for message in messages for value in message.values()):
        if isinstance(text, str):
            _check_text(text)
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # whatever the template raises is about these messages
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigurationError(
            f"the prompt's messages cannot go through the chat template ({reason})"
        ) from error
    return list(ids["input_ids"])


def _need(tokenizer: Any, kind: str) -> Any:
    if tokenizer is None:
        raise ConfigurationError(
            f"a {kind} prompt needs a tokenizer: pass Engine(model, tokenizer)"
        )
    return tokenizer


def is_single(prompts: Any) -> bool:
    """Whether ``prompts`` is one prompt and not a list of them.

    Raises:
        ConfigurationError: neither, such as None or a single message.
    """
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ConfigurationError(
            f"prompts must be a prompt (text, token ids, chat messages) or a list of them, "
            f"not {prompts!r:.80}"
        )
    if isinstance(prompts, str):
        return True
    if hasattr(prompts, "ndim"):  # an array or a tensor
        return prompts.ndim == 1
    return (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], (int, dict))
    )


def _as_ids(given: int | Sequence[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)
