"""What clients may send. Every number and every list is bounded here, before the engine sees it."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from retort.serve.errors import ApiError, bad

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_ALTERNATIVES = 20

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Tokens = Annotated[list[TokenId], Meta(max_length=2**20)]
Prompt = str | Annotated[list[str | TokenId | Tokens], Meta(max_length=2**20)]
Bias = Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]

# Asked for by some clients, not offered: a request that means them must not be answered without.
UNSUPPORTED = (
    *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"),
    *("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "suffix", "best_of", "use_beam_search", "prompt_embeds"),
    *("chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs"),
    *("modalities", "audio", "prediction", "web_search_options", "lora_request"),
)
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "use_beam_search": (False,),
}


class StreamOptions(Struct, frozen=True):
    """Extras of a stream; ``include_origins`` (ours) tells who wrote each part of the text."""

    include_usage: bool | None = None
    include_origins: bool | None = None


class Sampling(Struct, frozen=True, kw_only=True):
    """Fields that completions and chat share."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Bias | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculation: Literal["auto", "off"] | None = None
    timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None

    @property
    def choices(self) -> int:
        """How many completions of each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def origins(self) -> bool:
        """Whether a stream tells who wrote each part of the text."""
        return bool(self.stream and self.stream_options and self.stream_options.include_origins)


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None


class Part(Struct, frozen=True):
    """One part of a message's content; only text is understood."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None


class Message(Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Meta(max_length=1024)]


class ChatRequest(Sampling, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """Body of ``/tokenize``: a text, or messages that go through the chat template."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None


class LoadRequest(Struct, frozen=True, kw_only=True):
    """Body of ``/load_model``, which ``transformers chat`` asks before it chats."""

    model: Annotated[str, Meta(max_length=512)]


T = TypeVar("T")

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # behind an even number of backslashes


def parse(body: bytes, kind: type[T]) -> T:
    """Read a body.

    Raises:
        ApiError: 400 with the field at fault.
    """
    try:
        value = msgspec.json.decode(body, type=kind)
        raw = json.loads(body, object_pairs_hook=_once)
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise bad("the body is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise bad(f"the body is not valid JSON: {error}") from None
    if _NUL.search(body):
        raise bad("text must not hold the character U+0000")
    _refuse_unsupported(raw)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _invalid(text: str) -> ApiError:
    """msgspec's message and path as a field's name."""
    message, _, path = text.partition(" - at `$")
    param = path.rstrip("`").lstrip(".") or None
    if message.startswith("Object missing required field"):
        param = message.split("`")[1]
    where = f"{param}: " if param else ""
    return bad(f"{where}{message}", param)


def _refuse_unsupported(raw: Any) -> None:
    for name in UNSUPPORTED:
        value = raw.get(name)
        if value is not None and value != [] and value not in _HARMLESS.get(name, ()):
            raise bad(f"{name} is not supported by this server", name, "unsupported")
