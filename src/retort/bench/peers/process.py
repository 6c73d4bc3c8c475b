"""Other engines in processes of their own: how they start, and how they are asked."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.errors import ConfigurationError
from retort.evaluate.decoding import Arm, Measurement, grouped_arm

MODES = ("plain", "lookup")


@dataclass(frozen=True)
class Peer:
    """An engine that runs in another Python; its script lies beside this file.

    Attributes:
        name: what its arms' names begin with.
        title: what people call it.
        flag: of the command line; the model's is this and ``-model``.
        script: answers a line of JSON for every line of JSON, the first unasked.
    """

    name: str
    title: str
    flag: str
    script: str


PEERS = (
    Peer("openvino", "OpenVINO GenAI", "--openvino", "openvino_genai_decode.py"),
    Peer("llama.cpp", "llama.cpp", "--llama-cpp", "llama_cpp_decode.py"),
)


def check(peer: Peer, python: str | None, model: str | None) -> None:
    """Refuse one flag without the other, and what is not there, before anything is loaded."""
    if bool(python) != bool(model):
        raise ConfigurationError(f"{peer.flag} and {peer.flag}-model go together")
    if python and not shutil.which(python):
        raise ConfigurationError(f"{peer.flag}: there is no Python {python}")
    if model and not Path(model).exists():
        raise ConfigurationError(f"{peer.flag}-model: there is no {model}")


def peer_arms(
    peer: Peer, python: str, model: str, threads: int
) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """An arm a mode, in a process each that stays up between repeats; with its settings."""
    return {f"{peer.name} {mode}": _arm(peer, python, model, threads, mode) for mode in MODES}


def _arm(
    peer: Peer, python: str, model: str, threads: int, mode: str
) -> tuple[Arm, dict[str, Any]]:
    command = [python, str(Path(__file__).with_name(peer.script)), model, str(threads), mode]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    sink, source = process.stdin, process.stdout

    def answer(failed: str) -> dict[str, Any]:
        line = source.readline()
        if not line:
            raise ConfigurationError(f"{python} {failed} {peer.title} on {model}; see above")
        return json.loads(line)

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Measurement:
        request = {"prompts": list(map(list, prompts)), "max_new_tokens": max_new_tokens}
        with suppress(BrokenPipeError):  # then there is no answer either
            sink.write(json.dumps(request) + "\n")
            sink.flush()
        return Measurement(**answer("gave up decoding with"))

    told = answer("could not start")
    return grouped_arm(run), told
