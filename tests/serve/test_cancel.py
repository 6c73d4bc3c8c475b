"""FAULTS.md S7 to S10: clients that leave, stop reading, or come in crowds."""

import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from retort.serve.client import Limits
from retort.serve.errors import ApiError
from retort.serve.messages import Gauges
from tests.serve import tiny

LONG = {"prompt": "the cat", "max_tokens": 480, "temperature": 0, "ignore_eos": True}


def raw(port: int, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """Send a request by hand and leave the answer to the caller."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer


@pytest.mark.parametrize("after", [0, 3], ids=["before the first token", "in the middle"])
@pytest.mark.parametrize("stream", [False, True])
def test_s7_leaving_frees_the_row_without_another_step(served, stream, after):
    served.wait_idle()
    before, aborted = served.engine.stats.steps, served.metric("request_success")
    with tiny.held(served.engine, after):
        connection = raw(served.port, {**LONG, "stream": stream})
        tiny.eventually(served.engine.has_unfinished)
        tiny.eventually(lambda: served.engine.stats.steps == before + after)
        while stream and after and b"data: " not in connection.recv(4096):
            pass
        connection.close()
        tiny.eventually(lambda: not served.engine.has_unfinished())
        served.wait_idle()
        assert served.engine.stats.steps == before + after
        assert served.engine.target.cache.rows == ()
    assert served.metric("request_success") == aborted + 1
    assert served.metric("request_success", finished_reason="abort") > 0


def test_a_cancel_takes_effect_before_the_next_step(served):
    """Messages are taken before every step: after a cancel no further step has the row."""
    worker = served.worker
    tiny.eventually(lambda: not served.engine.has_unfinished())
    connections, cancelled = queue.Queue(), threading.Event()
    step, seen = served.engine.step, []

    def call():
        seen.append(len(worker._rows))
        if len(seen) == 3:
            connections.get(timeout=60).close()  # the engine can be faster than the main thread
            tiny.eventually(lambda: not worker._inbox.empty())  # the cancel has arrived
            cancelled.set()
        return step()

    served.engine.step = call
    try:
        connections.put(raw(served.port, {**LONG, "stream": True}))
        assert cancelled.wait(60)
        tiny.eventually(lambda: not served.engine.has_unfinished())
        assert len(seen) == 3
    finally:
        served.engine.step = step


def test_s8_a_client_that_stops_reading_is_cut_off(folder):
    body = {**LONG, "stream": True, "logprobs": 20, "n": 8}
    with tiny.in_process(folder, send_timeout=0.5, send_buffer=8192) as served:
        stalled = [raw(served.port, body, receive_buffer=4096) for _ in range(2)]
        other = served.complete(prompt="the old house", max_tokens=20)
        assert other["usage"]["completion_tokens"] == 20
        tasks = served.state["server"].server_state.tasks
        tiny.eventually(lambda: not tasks, 60)
        served.wait_idle()
        for connection in stalled:
            assert b"[DONE]" not in read_all(connection)
            connection.close()


def test_s9_200_cancelled_requests_leave_nothing_behind(served):
    connections = [raw(served.port, {**LONG, "stream": True, "seed": i}) for i in range(200)]
    tiny.eventually(lambda: served.state["client"].rows > 100)
    for connection in connections:
        connection.close()
    started = time.process_time()  # of server, engine and client; what others do does not count
    served.complete(prompt="the cat", max_tokens=3)
    assert time.process_time() - started < 5
    served.wait_idle()
    assert served.state["client"]._live == {} and served.state["client"]._tokens == 0


def test_s10_a_full_queue_says_when_to_come_back(folder):
    limits = Limits(max_num_seqs=1, max_num_queued_reqs=2)
    with tiny.in_process(folder, limits=limits) as served, tiny.held(served.engine) as go:
        held = [raw(served.port, LONG) for _ in range(3)]
        tiny.eventually(lambda: served.state["client"].rows == 3)
        refused = served.post("/v1/completions", **LONG)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        never = served.post("/v1/completions", prompt="x", n=4)
        assert never.status_code == 400, "what can never be let in must not be tried again"
        seen = watch_submissions(served)
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=9) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            create = client.completions.with_raw_response.create
            future = pool.submit(create, model=tiny.NAME, prompt="the", max_tokens=2)
            tiny.eventually(lambda: seen == [429])
            for connection in held:
                connection.close()
            go.set()
            answer = future.result(120)
        assert answer.parse().usage.completion_tokens == 2
        assert answer.retries_taken >= 1 and seen[0] == 429 and seen[-1] == 200


def watch_submissions(served) -> list[int]:
    """A list that grows with each request: 200 where it was let in, or the refusal's status."""
    client, seen = served.state["client"], []
    submit = client.submit

    def call(adds):
        try:
            generation = submit(adds)
        except ApiError as error:
            seen.append(error.status)
            raise
        seen.append(200)
        return generation

    client.submit = call
    return seen


def test_token_limits(folder):
    limits = Limits(max_num_seqs=2, max_queued_tokens=500)
    with tiny.in_process(folder, limits=limits) as served, tiny.held(served.engine) as go:
        held = raw(served.port, LONG)
        tiny.eventually(lambda: served.state["client"].rows == 1)
        assert served.post("/v1/completions", prompt="x", max_tokens=300).status_code == 429
        assert served.post("/v1/completions", prompt="x", max_tokens=300, n=2).status_code == 400
        held.close()
        served.wait_idle()
        go.set()
        assert served.complete(prompt="x", max_tokens=300)


def test_s10_first_in_first_out_over_a_thousand_requests(folder):
    limits = Limits(max_num_seqs=1, max_num_queued_reqs=2000)
    with tiny.in_process(folder, limits=limits) as served:
        order = []
        start = served.worker._start
        served.worker._start = lambda add, queued: order.append(add.id) or start(add, queued)
        bodies = [{"prompt": [[5 + i % 50]] * 50, "max_tokens": 1} for i in range(20)]
        connections = []
        for number, body in enumerate(bodies, 1):
            connections.append(raw(served.port, body))
            tiny.eventually(lambda n=number: len(order) + _waiting(served) >= 50 * n)
        tiny.eventually(lambda: len(order) == 1000, 120)
        arrived = list(dict.fromkeys(i.rsplit("-", 1)[0] for i in order))
        wanted = [f"{job}-{n}" for job in arrived for n in range(50)]
        assert order == wanted, "a later request overtook an earlier one"
        for connection in connections:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()


def _waiting(served) -> int:
    return len(served.worker._waiting)


def test_deadlines(served):
    with tiny.held(served.engine, after=3):
        answer = served.post("/v1/completions", **LONG, timeout=0.2)
        assert answer.status_code == 408 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "deadline"
        served.wait_idle()
    with tiny.held(served.engine, after=3):
        events = tiny.events(served.post("/v1/completions", **LONG, timeout=3, stream=True).text)
        assert events[0]["choices"] and events[-1]["error"]["code"] == "deadline"
        served.wait_idle()


def test_gauges_start_at_nothing():
    assert Gauges().running == Gauges().waiting == 0
