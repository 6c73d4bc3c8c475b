"""From a request body to what the engine is asked for, checked against the model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.errors import ConfigurationError
from retort.serve.errors import bad
from retort.serve.messages import Add, Ready, Sampling
from retort.serve.prompts import Prompts
from retort.serve.protocol import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    TokenId,
)
from retort.serve.protocol import (
    Sampling as Fields,
)

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; chat may fill the context
_GREEDY = 1e-5  # temperatures below are greedy: dividing by them overflows


@dataclass
class Job:
    """A request that is ready for the engine.

    Attributes:
        id: the answer's id.
        spec: the body as it was given.
        prompts: ids of each prompt.
        echoes: the text of each prompt, where it is to be echoed.
        adds: one engine request a choice, in the order of the choices.
    """

    id: str
    spec: CompletionRequest | ChatRequest
    prompts: list[list[int]]
    adds: list[Add]
    echoes: list[str] | None = None
    created: int = 0
    positions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = {add.id: index for index, add in enumerate(self.adds)}


class Jobs:
    """Makes jobs for one model.

    Args:
        model: what the engine said of itself.
        prompts: its tokenizer.
        rows: most completions of one request.
        client: who asks; prefixes of one client's prompts are never kept for another.
    """

    def __init__(self, model: Ready, prompts: Prompts, rows: int, client: str = "") -> None:
        self._model, self._prompts, self._rows, self._client = model, prompts, rows, client

    async def completion(self, spec: CompletionRequest) -> Job:
        """A completion job.

        Raises:
            ApiError: 400, whatever the model cannot do.
        """
        given = _prompt_list(spec.prompt)
        if len(given) > MAX_PROMPTS or len(given) * spec.choices > self._rows:
            raise bad(
                f"{len(given)} prompts with n={spec.choices} are more completions than this server "
                "takes at once; send fewer",
                "prompt",
            )
        prompts = [await self._ids(p) for p in given]
        limit = _COMPLETION_TOKENS if spec.max_tokens is None else spec.max_tokens
        if limit == 0 and not spec.echo:
            raise bad("max_tokens: must be at least 1 without echo", "max_tokens")
        score = spec.logprobs if spec.echo else None
        job = self._job("cmpl", spec, prompts, limit, spec.logprobs, score)
        if spec.echo:
            job.echoes = [self._text_of(p) for p in given]
        return job

    async def chat(self, spec: ChatRequest) -> Job:
        """A chat job.

        Raises:
            ApiError: 400, whatever the model cannot do.
        """
        prompt = await self._prompts.chat(spec.messages)
        limit = (
            spec.max_tokens if spec.max_completion_tokens is None else spec.max_completion_tokens
        )
        if limit == 0:
            raise bad("max_tokens: must be at least 1", "max_tokens")
        if spec.top_logprobs is not None and not spec.logprobs:
            raise bad("top_logprobs: needs logprobs to be true", "top_logprobs")
        logprobs = (spec.top_logprobs or 0) if spec.logprobs else None
        return self._job("chatcmpl", spec, [prompt], limit, logprobs, None)

    def _job(
        self,
        kind: str,
        spec: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        limit: int | None,
        logprobs: int | None,
        score: int | None,
    ) -> Job:
        job_id = f"{kind}-{secrets.token_hex(12)}"
        self._check_ids("stop_token_ids", spec.stop_token_ids or [])
        bias = self._bias(spec)
        seed = secrets.randbits(63) if spec.seed is None else spec.seed
        adds: list[Add] = []
        group = f"{self._client}/{spec.cache_salt or ''}"
        for prompt in prompts:
            most = self._room(prompt, limit)
            if (spec.min_tokens or 0) > most:
                raise bad(
                    f"min_tokens: {spec.min_tokens} are more than may follow, {most}", "min_tokens"
                )
            sampling = _sampling(spec, most, seed, bias, logprobs, score)
            for choice in range(spec.choices):
                adds.append(_add(f"{job_id}-{len(adds)}", prompt, sampling, spec, choice, group))
        return Job(job_id, spec, prompts, adds)

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._prompts.text(prompt)
        self._check_ids("prompt", prompt)
        return prompt

    def _text_of(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._prompts.decode(prompt)

    def _room(self, prompt: Sequence[int], limit: int | None) -> int:
        """How many tokens may follow the prompt."""
        context = self._model.max_model_len
        if not prompt:
            raise bad("the prompt is empty: give at least one token", "prompt")
        if len(prompt) >= context:
            raise bad(
                f"the prompt has {len(prompt)} tokens and the context is {context}",
                "prompt",
                "context_length_exceeded",
            )
        if limit is not None and len(prompt) + limit > context:
            raise bad(
                f"the prompt's {len(prompt)} tokens and max_tokens={limit} exceed the context of "
                f"{context}",
                "max_tokens",
                "context_length_exceeded",
            )
        return context - len(prompt) if limit is None else limit

    def _bias(self, spec: Fields) -> dict[int, float] | None:
        if not spec.logit_bias:
            return None
        try:
            bias = {int(key): value for key, value in spec.logit_bias.items()}
        except ValueError:
            bias = {}
        if [str(token) for token in bias] != list(spec.logit_bias):  # "07" would be 7 once more
            raise bad("logit_bias: keys must be token ids", "logit_bias")
        self._check_ids("logit_bias", list(bias))
        return bias

    def _check_ids(self, name: str, ids: Sequence[TokenId]) -> None:
        size = self._model.vocab_size
        wrong = next((t for t in ids if not 0 <= t < size), None)
        if wrong is not None:
            raise bad(f"{name}: token id {wrong} is outside the vocabulary of {size}", name)


def _prompt_list(prompt: Any) -> list[str | list[int]]:
    """A prompt in any of OpenAI's four forms as a list of texts or ids.

    Raises:
        ApiError: an empty or a mixed list.
    """
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]
    if kinds in ({str}, {list}):
        return prompt
    what = "is empty" if not kinds else "mixes texts, ids and lists"
    raise bad(f"prompt: the list {what}", "prompt")


def _add(
    request_id: str,
    prompt: list[int],
    sampling: Sampling,
    spec: Fields,
    choice: int,
    group: str,
) -> Add:
    return Add(
        request_id,
        prompt,
        sampling,
        sample=choice,
        stop_token_ids=list(spec.stop_token_ids or []),
        speculate=spec.speculation != "off",
        origins=spec.origins,
        prefix_group=group,
    )


def _sampling(
    spec: Fields,
    most: int,
    seed: int,
    bias: dict[int, float] | None,
    logprobs: int | None,
    score: int | None,
) -> Sampling:
    temperature = 1.0 if spec.temperature is None else spec.temperature
    sampling = Sampling(
        max_new_tokens=most,
        min_new_tokens=spec.min_tokens or 0,
        do_sample=temperature >= _GREEDY,
        temperature=max(temperature, _GREEDY),
        top_k=max(spec.top_k or 0, 0),
        top_p=1.0 if spec.top_p is None else max(spec.top_p, 1e-9),
        min_p=spec.min_p or 0.0,
        repetition_penalty=spec.repetition_penalty or 1.0,
        presence_penalty=spec.presence_penalty or 0.0,
        frequency_penalty=spec.frequency_penalty or 0.0,
        logit_bias=bias,
        ignore_eos=bool(spec.ignore_eos),
        stop_strings=spec.stops or None,
        seed=seed,
        logprobs=logprobs,
        prompt_logprobs=score,
    )
    try:
        sampling.params()
    except ConfigurationError as error:
        raise bad(str(error)) from None
    return sampling
