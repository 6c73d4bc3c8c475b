"""``retort generate`` from file to file: streaming, in order, taken up again after a kill."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from retort.cli.generate import _RESUME
from retort.cli.output import say
from retort.cli.progress import bar
from retort.errors import ConfigurationError

if TYPE_CHECKING:
    from retort.batch.output import Sink
    from retort.batch.rows import BadLine
    from retort.batch.runner import Runner
    from retort.decode.engine import Engine

_STDIN = Path("-")
_SAY_SECONDS = 10.0


def run_batch(given: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Answer the lines of a file; returns the exit code.

    Args:
        given: the flags.
        options: for `Engine.from_pretrained`.

    Raises:
        ConfigurationError: a file cannot be read or written, or a line cannot be answered.
    """
    with _lines(given) as lines, _sink(given) as sink:
        total = _count(given)
        say(f"Loading {given['model']}")
        from retort.decode.engine import Engine

        with Engine.from_pretrained(given["model"], **options) as engine:
            _run(engine, sink, lines, given, total)
    return 0


def _run(
    engine: Engine, sink: Sink, lines: Iterable[bytes], given: Mapping[str, Any], total: int | None
) -> None:
    from retort.batch.rows import Reader
    from retort.batch.runner import Runner
    from retort.decode.params import SamplingParams

    batch = _openai(engine, given["model"])
    suffix = (given["prompts_file"] or _STDIN).suffix
    reader = Reader(
        SamplingParams(max_new_tokens=given["max_new_tokens"]),
        chat=given["chat"],
        text=suffix == ".txt",
        strict=bool(suffix),
        openai=batch,
        done=sink.done,
    )
    if sink.done:
        say(f"{len(sink.done)} rows are there already; going on after them")
    runner = Runner(engine, sink, given["on_error"] == "skip", lambda bad: say(_named(bad)))
    left = None if total is None else max(total - len(sink.done), 0)
    try:
        with Meter(runner, left) as meter:
            runner.on_progress = meter.update
            runner.run(reader.items(lines))
    except ConfigurationError as error:
        raise ConfigurationError(f"{given['prompts_file'] or 'prompts'} {error}") from None
    finally:
        if batch is not None:
            batch.close()
        say(meter.line())


def _named(bad: BadLine) -> str:
    return f"line {bad.number} passed over: {bad.reason}"


def _openai(engine: Engine, name: str) -> Any:
    if find_spec("msgspec") is None or engine.tokenizer is None:
        return None
    from retort.batch.openai import OpenAIBatch

    return OpenAIBatch(engine, Path(name).name)


@contextmanager
def _lines(given: Mapping[str, Any]) -> Iterator[Iterable[bytes]]:
    """Rows of --prompt, or lines of --input."""
    texts = [json.dumps({"prompt": text}).encode() for text in given["prompt"] or []]
    path = given["prompts_file"]
    if texts and path is not None:
        raise ConfigurationError("give either --prompt or --input together with --output")
    if path is None:
        yield texts
    elif path == _STDIN:
        yield sys.stdin.buffer
    else:
        with _open(path) as file:
            yield file


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def _sink(given: Mapping[str, Any]) -> Iterator[Sink]:
    from retort.batch.output import OutputFile, StandardOutput
    from retort.models.zoo import fingerprint

    path = given["output"]
    same = path.exists() and given["prompts_file"] not in (None, _STDIN)
    if same and path.samefile(given["prompts_file"]):
        raise ConfigurationError(f"--output {path} is the input")
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    sink: Sink
    if path == _STDIN:
        sink = StandardOutput()
    else:
        resume = {name: given[name] for name in _RESUME} | {"model": fingerprint(given["model"])}
        sink = OutputFile(path, resume, arguments, given["overwrite"])
    try:
        yield sink
    finally:
        sink.close()


def _count(given: Mapping[str, Any]) -> int | None:
    """How many lines there are, None for a pipe."""
    path = given["prompts_file"]
    if path is None:
        return len(given["prompt"])
    if not path.is_file():
        return None
    with _open(path) as file:
        found = sum(bool(line.strip()) for line in file)
    if not found:
        raise ConfigurationError(f"{path} holds no prompts; give one a line")
    return found


class Meter:
    """Rows, tokens a second, acceptance and the time that is left, on standard error.

    Args:
        runner: what it watches.
        total: rows to come, None where nobody knows.
    """

    def __init__(self, runner: Runner, total: int | None) -> None:
        self._runner, self._total = runner, total
        self._start = self._said = time.monotonic()
        self._bar = bar()
        self._task = self._bar.add_task("Generating", total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, ended: int) -> None:
        """So many rows have ended."""
        self._bar.update(self._task, completed=ended, description=self.line(rows=False))
        if self._bar.disable and time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            say(self.line())

    def line(self, rows: bool = True) -> str:
        """The state in words."""
        runner, stats = self._runner, self._runner.engine.stats
        ended, seconds = runner.written + runner.skipped, time.monotonic() - self._start
        parts = [f"{ended}{'' if self._total is None else f' of {self._total}'} rows"] * rows
        parts += [f"{stats.generated_tokens} tokens", f"{stats.generated_tokens / seconds:.0f}/s"]
        if stats.draft_tokens:
            parts.append(f"{stats.accepted_tokens / stats.draft_tokens:.0%} of drafts accepted")
        if runner.skipped:
            parts.append(f"{runner.skipped} passed over")
        if rows and self._total is not None and 0 < ended < self._total:
            left = seconds / ended * (self._total - ended)
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        return ", ".join(parts)
