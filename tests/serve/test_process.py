"""FAULTS.md S11 and S12, and what the command line says: the server as its own processes."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from retort.serve.server import http_config
from tests.serve import tiny

LONG = {"prompt": "the cat", "max_tokens": 480, "temperature": 0, "ignore_eos": True}


def worker_of(process) -> int:
    """Process id of the engine's process."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
        found = [int(pid) for pid in file.read().split()]
    if not found:  # started from another thread
        for task in os.listdir(f"/proc/{process.pid}/task"):
            with open(f"/proc/{process.pid}/task/{task}/children", encoding="ascii") as file:
                found += [int(pid) for pid in file.read().split()]
    assert len(found) == 1
    return found[0]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stream(served, results: list, body: dict) -> threading.Thread:
    def run():
        results.append(tiny.events(served.post("/v1/completions", **body, stream=True).text))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_s11_sigterm_drains_and_leaves_nothing_behind(folder, tmp_path):
    """Running streams finish, new requests go elsewhere, exit code 0, no orphan, port free."""
    flags = ("--drafter", "prompt-lookup", "--draft-budget", "4", "--shutdown-timeout", "200")
    env = tiny.slow_steps(tmp_path, 0.04)
    with tiny.as_command(folder, *flags, env=env) as (served, process):
        assert "Serving tiny on" in process.stdout.readline()
        worker = worker_of(process)
        assert served.complete(prompt="a secret sentence", max_tokens=3)["model"] == tiny.NAME
        results: list = []
        thread = stream(served, results, {**LONG, "n": 2})
        tiny.eventually(lambda: served.metric("num_requests_running") == 2)
        process.send_signal(signal.SIGTERM)
        tiny.eventually(lambda: served.http.get("/health").status_code == 503)
        late = served.post("/v1/completions", prompt="x")
        assert late.status_code == 503 and late.headers["retry-after"]
        thread.join(120)
        finished = [e["choices"][0]["finish_reason"] for e in results[0] if e["choices"]]
        assert finished.count("length") == 2, "the stream was not drained"
        assert process.wait(60) == 0
        assert not alive(worker)
        with socket.create_server(("127.0.0.1", served.port)):
            pass
        assert "secret" not in process.stdout.read(), "what clients send is not for the log"


def test_s11_what_does_not_finish_ends_with_an_error(folder):
    with tiny.in_process(folder) as served:
        served.engine.step = lambda: time.sleep(0.01) or []
        server, results = served.state["server"], []
        server._timeout = 0.2
        threads = [stream(served, results, LONG) for _ in range(2)]
        tiny.eventually(lambda: served.state["client"].rows == 2)
        server.handle_exit(signal.SIGTERM, None)
        for thread in threads:
            thread.join(60)
        assert [r[-1]["error"]["code"] for r in results] == ["shutting_down"] * 2


def test_s12_a_killed_engine_is_seen_and_answered(folder, tmp_path):
    env = tiny.slow_steps(tmp_path, 0.04)
    with tiny.as_command(folder, "--max-num-seqs", "64", env=env) as (served, process):
        worker = worker_of(process)
        results: list = []
        threads = [stream(served, results, {**LONG, "n": 32, "logprobs": 5}) for _ in range(2)]
        tiny.eventually(lambda: served.metric("num_requests_running") == 64)
        os.kill(worker, signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        assert [events[-1]["error"]["code"] for events in results] == ["engine_dead"] * 2
        assert served.http.get("/health").status_code == 503
        answer = served.post("/v1/completions", prompt="x")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_no_worker_outlives_its_server(folder):
    with tiny.as_command(folder) as (_, process):
        worker = worker_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        tiny.eventually(lambda: not alive(worker))


def test_an_engine_killed_while_it_loads_is_one_clear_line(folder):
    command = [sys.executable, "-m", "retort", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = f"/proc/{process.pid}/task/{process.pid}/children"

    def started():
        with open(children, encoding="ascii") as file:
            return file.read().split()

    tiny.eventually(started, 60)
    os.kill(int(started()[0]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert "the engine process ended before it was ready" in said.splitlines()[-1]
    assert "Traceback" not in said


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "retort", "serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def test_a_port_in_use_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command(str(folder), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "cannot listen on 127.0.0.1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--api-key-file", "missing.txt"), "missing.txt"),
        (("--chat-template", "missing.jinja"), "missing.jinja"),
        (("--port", "70000"), "--port"),
        (("--draft-budget", "many"), "many"),
        (("--max-cache-tokens", "5", "--max-model-len", "9"), "--max-cache-tokens"),
    ],
)
def test_wrong_flags_are_one_line(folder, flags, text):
    done = command(str(folder), *flags)
    assert done.returncode == 2 and text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_that_is_not_there(tmp_path):
    done = command(str(tmp_path / "nothing"), "--port", "0")
    assert done.returncode == 2 and "unknown folder" in done.stderr.splitlines()[-1]


def test_a_drafter_that_does_not_fit_is_the_users_error(folder, tiny_llama):
    done = command(str(folder), "--port", "0", "--drafter", str(tiny_llama))
    assert done.returncode == 2 and "vocabulary" in done.stderr.splitlines()[-1]


def test_help_is_quick_and_light(python):
    code = (
        "import sys, time; t = time.process_time(); from retort.cli import run\n"
        "run(['serve', '--help']); assert time.process_time() - t < 3\n"
        "assert 'torch' not in sys.modules and 'starlette' not in sys.modules"
    )
    assert "--drafter" in python(code)


def test_importing_retort_needs_no_server_packages(python):
    code = (
        "import sys\nfor name in ('starlette', 'uvicorn', 'msgspec', 'prometheus_client'):\n"
        "    sys.modules[name] = None\nimport retort; retort.Engine; print('fine')"
    )
    assert python(code).strip() == "fine"


def test_a_missing_extra_says_what_to_install(python):
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'starlette' else real(n, *a)\n"
        "from retort.cli import run; print(run(['serve', 'x']))"
    )
    assert python(code).strip() == "2"


def test_other_libraries_log_handlers_stay_as_they_are():
    """`logging.config.dictConfig`, uvicorn's default, closes every handler of the process."""
    closed = []

    class Handler(logging.StreamHandler):
        def close(self):
            closed.append(self)
            super().close()

    handler = Handler()
    http_config(None)
    assert not closed
    handler.close()
    assert closed == [handler]
