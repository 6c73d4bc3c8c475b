"""When a row ends, and which of its text may be shown already."""

from __future__ import annotations

from typing import Any

from retort.decode.request import Request

_REPLACEMENT = "\ufffd"


class TextBuffer:
    """Incremental detokenisation of one row, with stop strings.

    Text is stable once it does not end in half a character; with stop strings, the longest tail
    that could be the beginning of one is held back until it is decided.

    Attributes:
        ends: for each token, how long the text was once it was added: which token wrote what.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._anchor = self._read = 0
        self._text = ""
        self._shown = 0
        self._stopped = False
        self.ends: list[int] = []

    def push(self, token: int) -> bool:
        """Add a token; True when the text now holds a stop string (it is cut before it)."""
        stopped = self._push(token)
        self.ends.append(len(self._text))
        return stopped

    def take(self, last: bool = False) -> str:
        """The text that became certain since the last call; everything when ``last``."""
        if last and self._read < len(self._ids):
            self._text += self._decode(self._anchor)[len(self._decode(self._anchor, self._read)) :]
            self._read = len(self._ids)
        end = len(self._text) if last else len(self._text) - self._undecided()
        new, self._shown = self._text[self._shown : end], max(self._shown, end)
        return new

    def full(self, ids: list[int]) -> str:
        """The whole text: cut before a stop string, else all ids decoded at once."""
        return (
            self._text if self._stopped else self._tokenizer.decode(ids, skip_special_tokens=True)
        )

    def _push(self, token: int) -> bool:
        self._ids.append(token)
        before, now = self._decode(self._anchor, self._read), self._decode(self._anchor)
        if now.endswith(_REPLACEMENT):
            return False
        searched = len(self._text)
        self._text += now[len(before) :]
        self._anchor, self._read = self._read, len(self._ids)
        return self._cut_at_stop(searched)

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _cut_at_stop(self, searched: int) -> bool:
        from_ = max(0, searched - max(map(len, self._stops), default=1) + 1)
        found = [at for s in self._stops if (at := self._text.find(s, from_)) >= 0]
        if not found:
            return False
        self._text, self._read, self._stopped = self._text[: min(found)], len(self._ids), True
        return True

    def _undecided(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        tails = (n for s in self._stops for n in range(1, len(s)) if self._text.endswith(s[:n]))
        return max(tails, default=0)


def extend(request: Request, tokens: list[int]) -> list[int]:
    """Append tokens to the row until it ends; return those appended and set its finish reason."""
    taken: list[int] = []
    for token in tokens:
        if request.room <= 0:
            break
        request.tokens.append(token)
        taken.append(token)
        if _guarded(request, token):
            break
    if request.finish_reason is None and request.room <= 0:
        request.finish_reason = "length"
    return taken


def _guarded(request: Request, token: int) -> bool:
    """Whether the row ends here; a fault in its own criteria ends that row alone."""
    try:
        if _ends(request, token):
            request.finish_reason = "stop"
    except Exception as error:
        request.finish_reason, request.error = "error", f"{type(error).__name__}: {error}"
    return request.finish_reason is not None


def _ends(request: Request, token: int) -> bool:
    stopped = request.text is not None and request.text.push(token)
    if token in request.eos and not request.params.ignore_eos:
        return True
    return stopped or any(c(request.tokens) for c in request.params.stopping_criteria)
