"""Text to ids and back, for one model's tokenizer, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from retort.serve.errors import bad
from retort.serve.pieces import Pieces
from retort.serve.protocol import Message

T = TypeVar("T")

_PRIVATE_USE = range(0xE000, 0xF8FF)


class Prompts:
    """A tokenizer in one thread of its own: tokenizers are not safe to share.

    Args:
        tokenizer: of the served model.
        chat_template: replaces the tokenizer's own.

    Attributes:
        pieces: texts and bytes of single tokens.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.pieces = Pieces(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retort-tokenize")
        specials = {str(token) for token in tokenizer.all_special_tokens}
        added = tokenizer.added_tokens_decoder.values()
        self._controls = sorted(specials | {t.content for t in added if t.special}, key=len)[::-1]

    async def text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text as it stands; control tokens spelled out in it are control tokens."""
        options = {"add_special_tokens": add_special_tokens, "verbose": False}
        encode = partial(self._tokenizer, text, **options)
        return list(await self._run(lambda: encode().input_ids))

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, ready for the assistant's turn.

        Raises:
            ApiError: no chat template, one that refuses this conversation, or content that is not
                text.
        """
        plain = [{"role": _role(m), "content": _content(m)} for m in messages]
        if self._tokenizer.chat_template is None:
            raise bad("this model has no chat template; use /v1/completions", "messages")
        return await self._run(lambda: self._chat(plain))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self._tokenizer.decode(list(ids))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The template decides where control tokens stand: those spelled in content stay text."""
        marked, hidden = self._hide_controls(messages)
        if not hidden:
            return self._template(messages, tokenize=True)
        rendered, ids = self._template(marked, tokenize=False), []
        mark = next(iter(hidden))[0]
        for number, part in enumerate(rendered.split(mark)):
            index, rest = (part[0], part[1:]) if number else ("", part)
            if index:
                ids += self._literal(hidden[mark + index])
            ids += self._tokenizer(rest, add_special_tokens=False).input_ids if rest else []
        return ids

    def _template(self, messages: list[dict[str, str]], tokenize: bool) -> Any:
        try:
            made = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=tokenize,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # whatever the template raises is about these messages
            reason = " ".join(str(error).split())[:200]
            raise bad(f"the chat template refuses these messages: {reason}", "messages") from None
        return list(made["input_ids"]) if tokenize else made

    def _hide_controls(
        self, messages: list[dict[str, str]]
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Put two private characters, a mark and a number, where content spells a control token."""
        everything = "".join(m["content"] for m in messages)
        found = [c for c in self._controls if c and c in everything]
        if not found:
            return messages, {}
        unused = [chr(c) for c in _PRIVATE_USE if chr(c) not in everything]
        if len(unused) <= len(found):
            raise bad("the content uses too many private characters", "messages")
        mark, *numbers = unused
        hidden = {mark + n: control for n, control in zip(numbers, found, strict=False)}
        marked = [dict(m) for m in messages]
        for message in marked:
            for key, control in hidden.items():
                message["content"] = message["content"].replace(control, key)
        return marked, hidden

    def _literal(self, text: str) -> list[int]:
        """Ids of a control token's spelling as ordinary text."""
        half = max(1, len(text) // 2)
        parts = (text[:half], text[half:])
        return [
            token
            for part in parts
            if part
            for token in self._tokenizer(part, add_special_tokens=False).input_ids
        ]


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise bad(
                f"content of type {part.type!r} is not supported; this server takes text only",
                "messages",
                "unsupported",
            )
    return "".join(part.text or "" for part in message.content)
