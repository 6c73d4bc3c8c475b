"""Items through the engine: a window of them at once, answers in the order of the input."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from retort.batch.output import Sink
from retort.batch.rows import Answer, BadLine, Item
from retort.decode.engine import Engine
from retort.decode.request import RequestOutput
from retort.errors import ConfigurationError, RetortError

_WINDOW = 4  # items in hand for each row of the engine, so that a long one does not hold up others


@dataclass
class _Open:
    """An item in work.

    Attributes:
        missing: ids of its requests that have not ended.
        outputs: ended ones by id, in the order of the parts once all are there.
        failed: why it cannot be answered.
    """

    item: Item
    ids: list[str] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    failed: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.failed is not None or len(self.outputs) == len(self.ids)

    def answer(self) -> Answer:
        """The output row."""
        return self.item.answer([self.outputs[i] for i in self.ids])


@dataclass
class Runner:
    """Answers items.

    Args:
        engine: used by nobody else meanwhile.
        sink: takes the rows.
        skip: pass over lines that cannot be answered; otherwise the first one ends the run, once
            the lines before it are answered.
        on_bad: told of every line that is passed over.
        on_progress: called after each step with the number of items that ended in it.

    Attributes:
        written, skipped: lines answered and passed over.
    """

    engine: Engine
    sink: Sink
    skip: bool = False
    on_bad: Callable[[BadLine], None] = lambda _: None
    on_progress: Callable[[int], None] = lambda _: None
    written: int = 0
    skipped: int = 0
    _hand: deque[_Open] = field(default_factory=deque)
    _owner: dict[str, _Open] = field(default_factory=dict)

    def run(self, items: Iterable[Item | BadLine]) -> None:
        """Answer all items.

        Raises:
            RetortError: a line cannot be answered and is not to be passed over; the message
                names it. Lines before it are answered and written.
        """
        coming, stop = iter(items), None
        while True:
            stop = stop or self._fill(coming)
            if not self._hand:
                break
            for output in self.engine.step() if self._owner else []:
                self._take(output)
            bad = self._write()
            self.on_progress(self.written + self.skipped)
            if bad is not None:
                stop = bad
                self._abandon()
        if stop is not None:
            raise ConfigurationError(f"line {stop.number}: {stop.reason}")

    def _fill(self, coming: Iterator[Item | BadLine]) -> BadLine | None:
        """Take items in hand; returns the bad line that ends the run."""
        most = _WINDOW * self.engine.scheduler.max_batch_size
        while len(self._hand) < most:
            item = next(coming, None)
            if item is None:
                return None
            if isinstance(item, BadLine):
                if not self.skip:
                    return item
                self._pass_over(item)
                continue
            self._begin(item)
        return None

    def _begin(self, item: Item) -> None:
        opened = _Open(item)
        self._hand.append(opened)
        for part in item.parts:
            try:
                request_id = self.engine.add_request(
                    part.prompt, part.params, sample=part.sample, drafter=part.drafter
                )
            except RetortError as error:
                opened.failed = str(error)
                break
            opened.ids.append(request_id)
            self._owner[request_id] = opened
        if opened.failed is not None:
            self._drop(opened)

    def _take(self, output: RequestOutput) -> None:
        opened = self._owner.pop(output.request_id)
        opened.outputs[output.request_id] = output
        if output.finish_reason == "error" and not opened.item.errors_are_rows:
            opened.failed = output.error or "the engine failed on it"
            self._drop(opened)

    def _drop(self, opened: _Open) -> None:
        for request_id in opened.ids:
            if self._owner.pop(request_id, None) is not None:
                self.engine.abort(request_id)

    def _write(self) -> BadLine | None:
        """Write the answers that are due; returns the failed item that ends the run."""
        while self._hand and self._hand[0].ended:
            opened = self._hand.popleft()
            if opened.failed is None:
                self.sink.write(opened.answer())
                self.written += 1
                continue
            bad = BadLine(opened.item.number, opened.failed)
            if not self.skip:
                return bad
            self._pass_over(bad)
        return None

    def _pass_over(self, bad: BadLine) -> None:
        self.skipped += 1
        self.on_bad(bad)

    def _abandon(self) -> None:
        """Let everything in hand go."""
        for opened in self._hand:
            self._drop(opened)
        self._hand.clear()
