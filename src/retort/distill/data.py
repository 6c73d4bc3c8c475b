"""Rows of a dataset to prompt and completion ids, with errors that name the row and the column.

Rows are TRL's: ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` (text or chat
messages), ``{"text": ...}``, which is learned from its second token on by methods that write
nothing, or, [ours], ``{"prompt": ..., "reference": ...}``, where a list of references counts by
its first. Prompt and completion are encoded apart, since the student writes after the prompt's
ids. A completion ends with its first end-of-sequence token, which is learned like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.errors import ConfigurationError
from retort.train.rows import load_named, named_file, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

COLUMNS = ("messages", "prompt", "completion", "reference", "text")
"""Columns that are read; all others are ignored."""


@dataclass(frozen=True)
class Example:
    """A tokenised row; ``index`` is its place in the dataset, from 0."""

    index: int
    prompt_ids: list[int]
    completion_ids: list[int]


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
    origin: str = field(default="the dataset", compare=False)


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Rows of a JSONL or Parquet file, a folder of such files, or a dataset of the hub.

    JSONL is read into memory, row by row, so that errors name the row; everything else goes to
    `datasets.load_dataset`. Raises ConfigurationError when there is no such data, or it is empty.
    """
    path = named_file(name, split)
    rows = _read_jsonl(path) if path is not None else load_named(name, split, config)
    if not len(rows):
        raise ConfigurationError(f"{name} is empty: give at least one row")
    return rows


def tokenize(rows: Any, encoding: Encoding, num_proc: int | None = None) -> Dataset:
    """Columns ``index``, ``prompt_ids`` and ``completion_ids`` of a `Dataset` or a list of rows.

    Raises ConfigurationError for missing columns, and naming row (counted from 1) and column for
    an empty or missing value, or a prompt that leaves no room within ``max_length`` (with
    `skip_long_prompts` such rows are left out, and counted in a warning).
    """
    from datasets import Dataset

    if not len(rows):
        raise ConfigurationError(f"{encoding.origin} is empty: give at least one row")
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list([{k: row[k] for k in COLUMNS if k in row} for row in rows])
    _check_columns(rows.column_names, encoding)
    made = rows.map(
        lambda row, index: _encoded(row, index, encoding),
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        load_from_cache_file=False,  # a cache keyed by a tokenizer's pickle is seldom hit
    )
    return _without_skipped(made, encoding) if encoding.skip_long_prompts else made


def collate(features: Sequence[dict[str, Any]]) -> dict[str, list[Example]]:
    """A batch as the trainer's data loader hands it on: examples, not yet tensors."""
    return {"examples": [Example(**feature) for feature in features]}


def prompt_of(row: dict[str, Any], encoding: Encoding) -> str | list[dict[str, str]]:
    """A row's prompt, as text or chat messages, before it is tokenised."""
    return _parts(row, encoding.origin, encoding)[0]


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


# Reading


def _read_jsonl(path: Path) -> Dataset:
    from datasets import Dataset

    rows = read_jsonl(path)
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    if rows and not columns:
        raise ConfigurationError(_missing(path.name, sorted(rows[0])))
    plain = [{c: _plain(row.get(c)) for c in columns} for row in rows]
    _check_alike(plain, path.name)
    return Dataset.from_list(plain)


def _check_alike(rows: Sequence[dict[str, Any]], origin: str) -> None:
    """Refuse columns that are text in one row and messages in another, or neither."""
    kinds: dict[str, type] = {}
    for number, row in enumerate(rows, start=1):
        for column, value in row.items():
            if value is None:
                continue
            messages = isinstance(value, list) and all(isinstance(v, dict) for v in value)
            if not (isinstance(value, str) or messages):
                raise ConfigurationError(
                    f"{origin}, row {number}: column {column!r} must be text or chat messages"
                )
            if kinds.setdefault(column, type(value)) is not type(value):
                raise ConfigurationError(
                    f"{origin}, row {number}: column {column!r} is text in some rows and chat "
                    "messages in others; make them alike"
                )


def _plain(value: Any) -> Any:
    """A list of accepted answers counts by its first; a list of messages stays."""
    texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return (value[0] if value else None) if texts else value


# Rows to ids


def _check_columns(names: Sequence[str], encoding: Encoding) -> None:
    if "text" in names and not {"messages", "prompt"} & set(names):
        if encoding.whole:
            return
        raise ConfigurationError(
            f"{encoding.origin} has rows of 'text', and this method writes after a prompt: give "
            "'prompt', or choose sft, kd or another method without student or teacher text"
        )
    has_prompt = "messages" in names or "prompt" in names
    answers = {"messages", "completion", "reference"} & set(names)
    if not has_prompt or (encoding.completion and not answers):
        raise ConfigurationError(_missing(encoding.origin, names))


def _missing(origin: str, names: Sequence[str]) -> str:
    return (
        f"{origin} has the columns {list(names)}: rows need 'messages', or 'prompt' with "
        "'completion' (or 'reference'), or 'text'"
    )


def _encoded(row: dict[str, Any], index: int, encoding: Encoding) -> dict[str, Any]:
    where = f"{encoding.origin}, row {index + 1}"
    if row.get("prompt") is None and not row.get("messages"):
        return {"index": index, **_encode_whole(row.get("text"), encoding, where)}
    prompt, completion, column = _parts(row, where, encoding)
    if isinstance(prompt, str):
        prompt_ids, completion_ids = _encode_text(prompt, completion, encoding)
    else:
        prompt_ids, completion_ids = _encode_chat(prompt, completion, encoding, where)
    if encoding.completion and not completion_ids:
        raise ConfigurationError(f"{where}: column {column!r} is empty")
    room = encoding.max_length - len(prompt_ids)
    if room < 1 and encoding.skip_long_prompts:
        return {"index": index, "prompt_ids": [], "completion_ids": []}
    if not prompt_ids or room < 1:
        raise ConfigurationError(
            f"{where}: the prompt has {len(prompt_ids)} tokens and max_length (or the models' "
            f"context) is {encoding.max_length}: shorten it, or set skip_long_prompts"
        )
    completion_ids = completion_ids[:room]
    if not encoding.completion_only:
        prompt_ids, completion_ids = prompt_ids[:1], [*prompt_ids[1:], *completion_ids]
    return {"index": index, "prompt_ids": prompt_ids, "completion_ids": completion_ids}


def _encode_whole(text: Any, encoding: Encoding, where: str) -> dict[str, list[int]]:
    """The first token stands for the prompt; the end token is learned like any other."""
    _need(text, where, "prompt" if text is None else "text")
    ids = [*encoding.tokenizer(text)["input_ids"], encoding.eos_ids[0]][: encoding.max_length]
    if len(ids) < 2:
        raise ConfigurationError(f"{where}: max_length={encoding.max_length} leaves no token")
    return {"prompt_ids": ids[:1], "completion_ids": until_eos(ids[1:], encoding.eos_ids)}


def _without_skipped(rows: Dataset, encoding: Encoding) -> Dataset:
    kept = [i for i, ids in enumerate(rows["prompt_ids"]) if ids]
    if not kept:
        raise ConfigurationError(
            f"{encoding.origin}: every prompt is longer than max_length={encoding.max_length}"
        )
    if len(kept) < len(rows):
        count = len(rows) - len(kept)
        logger.warning("%s: %d of %d rows left out, too long", encoding.origin, count, len(rows))
    return rows.select(kept)


def _parts(row: dict[str, Any], where: str, encoding: Encoding) -> tuple[Any, Any, str]:
    """Prompt, completion and the completion's column; both text, or both chat messages."""
    if row.get("messages"):
        return *_conversation(row["messages"], where, encoding), "messages"
    column = "completion" if row.get("completion") or "reference" not in row else "reference"
    prompt = row.get("prompt")
    completion = _plain(row.get(column))
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
