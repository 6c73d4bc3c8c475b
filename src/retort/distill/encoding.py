"""One row of a dataset to prompt and completion ids, with errors that name the row and the column.

Prompt and completion are encoded apart, since the student writes after the prompt's ids. A
completion ends with its first end-of-sequence token, which is learned like any other; a row of
text is learned to its end, since it may hold a conversation or several documents. Which rows there
are is said in `retort.distill.data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.errors import ConfigurationError


@dataclass(frozen=True)
class Encoding:
    """How rows become ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        eos_ids: tokens that end a completion; the first is added where none is there.
        max_length: longest prompt + completion; a longer completion loses its end.
        completion: whether rows need a completion.
        as_chat: wrap a text prompt as a user's message.
        skip_long_prompts: leave out rows whose prompt leaves no room.
        whole: rows of ``text`` are fine; without it something is to be written after a prompt.
        completion_only: the prompt is read and not learned.
        vocab_size: ids that the models know, from 0; None where any is fine.
        origin: name of the data in errors.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    max_length: int = 1024
    completion: bool = True
    as_chat: bool = False
    skip_long_prompts: bool = False
    whole: bool = True
    completion_only: bool = True
    vocab_size: int | None = None
    origin: str = field(default="the dataset", compare=False)


def encoded(row: dict[str, Any], index: int, encoding: Encoding) -> dict[str, Any]:
    """Columns ``index``, ``prompt_ids`` and ``completion_ids`` of a row, the first of which is 0.

    Raises ConfigurationError, naming row and column, as `retort.distill.data.tokenize` says.
    """
    where = f"{encoding.origin}, row {index + 1}"
    prompt_ids, completion_ids = _ids(row, encoding, where)
    _check_known([*prompt_ids, *completion_ids], encoding, where)
    return {"index": index, "prompt_ids": prompt_ids, "completion_ids": completion_ids}


def _ids(row: dict[str, Any], encoding: Encoding, where: str) -> tuple[list[int], list[int]]:
    """Prompt and completion; both empty for a row that is to be skipped."""
    if row.get("prompt") is None and not row.get("messages"):
        text = row.get("text") if encoding.whole else None
        return _encode_whole(text, encoding, where)
    prompt, completion, column = _parts(row, where, encoding)
    if isinstance(prompt, str):
        prompt_ids, completion_ids = _encode_text(prompt, completion, encoding)
    else:
        prompt_ids, completion_ids = _encode_chat(prompt, completion, encoding, where)
    if encoding.completion and not completion_ids:
        raise ConfigurationError(f"{where}: column {column!r} is empty")
    room = encoding.max_length - len(prompt_ids)
    if room < 1 and encoding.skip_long_prompts:
        return [], []
    if not prompt_ids or room < 1:
        raise ConfigurationError(
            f"{where}: the prompt has {len(prompt_ids)} tokens and max_length (or the models' "
            f"context) is {encoding.max_length}: shorten it, or set skip_long_prompts"
        )
    completion_ids = completion_ids[:room]
    if not encoding.completion_only:
        prompt_ids, completion_ids = prompt_ids[:1], [*prompt_ids[1:], *completion_ids]
    return prompt_ids, completion_ids


def _check_known(ids: Sequence[int], encoding: Encoding, where: str) -> None:
    """Refuse what no model has an embedding for; such tokens may stand unused in a tokenizer."""
    most = max(ids, default=0)
    if encoding.vocab_size is not None and most >= encoding.vocab_size:
        token = encoding.tokenizer.convert_ids_to_tokens(most)
        raise ConfigurationError(
            f"{where}: the token {token!r} has the id {most}, and a model knows only "
            f"{encoding.vocab_size} ids: call its resize_token_embeddings(len(tokenizer)) "
            "or leave the token out"
        )


def prompt_of(row: dict[str, Any], encoding: Encoding) -> str | list[dict[str, str]]:
    """A row's prompt, as text or chat messages, before it is tokenised."""
    return _parts(row, encoding.origin, encoding)[0]


def first_answer(value: Any) -> Any:
    """A list of accepted answers counts by its first; a list of messages stays."""
    texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return (value[0] if value else None) if texts else value


def until_eos(ids: Sequence[int], eos_ids: Iterable[int]) -> list[int]:
    """Ids up to and including the first end-of-sequence token."""
    ends = set(eos_ids)
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: first + 1])


def end_tokens(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's, then those of the model's generation config.

    Raises ConfigurationError when the tokenizer names none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigurationError("the tokenizer has no eos_token: set one, the student must stop")
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


def _encode_whole(text: Any, encoding: Encoding, where: str) -> tuple[list[int], list[int]]:
    """The first token stands for the prompt; end tokens, inside too, are learned like any other."""
    _need(text, where, "prompt" if text is None else "text")
    ids = list(encoding.tokenizer(text)["input_ids"])
    if len(ids) < 2 or ids[-1] not in encoding.eos_ids:
        ids.append(encoding.eos_ids[0])
    if len(ids[: encoding.max_length]) < 2:
        raise ConfigurationError(f"{where}: max_length={encoding.max_length} leaves no token")
    return ids[:1], ids[1 : encoding.max_length]


def _parts(row: dict[str, Any], where: str, encoding: Encoding) -> tuple[Any, Any, str]:
    """Prompt, completion and the completion's column; both text, or both chat messages."""
    if row.get("messages"):
        return *_conversation(row["messages"], where, encoding), "messages"
    column = "completion" if row.get("completion") or "reference" not in row else "reference"
    prompt = row.get("prompt")
    completion = first_answer(row.get(column))
    _need(prompt, where, "prompt")
    if encoding.completion:
        _need(completion, where, column)
    completion = completion or ""
    if not isinstance(prompt, str):
        given = completion if not isinstance(completion, str) else _said("assistant", completion)
        return prompt, given, column
    if encoding.as_chat:
        return _said("user", prompt), _said("assistant", completion), column
    if not isinstance(completion, str):
        raise ConfigurationError(
            f"{where}: column 'prompt' is text and column {column!r} is not; make them alike"
        )
    return prompt, completion, column


def _conversation(messages: Any, where: str, encoding: Encoding) -> tuple[Any, Any]:
    if encoding.completion or messages[-1].get("role") == "assistant":
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ConfigurationError(
                f"{where}: column 'messages' must end with an assistant's answer to something"
            )
        if encoding.completion:
            _need(messages[-1].get("content"), where, "messages")
        return messages[:-1], messages[-1:]
    return messages, []


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if text else []


def _need(value: Any, where: str, column: str) -> None:
    if value is None or not (value.strip() if isinstance(value, str) else value):
        raise ConfigurationError(f"{where}: column {column!r} is empty")


def _encode_text(prompt: str, completion: str, encoding: Encoding) -> tuple[list[int], list[int]]:
    prompt_ids = encoding.tokenizer(prompt)["input_ids"]
    if not completion:
        return prompt_ids, []
    ids = encoding.tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, until_eos([*ids, encoding.eos_ids[0]], encoding.eos_ids)


def _encode_chat(
    prompt: list[dict], completion: list[dict], encoding: Encoding, where: str
) -> tuple[list[int], list[int]]:
    prompt_ids = _template(encoding.tokenizer, prompt, add_generation_prompt=True)
    if not completion:
        return prompt_ids, []
    whole = _template(encoding.tokenizer, [*prompt, *completion])
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ConfigurationError(
            f"{where}: the chat template writes the conversation differently with and without "
            "its answer, so that the completion cannot be told from the prompt"
        )
    ids = until_eos(whole[len(prompt_ids) :], encoding.eos_ids)
    rest = whole[len(prompt_ids) + len(ids) :]
    if len(completion) > 1 and encoding.tokenizer.decode(rest).strip():
        raise ConfigurationError(
            f"{where}: column 'completion' has {len(completion)} messages and ends within them; "
            "give the last answer there, and what is before it in the prompt"
        )
    ended = bool(ids) and ids[-1] in encoding.eos_ids
    return prompt_ids, ids if ended else [*ids, encoding.eos_ids[0]]


def _template(tokenizer: Any, messages: list[dict], **options: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            "the data holds chat messages and the tokenizer has no chat template: set one, or "
            "give text columns"
        )
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(ids["input_ids"])
