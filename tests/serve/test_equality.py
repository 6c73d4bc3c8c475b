"""FAULTS.md S17 and D22: a text does not depend on streaming, on speculation or on the company."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve import tiny

CLIENTS = 64


def request(i: int) -> dict:
    """One of many different requests: greedy, sampled, penalised, stopped."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1, "seed": i},
        {"temperature": 0.6, "seed": i, "top_p": 0.9, "presence_penalty": 0.7},
        {"temperature": 0, "stop": ["T:", "zzz"]},
    ]
    words = tiny.TEXT.split()
    prompt = " ".join(words[i % 7 : i % 7 + 3 + i % 9] * 2)
    return {"prompt": prompt, "max_tokens": 24 + i % 17, **kinds[i % len(kinds)]}


def expected(engine, i: int) -> str:
    given = request(i)
    sampled = given["temperature"] > 0
    options = {
        "max_new_tokens": given["max_tokens"],
        "do_sample": sampled,
        "temperature": given["temperature"] or 1.0,
        "seed": given.get("seed", 0),
        "top_p": given.get("top_p", 1.0),
        "presence_penalty": given.get("presence_penalty", 0.0),
        "stop_strings": given.get("stop"),
    }
    return engine.generate(given["prompt"], **options)[0].text


@pytest.fixture(scope="module")
def texts(engine):
    """What the engine says to each request, alone and without speculation."""
    return [expected(engine, i) for i in range(CLIENTS)]


def ask(served, i: int, stream: bool) -> str:
    answer = served.post("/v1/completions", **request(i), stream=stream)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json()["choices"][0]["text"]
    return "".join(e["choices"][0]["text"] for e in tiny.events(answer.text))


def watch_running(served) -> list[float]:
    """A list that grows with every value of the gauge of running requests."""
    metrics, seen = served.state["client"].metrics, []
    step = metrics.step

    def watch(before, gauges):
        step(before, gauges)
        found = re.search(rb"retort:num_requests_running\{.*\} (.*)", metrics.text())
        seen.append(float(found[1]))

    metrics.step = watch
    return seen


@pytest.mark.parametrize("stream", [False, True])
def test_64_clients_get_the_engines_texts(folder, texts, stream):
    with (
        tiny.in_process(folder) as served,
        ThreadPoolExecutor(CLIENTS) as pool,
        tiny.held(served.engine, after=2) as go,
    ):
        futures = [pool.submit(ask, served, i, stream) for i in range(CLIENTS)]
        tiny.eventually(lambda: served.state["client"].rows == CLIENTS)
        running = watch_running(served)
        go.set()
        assert [f.result(120) for f in futures] == texts
        assert max(running) == 8, "continuous batching did not fill the rows"
        assert served.metric("spec_decode_num_accepted_tokens") > 0
        served.wait_idle()


def test_a_stream_begins_before_it_ends(folder):
    """The first event arrives while the engine still works on the request."""
    body = {"prompt": "the cat", "max_tokens": 100, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    with (
        tiny.in_process(folder) as served,
        tiny.held(served.engine, after=3) as go,
        served.http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert served.engine.stats.steps <= 3 and served.engine.has_unfinished()
        go.set()
        assert "data: [DONE]" in list(lines)


def test_text_split_across_tokens_and_blocks(served, engine):
    """UTF-8 sequences and stop strings cut by tokens: streamed text equals whole text."""
    biased = {"logit_bias": {str(i): 6 for i in range(3, 259)}}  # single bytes
    for seed in range(6):
        options = {"prompt": "naïve 🙂 naïve 🙂", "max_tokens": 60, "seed": seed, **biased}
        whole = served.complete(**options, temperature=1)["choices"][0]["text"]
        parts = served.post("/v1/completions", **options, temperature=1, stream=True)
        assert "".join(e["choices"][0]["text"] for e in tiny.events(parts.text)) == whole
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        cut = served.complete(**options, temperature=1, stop=[stop])["choices"][0]
        assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"


def test_rows_that_come_and_go_change_nothing(served, texts):
    """Others start, leave in the middle and end while the same requests are answered."""
    stop = threading.Event()

    def disturb():
        body = {"prompt": "the old house", "max_tokens": 300, "stream": True, "seed": 1}
        while not stop.is_set():
            with served.http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert [ask(served, i, i % 2 == 0) for i in range(12)] == texts[:12]
    finally:
        stop.set()
        thread.join()
    served.wait_idle()
