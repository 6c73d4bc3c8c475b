"""``retort bench serve`` on a tiny server: what it counts is what the engine did."""

import asyncio
import itertools
import json
import math
import threading

import pytest

from retort import cli
from retort.bench.load import Load, Sample, read_prompts, run
from retort.bench.stream import Address
from retort.bench.summary import Quantiles, summarize
from retort.errors import ConfigurationError
from tests.serve import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def served(folder):
    with tiny.in_process(folder, api_keys=["key"]) as server:
        server.http.headers["authorization"] = "Bearer key"
        yield server


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    words = tiny.TEXT.split()
    rows = [{"prompt": " ".join(words[i : i + 6] * 2)} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(served, prompts, *more) -> int:
    arguments = ["bench", "serve", "--base-url", served.url, "--api-key", "key"]
    return cli.run([*arguments, "--prompts", str(prompts), *more])


def test_counts_are_the_engines(served, prompts, tmp_path, capsys):
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    before = {n: served.metric(n) for n in ("generation_tokens", "spec_decode_num_accepted_tokens")}
    flags = ["--request-rate", "50", "--max-tokens", "20", "--no-chat", "--json"]
    assert bench(served, prompts, *flags, "-o", str(out), "--html", str(html)) == 0
    shown = json.loads(capsys.readouterr().out)
    found = json.loads(out.read_text())
    summary, samples = found["summary"], found["samples"]
    assert shown == summary and summary["failed"] == 0 and summary["requests"] == len(samples) == 12
    grown = {n: served.metric(n) - v for n, v in before.items()}
    assert summary["tokens"] == sum(s["tokens"] for s in samples) == grown["generation_tokens"]
    assert summary["accepted_tokens"] == grown["spec_decode_num_accepted_tokens"] > 0
    assert summary["output_throughput"] == pytest.approx(summary["tokens"] / summary["seconds"])
    for sample in samples:
        assert 0 < sample["first"] <= sample["last"]
        assert sum(sample["gaps"]) <= sample["last"] - sample["first"]
    page = html.read_text()
    assert "Time to first token" in page and "http" not in page.replace("http-equiv", "")
    assert "key" not in json.dumps(found["provenance"]["arguments"].get("api_key", ""))


def test_texts_are_the_servers_and_fields_travel(served, prompts):
    address = Address.parse(f"{served.url}/v1", "key")
    texts = read_prompts(prompts, 4)
    load = Load(texts, max_tokens=10, chat=False, extra={"speculation": "off"})
    samples = asyncio.run(run(address, load))
    for text, sample in zip(texts, samples, strict=True):
        assert sample.text == served.complete(prompt=text, max_tokens=10)["choices"][0]["text"]
        assert sample.draft_tokens == 0 and sample.error is None


def test_arrivals_are_a_seeded_poisson_process():
    load = Load(["x"] * 4000, rate=5.0, seed=3)
    times = load.arrivals()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times == Load(["x"] * 4000, rate=5.0, seed=3).arrivals() and times[0] == 0
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.05) and spread == pytest.approx(0.2, rel=0.1)
    assert Load(["x"] * 3).arrivals() == [0, 0, 0]


def test_the_load_is_open(served, prompts):
    """Requests leave on time, however long the earlier ones take."""
    load = Load(read_prompts(prompts), rate=100.0, max_tokens=20, extra={"ignore_eos": True})
    with tiny.held(served.engine) as go:

        def release():
            tiny.eventually(lambda: served.state["client"].rows == len(load.prompts))
            go.set()

        thread = threading.Thread(target=release)
        thread.start()
        samples = asyncio.run(run(Address.parse(served.url, "key"), load))
        thread.join()
    assert max(s.sent for s in samples) < min(s.sent + s.last for s in samples)
    assert all(s.sent >= at for s, at in zip(samples, load.arrivals(), strict=True))
    assert all(s.error is None and s.tokens == 20 for s in samples)


def test_failures_are_counted_and_not_timed(served, prompts):
    load = Load(read_prompts(prompts), max_tokens=4, extra={"model": "another"})
    samples = asyncio.run(run(Address.parse(served.url, "key"), load))
    assert all("HTTP 404" in s.error for s in samples)
    summary = summarize([*samples, Sample(0.0, first=0.5, gaps=[0.1, 0.3], last=1.0, tokens=3)])
    assert (summary.requests, summary.failed, summary.tokens) == (13, 12, 3)
    assert summary.ttft == Quantiles(500.0, 500.0, 500.0)
    assert summary.itl == Quantiles(200.0, 200.0, 298.0)
    assert summary.tpot.mean == 250.0


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--base-url", "http://127.0.0.1:9"], 2, "every request failed"),
        (["--base-url", "ftp://x"], 2, "is not like http://"),
        (["--base-url", "http://x:99999"], 2, "--base-url"),
        (["--request-rate", "0"], 2, "above 0"),
        (["--extra-body", "{"], 2, "not JSON"),
        (["--extra-body", "[1]"], 2, "JSON object"),
        (["--prompts", "missing.jsonl"], 2, "cannot read"),
    ],
)
def test_what_is_wrong_is_one_line(served, prompts, capsys, flags, code, message):
    assert bench(served, prompts, "--request-rate", "100", *flags) == code
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_line_without_a_prompt_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ConfigurationError, match="line 2 has no prompt"):
        read_prompts(file)


def test_bench_decode_runs_the_script(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(["bench", "decode", "--help-me"])
    assert ended.value.code == 2 and "--prompts" in capsys.readouterr().err


def answer_of(parts, timeout=None):
    """What a client makes of a server that sends these bytes, and then stays silent."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        for part in (head, *parts):
            writer.write(part)
            await writer.drain()
        if timeout is None:
            writer.close()

    async def talk():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        load = Load(["x"], timeout=timeout)
        (sample,) = await run(address, load)
        server.close()
        return sample

    return asyncio.run(talk())


def said(text: str) -> bytes:
    return json.dumps({"choices": [{"delta": {"content": text}}]}).encode()


DIALECTS = {
    "plain": (b"data: ", b"\n\n"),
    "no space": (b"data:", b"\n\n"),
    "carriage returns": (b"data: ", b"\r\n\r\n"),
    "comments": (b": ping\n\ndata: ", b"\n\n: ping\n\n"),
    "a comment inside": (b": ping\ndata: ", b"\n\n"),
    "other fields": (b"event: message\nid: 7\ndata: ", b"\nretry: 5\n\n"),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_server_sent_events_in_every_dialect(name):
    before, after = DIALECTS[name]
    parts = [before + event + after for event in (said("a\u2028"), said("b"), b"[DONE]")]
    for whole in (parts, [bytes([byte]) for byte in b"".join(parts)]):
        sample = answer_of(whole)
        assert (sample.text, sample.error, len(sample.gaps)) == ("a\u2028b", None, 1)
    lines = said("a").replace(b": [", b":\ndata: [")
    assert answer_of([b"data: " + lines + b"\n\n", b"data: [DONE]\n\n"]).text == "a"


def test_a_server_that_falls_silent_is_given_up():
    sample = answer_of([b"data: " + said("a") + b"\n\n", b": ping\n\n"], timeout=0.5)
    assert sample.text == "a" and sample.error == "no end after 0.5 seconds"
    assert summarize([sample]).failed == 1
