"""A token's own text and bytes, as log-probabilities show them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """Texts and bytes of single tokens.

    Args:
        tokenizer: its vocabulary is of bytes spelled as characters (byte-level BPE), or falls back
            to entries like ``<0x0A>`` (SentencePiece), or has no parts of characters.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer("a", add_special_tokens=False).input_ids)
        self._known: dict[int, tuple[str, bytes]] = {}
        added = tokenizer.added_tokens_decoder.items()
        self._control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def text(self, token: int) -> str:
        """The text; half a character as OpenAI spells it, ``bytes:\\xf0\\x9f``."""
        return self._piece(token)[0]

    def data(self, token: int) -> bytes:
        """The bytes; those of a completion's tokens, control tokens aside, are its text."""
        return self._piece(token)[1]

    def shown(self, token: int) -> bytes:
        """What a completion's text has of the token: nothing of a control token."""
        return b"" if token in self._control else self.data(token)

    def _piece(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, bytes]:
        # Behind another token: some decoders strip the space that a text begins with.
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        data = _raw(self._tokenizer.convert_ids_to_tokens(token)) if _REPLACEMENT in text else None
        if data is None:
            return text, text.encode("utf-8", "replace")
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + data.decode("utf-8", "backslashreplace"), data

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _raw(entry: str) -> bytes | None:
    """The bytes of a vocabulary entry, None where its spelling does not tell them."""
    if found := _BYTE.fullmatch(entry):
        return bytes([int(found[1], 16)])
    table = _byte_level()
    return bytes(table[c] for c in entry) if all(c in table for c in entry) else None


@cache
def _byte_level() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
