"""What the HTTP process and the engine process say to each other: typed, msgpack, no pickle.

A frame is four bytes of length and one message.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from typing import Any

import msgspec
from msgspec import Struct

from retort.decode.params import SamplingParams
from retort.decode.request import RequestStats

_LENGTH = struct.Struct(">I")
Entry = dict[int, float]


class Configure(Struct, tag=True, frozen=True):
    """First frame to a new worker: the engine to build."""

    model: str
    drafter: str | None = None
    draft_budget: str | int = "auto"
    max_num_seqs: int = 16
    max_prefill_tokens: int = 512
    prefill_stretch: float | None = None
    max_cache_tokens: int | None = None
    prefix_cache_tokens: int = 0
    max_model_len: int | None = None
    dtype: str = "float32"
    device: str | None = None
    cpu_backend: str = "auto"
    trust_remote_code: bool = False


class Sampling(Struct, frozen=True, kw_only=True):
    """The fields of `SamplingParams` that travel: numbers and texts, no functions."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    eos_token_id: list[int] | None = None
    ignore_eos: bool = False
    stop_strings: list[str] | None = None
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def params(self) -> SamplingParams:
        """What the engine takes.

        Raises:
            ConfigurationError: a value is out of range.
        """
        return SamplingParams(**msgspec.structs.asdict(self))


class Add(Struct, tag=True, frozen=True):
    """A request, valid as far as the HTTP process can tell.

    Attributes:
        sample: which of the client's ``n`` choices this is; each draws noise of its own.
        stop_token_ids: ids that end the row, the model's own end token ignored or not.
        speculate: use the server's drafter.
        origins: tell who wrote each part of the text.
        prefix_group: whose kept prefixes it may start from, and adds to.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    sample: int = 0
    stop_token_ids: list[int] = []
    speculate: bool = True
    origins: bool = False
    prefix_group: str = ""


class Cancel(Struct, tag=True, frozen=True):
    """Nobody wants these requests any more."""

    ids: list[str]


class Stop(Struct, tag=True, frozen=True):
    """End the worker."""


class Ready(Struct, tag=True, frozen=True):
    """The engine stands; what the HTTP process must know of it."""

    vocab_size: int
    max_model_len: int
    capacity: int
    speculates: bool
    backend: str


class Failed(Struct, tag=True, frozen=True):
    """The engine could not be built; ``user`` where the user can mend it."""

    message: str
    user: bool


class Delta(Struct, frozen=True, omit_defaults=True):
    """What one request gained in one step.

    Attributes:
        tokens, text: new ids, and the text that became certain.
        logprobs: one entry a token, ``{id: log-probability}``.
        prompt_logprobs: entries from the prompt's second token on, with the first delta.
        spans: who wrote the new text, ``(origin, characters)``: "a" accepted draft, "c" the
            target's correction of a draft, "p" plain.
        finish: finish reason, in the last delta.
        queued: seconds that the request waited, with the first delta.
    """

    id: str
    tokens: list[int] = []
    text: str = ""
    logprobs: list[Entry] | None = None
    prompt_logprobs: list[Entry] | None = None
    spans: list[tuple[str, int]] | None = None
    finish: str | None = None
    error: str | None = None
    queued: float | None = None
    stats: RequestStats | None = None


class Gauges(Struct, frozen=True):
    """The worker's state after a step; counters grow from its start."""

    running: int = 0
    waiting: int = 0
    cached_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    packed_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    prefix_queries: int = 0
    prefix_hits: int = 0


class Step(Struct, tag=True, frozen=True):
    """What came of one step, or of messages between steps."""

    deltas: list[Delta]
    gauges: Gauges


ToWorker = Configure | Add | Cancel | Stop
FromWorker = Ready | Failed | Step

_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def frame(message: Any) -> bytes:
    """The bytes of one message."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_from_worker(reader: asyncio.StreamReader) -> FromWorker | None:
    """The worker's next message, None when it is gone."""
    try:
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return _from_worker.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Channel:
    """The worker's end of the socket; `send` may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message; what the other end no longer reads is dropped."""
        with self._lock:
            try:
                self._connection.sendall(frame(message))
            except OSError:  # the listener sees the end of the connection and ends the worker
                return

    def receive(self) -> ToWorker | None:
        """Wait for a message; None when the other end is gone."""
        head = self._exactly(_LENGTH.size)
        body = self._exactly(_LENGTH.unpack(head)[0]) if head else b""
        return _to_worker.decode(body) if body else None

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()

    def _exactly(self, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            try:
                part = self._connection.recv(size - len(got))
            except OSError:
                return b""
            if not part:
                return b""
            got += part
        return bytes(got)
