"""Lines of an input file as items of work; a line that cannot be read is named by its number."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from retort.decode.params import SamplingParams
from retort.decode.request import RequestOutput
from retort.errors import ConfigurationError

Prompt = str | list[int] | list[dict[str, Any]]
Answer = dict[str, Any]

_KEYS = ("prompt", "messages", "text")


@dataclass(frozen=True)
class Part:
    """One request for the engine: a completion of one prompt."""

    prompt: Prompt
    params: SamplingParams
    sample: int = 0
    drafter: str | None = "default"


@dataclass(frozen=True)
class Item:
    """One line of the input.

    Attributes:
        number: of the line, from 1.
        id: under which the answer is known.
        parts: what the engine is asked for; none where the answer is known already.
        answer: makes the output row.
        errors_are_rows: a failure is told in the output row, as OpenAI's format does.
        asked: hash of what is asked, which the answer repeats.
    """

    number: int
    id: str
    parts: Sequence[Part]
    answer: Callable[[list[RequestOutput]], Answer]
    errors_are_rows: bool = False
    asked: str = ""


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be answered, and why."""

    number: int
    reason: str


class BatchRequests(Protocol):
    """Makes items of lines in OpenAI's batch format."""

    def item(self, number: int, row: dict[str, Any]) -> Item | BadLine:
        """The item of one row."""
        ...


@dataclass
class Reader:
    """Turns lines into items.

    Args:
        params: of rows that do not bring their own.
        chat: send texts through the chat template.
        text: lines are prompts as they stand; otherwise lines that are JSON objects are rows.
        strict: every line must be a JSON object.
        openai: takes rows in OpenAI's batch format; None where its package is missing.
        done: ids that are answered already, which are passed over, with `asked` of each.
    """

    params: SamplingParams
    chat: bool = False
    text: bool = False
    strict: bool = True
    openai: BatchRequests | None = None
    done: Mapping[str, str] = field(default_factory=dict)

    def items(self, lines: Iterable[bytes]) -> Iterator[Item | BadLine]:
        """Items in the order of their lines; blank lines are passed over.

        Raises:
            ConfigurationError: an id was answered already, for another prompt.
        """
        seen: dict[str, int] = {}
        index = -1
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            index += 1
            item = self._item(number, index, line)
            if isinstance(item, BadLine):
                yield item
            elif item.id in seen:
                yield BadLine(number, f"id {item.id!r} is that of line {seen[item.id]} already")
            else:
                seen[item.id] = number
                if item.id not in self.done:
                    yield item
                elif self.done[item.id] != item.asked:
                    raise ConfigurationError(
                        f"line {number}: the output has an answer with the id {item.id} to another "
                        "prompt: name another --output, or begin anew with --overwrite"
                    )

    def _item(self, number: int, index: int, line: bytes) -> Item | BadLine:
        try:
            text = line.decode("utf-8").strip("\r\n")
            if self.text or not (self.strict or text.lstrip().startswith("{")):
                return self._plain(number, index, {"prompt": text})
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
            return BadLine(number, f"is not {kind}: {error}")
        if isinstance(row, dict) and "body" in row and "url" in row:
            return self._batch(number, row)
        return self._plain(number, index, row)

    def _batch(self, number: int, row: dict[str, Any]) -> Item | BadLine:
        if self.openai is None:
            return BadLine(
                number, "is in OpenAI's batch format, which needs: pip install 'retort-lm[serve]'"
            )
        return self.openai.item(number, row)

    def _plain(self, number: int, index: int, row: Any) -> Item | BadLine:
        try:
            prompt = prompt_of(row)
        except ConfigurationError as error:
            return BadLine(number, str(error))
        given = row.get("id", row.get("custom_id", index))
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            return BadLine(number, f"has an id that is neither text nor a number: {given!r:.80}")
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]

        def answer(outputs: list[RequestOutput]) -> Answer:
            return {"id": given, **output_row(index, prompt, outputs[0])}

        parts = [Part(prompt, self.params)]
        return Item(number, key(given), parts, answer, asked=asked(prompt))


def key(given: str | int) -> str:
    """An id as text; the number 1 and the text "1" are different ids."""
    return json.dumps(given)


def asked(prompt: Prompt) -> str:
    """Hash of a prompt, to tell whether an answer is to it."""
    return blake2b(json.dumps(prompt).encode(), digest_size=16).hexdigest()


def output_row(index: int, prompt: Prompt, output: RequestOutput) -> Answer:
    """What is told of one completion."""
    return {
        "index": index,
        "prompt": prompt,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stats": asdict(output.stats),
    }


def prompt_of(row: Any) -> Prompt:
    """The prompt of a row: ``prompt`` (text or messages), ``messages`` or ``text``.

    Raises:
        ConfigurationError: none of these, or not text or messages; the message has no subject.
    """
    found = [row[name] for name in _KEYS if isinstance(row, dict) and name in row]
    if not found:
        raise ConfigurationError(f"has none of {', '.join(_KEYS)}")
    if not found[0] or not (isinstance(found[0], str) or _is_messages(found[0])):
        raise ConfigurationError(
            "has a wrong prompt: it is non-empty text or a list of messages, each with role and "
            "content"
        )
    return found[0]


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )
