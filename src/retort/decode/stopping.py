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
        new = now[len(before) :]
        if self._cut_at_stop(new.rstrip(_REPLACEMENT)):
            return True
        if not now.endswith(_REPLACEMENT):
            self._text += new
            self._anchor, self._read = self._read, len(self._ids)
        return False

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _cut_at_stop(self, new: str) -> bool:
        """Whether a stop string ends in ``new``, text that follows; then cut before it."""
        start = max(0, len(self._text) - max(map(len, self._stops), default=1) + 1)
        tail = self._text[start:] + new
        found = [at for s in self._stops if (at := tail.find(s)) >= 0]
        if not found:
            return False
        self._text = self._text[:start] + tail[: min(found)]
        self._read, self._stopped = len(self._ids), True
        return True

    def _undecided(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        tails = (n for s in self._stops for n in range(1, len(s)) if self._text.endswith(s[:n]))
        return max(tails, default=0)


def grow(request: Request, token: int) -> None:
    """Append a token to the row, and end the row where that is its last one."""
    request.tokens.append(token)
    try:
        if _ends(request, token):
            request.finish_reason = request.finish_reason or "stop"
    except Exception as error:  # in the row's own criteria
        request.fail(error)
    end_if_full(request)


def end_if_full(request: Request) -> None:
    """A row without room for another token ends."""
    if request.finish_reason is None and request.room <= 0:
        request.finish_reason = "length"


def _ends(request: Request, token: int) -> bool:
    stopped = request.text is not None and request.text.push(token)
    if token in request.eos and not request.params.ignore_eos:
        return True
    return stopped or any(c(list(request.tokens)) for c in request.params.stopping_criteria)
