"""A tiny random chat model with a byte-level tokenizer, saved as a folder, and servers on it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retort import Engine
from retort.models.zoo import load_model, load_tokenizer
from retort.serve.app import Service, build_app
from retort.serve.client import EngineClient, Limits
from retort.serve.messages import Channel, Configure
from retort.serve.metrics import Metrics
from retort.serve.prompts import Prompts
from retort.serve.server import DrainingServer, http_config
from retort.serve.worker import Worker

CONTEXT = 512
NAME = "tiny"
TEXT = "the old house in the street, don't they know it's green? the cat sat on the mat. naïve 🙂 "
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(folder: Path) -> Path:
    """Write model and tokenizer; weights are enlarged so that next tokens are decided."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )


class Served:
    """A running server: its address, and the engine where it runs in this process."""

    def __init__(self, url: str, engine: Engine | None = None, worker: Worker | None = None):
        self.url, self.engine, self.worker = url, engine, worker
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body) -> dict:
        """A greedy completion that must succeed."""
        response = self.post("/v1/completions", **{"temperature": 0, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith((f"retort:{name}{{", f"retort:{name}_total{{")) and all(
                f'{k}="{v}"' in line for k, v in labels.items()
            ):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until no row runs or waits."""
        eventually(
            lambda: self.metric("num_requests_running") + self.metric("num_requests_waiting") == 0,
            seconds,
        )


def eventually(condition, seconds: float = 60) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def load_engine(folder: Path, **options) -> Engine:
    """A fresh engine; draft lengths are fixed, so that drafts are made whatever the clock says."""
    given = {"drafter": "prompt-lookup", "draft_budget": 4, "max_batch_size": 8}
    given |= {"prefix_cache_tokens": 2048, **options}
    return Engine(load_model(folder), load_tokenizer(folder), **given)


@contextmanager
def held(engine: Engine, after: int = 0):
    """The engine makes ``after`` steps and then none, so that nothing ends before a test looks.

    Messages are taken all the while. Yields an event that lets it go on, as the end of the block
    does; so no test needs to be faster than the engine.
    """
    step, go, made = engine.step, threading.Event(), 0

    def call():
        nonlocal made
        if made >= after and not go.is_set():
            time.sleep(0.002)
            return []
        made += 1
        return step()

    engine.step = call
    try:
        yield go
    finally:
        go.set()
        engine.step = step


@contextmanager
def in_process(
    folder: Path,
    engine: Engine | None = None,
    limits: Limits | None = None,
    send_buffer: int | None = None,
    **more,
):
    """A server whose engine runs in a thread of this process: quick to start, open to tampering."""
    limits = limits or Limits(max_num_seqs=8)
    engine = engine or load_engine(folder, max_batch_size=limits.max_num_seqs)
    ours, theirs = socket.socketpair()
    worker = Worker(engine, Channel(theirs), Configure(NAME, max_num_seqs=limits.max_num_seqs))
    thread = threading.Thread(target=worker.run, daemon=True)
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    state: dict = {}
    http = threading.Thread(
        target=lambda: asyncio.run(_serve(folder, limits, ours, listener, state, more))
    )
    thread.start()
    http.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    served = Served(url, engine, worker)
    try:
        eventually(lambda: "server" in state and state["server"].started)
        served.state = state
        yield served
    finally:
        served.http.close()
        if "server" in state:
            state["server"].should_exit = True
        http.join(60)
        thread.join(60)
        engine.close()


async def _serve(folder, limits, connection, listener, state, more):
    client = EngineClient(limits, Metrics(NAME))
    ready = await client.connect(connection)
    client.metrics.capacity = ready.capacity
    service = Service(client, Prompts(load_tokenizer(folder)), [NAME], **more)
    config = http_config(build_app(service))
    config.timeout_graceful_shutdown = 1
    server = DrainingServer(config, client, timeout=2)
    loop = asyncio.get_running_loop()
    state.update(server=server, client=client, service=service, loop=loop)
    await server.serve(sockets=[listener])
    await client.close()


SLOW = """\
import os, sys, time
from importlib.machinery import PathFinder

class Slow:
    def find_spec(self, name, path, target=None):
        if name != "retort.decode.engine":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module
        def slowed(module):
            load(module)
            step = module.Engine.step
            def call(self):
                time.sleep(float(os.environ["TEST_STEP_SECONDS"]))
                return step(self)
            module.Engine.step = call
        spec.loader.exec_module = slowed
        return spec

sys.meta_path.insert(0, Slow())
"""


def slow_steps(folder: Path, seconds: float) -> dict[str, str]:
    """Environment of a command whose engine takes so much longer for a step.

    Processes of their own cannot be held; a step so long that nothing ends while a test looks is
    put in where Python starts up.
    """
    (folder / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path.rstrip(os.pathsep), "TEST_STEP_SECONDS": str(seconds)}


@contextmanager
def as_command(folder: Path, *flags: str, env: dict | None = None):
    """``retort serve`` as its users start it; yields the server and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "retort", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--served-model-name", NAME, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    served = Served(f"http://127.0.0.1:{port}")
    try:
        eventually(lambda: process.poll() is not None or _up(served), 240)
        assert process.poll() is None, process.stdout.read()
        yield served, process
    finally:
        served.http.close()
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def _up(served: Served) -> bool:
    try:
        return served.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def events(text: str) -> list[dict]:
    """The JSON events of a whole stream."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [json.loads(part) for part in parts if part != "[DONE]"]
