"""Texts of a teacher behind an OpenAI-compatible URL, as rows to train on (SeqKD by text)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retort.disk import writing
from retort.errors import ConfigurationError, RetortError
from retort.train.checkpoint import held

logger = logging.getLogger(__name__)
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class RemoteTeacher:
    """A server and how it is asked.

    Attributes:
        url: up to and with ``/v1``.
        model: the name that it serves.
        max_tokens, temperature, seed: of each answer; temperature 0 is greedy.
        api_key: sent as a bearer token, never written down.
        timeout: seconds until a request counts as lost.
        retries: further tries after a lost request, 408, 409, 425, 429 or 5xx.
        workers: requests at once.
    """

    url: str
    model: str
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    retries: int = 5
    workers: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigurationError(f"url={self.url!r} must begin with http:// or https://")


def write_texts(teacher: RemoteTeacher, prompts: Sequence[Any], path: str | Path) -> Path:
    """Complete ``prompts`` (text, or chat messages) into a JSONL file of rows, or go on with it.

    A row has ``prompt``, ``completion`` and its ``index``; rows come in the order of prompts, a
    batch at a time, and the file trains as it is (method ``sft``). An empty answer gives no row.

    Raises:
        ConfigurationError: ``path`` holds texts of other prompts or of another teacher, or the
            server refuses a request (4xx).
        RetortError: the server does not answer; what was written stays.
    """
    path = Path(path)
    with writing(path), held(path):  # another run's prompts would come in between
        _go_on(teacher, prompts, path)
    return path


def _go_on(teacher: RemoteTeacher, prompts: Sequence[Any], path: Path) -> None:
    """Write what ``path`` lacks, in a file that no other run adds to."""
    made_by = _made_by(teacher)
    start = _written(path, prompts, made_by)
    size = 4 * teacher.workers
    opened = path.open("a", encoding="utf-8", errors="replace")  # half a surrogate is no text
    with ThreadPoolExecutor(teacher.workers) as pool, opened as file:
        for first in range(start, len(prompts), size):
            part = prompts[first : first + size]
            texts = list(pool.map(lambda prompt: complete(teacher, prompt), part))
            for index, (prompt, text) in enumerate(zip(part, texts, strict=True), first):
                if not text.strip():
                    logger.warning("prompt %d: the teacher wrote nothing, left out", index + 1)
                    continue
                row = _row(index, prompt, text) | {"made_by": made_by}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def complete(teacher: RemoteTeacher, prompt: Any) -> str:
    """One completion: of text as it stands, or the answer to chat messages."""
    body = {"model": teacher.model, "temperature": teacher.temperature, "seed": teacher.seed}
    body["max_tokens"] = teacher.max_tokens
    if isinstance(prompt, str):
        answer = _ask(teacher, "/completions", body | {"prompt": prompt})
    else:
        answer = _ask(teacher, "/chat/completions", body | {"messages": prompt})
    try:
        choice = answer["choices"][0]
        text = choice["text"] if isinstance(prompt, str) else choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise RetortError(f"{teacher.url} gave no completion: {answer!r:.200}") from error
    return text or ""


def served_model(url: str, api_key: str | None = None) -> str:
    """The one model that the server at ``url`` offers.

    Raises ConfigurationError, with their names, where it offers none or several.
    """
    answer = _ask(RemoteTeacher(url, "", api_key=api_key), "/models", None)
    try:
        names = [each["id"] for each in answer["data"]]
    except (KeyError, TypeError) as error:
        raise RetortError(f"{url} gave no list of models: {answer!r:.200}") from error
    if len(names) != 1:
        raise ConfigurationError(
            f"{url} offers {names}: name one of them in teacher_served_model_name"
        )
    return names[0]


def _ask(teacher: RemoteTeacher, route: str, body: dict[str, Any] | None) -> Any:
    """The answer to a POST of ``body``, to a GET without one."""
    headers = {"Content-Type": "application/json"}
    if teacher.api_key:
        headers["Authorization"] = f"Bearer {teacher.api_key}"
    url = teacher.url.rstrip("/") + route
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    reason = ""
    for attempt in range(teacher.retries + 1):
        pause = min(0.5 * 2**attempt, _LONGEST_WAIT)
        try:
            with urllib.request.urlopen(request, timeout=teacher.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.read()[:200].decode(errors='replace')}"
            if error.code not in _AGAIN:
                raise ConfigurationError(f"{url} refuses the request: {reason}") from error
            pause = _asked_pause(error.headers.get("Retry-After"), pause)
        except (OSError, ValueError) as error:  # no connection, a time-out, half an answer
            reason = " ".join(str(error).split())
        if attempt < teacher.retries:
            time.sleep(pause)
    raise RetortError(
        f"{url} did not answer {teacher.retries + 1} times ({reason}): start it, then run again; "
        "what was written is kept"
    )


def _asked_pause(header: str | None, otherwise: float) -> float:
    known = header is not None and header.isdigit()
    return min(float(header or 0), _LONGEST_WAIT) if known else otherwise


_FIRST = b'{"index": '


def _row(index: int, prompt: Any, text: str) -> dict[str, Any]:
    completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return {"index": index, "prompt": prompt, "completion": completion}


def _made_by(teacher: RemoteTeacher) -> str:
    kept = {k: asdict(teacher)[k] for k in ("model", "max_tokens", "temperature", "seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _written(path: Path, prompts: Sequence[Any], made_by: str) -> int:
    """The first prompt without a row; half a line of a killed process is cut off."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    after = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            index, same = row["index"], row["made_by"] == made_by
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{path}, row {number}: no text of a teacher") from None
        if not same or index >= len(prompts) or row["prompt"] != prompts[index]:
            raise ConfigurationError(
                f"{path}, row {number}: of another prompt, model or limit; name another file"
            )
        after = index + 1
    if rest and not lines and not rest.startswith(_FIRST[: len(rest)]):
        raise ConfigurationError(f"{path} is not a file of a teacher's texts: name another file")
    os.truncate(path, len(content) - len(rest))  # not before all of it is known to be ours
    return after
