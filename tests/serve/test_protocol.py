"""Schemas and messages on their own."""

import asyncio
import socket

import msgspec
import pytest

from retort import SamplingParams
from retort.decode.request import RequestStats
from retort.serve.errors import ApiError
from retort.serve.messages import (
    Add,
    Cancel,
    Channel,
    Configure,
    Delta,
    Gauges,
    Ready,
    Sampling,
    Step,
    Stop,
    frame,
    read_from_worker,
)
from retort.serve.metrics import Metrics
from retort.serve.protocol import ChatRequest, CompletionRequest, parse


def test_a_full_request_is_read():
    body = (
        b'{"model": "m", "prompt": ["a"], "n": 2, "stop": ["x", "y"], "seed": -5, "stream": true, '
        b'"stream_options": {"include_usage": true, "include_origins": true}, "user": "me"}'
    )
    spec = parse(body, CompletionRequest)
    assert spec.choices == 2 and spec.stops == ["x", "y"] and spec.usage_chunk and spec.origins


def test_origins_are_of_streams_only():
    body = b'{"prompt": "a", "stream_options": {"include_origins": true}}'
    assert not parse(body, CompletionRequest).origins


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "x", "n": 0}', "n"),
        (b'{"prompt": "x", "logit_bias": {"1": 1e9}}', "logit_bias[...]"),
        (b"{}", "prompt"),
        (b'{"prompt": "x", "tools": [1]}', "tools"),
    ],
)
def test_the_field_at_fault_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        parse(body, CompletionRequest)
    assert caught.value.status == 400 and caught.value.param == param


@pytest.mark.parametrize("slashes", range(1, 7))
def test_nul_is_refused_and_its_spelling_is_text(slashes):
    """In JSON ``\\\\u0000`` is a backslash and five characters."""
    body = b'{"prompt": "a' + b"\\" * slashes + b'u0000"}'
    if slashes % 2:
        with pytest.raises(ApiError, match="U\\+0000"):
            parse(body, CompletionRequest)
    else:
        text = "a" + "\\" * (slashes // 2) + "u0000"
        assert parse(body, CompletionRequest).prompt == text


def test_messages_need_a_known_role():
    with pytest.raises(ApiError, match="role"):
        parse(b'{"messages": [{"role": "x", "content": "y"}]}', ChatRequest)


def test_what_travels_is_what_the_engine_takes():
    assert SAMPLING.params() == SamplingParams(
        max_new_tokens=3, logit_bias={5: 1.5}, stop_strings=["a"], seed=-(2**63)
    )


SAMPLING = Sampling(max_new_tokens=3, logit_bias={5: 1.5}, stop_strings=["a"], seed=-(2**63))
TO_WORKER = [Add("a", [1, 2], SAMPLING, 1, [7], False, True), Cancel(["a"]), Configure("m"), Stop()]
FROM_WORKER = [
    Ready(9, 8, 7, True, "torch"),
    Step([Delta("a", [1], "x", [{1: -0.5}], None, [("a", 1)], "stop")], Gauges(1, 2)),
    Step([Delta("a", stats=RequestStats(1, 2, 3, 4))], Gauges(accepted_per_position=[3, 1])),
]


def test_messages_survive_the_socket():
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    for message in TO_WORKER:
        ours.sendall(frame(message))
        assert channel.receive() == message
    ours.close()
    assert channel.receive() is None
    channel.send(Stop())  # nobody listens: dropped
    channel.close()


def test_the_workers_messages_survive_too():
    async def talk():
        reader = asyncio.StreamReader()
        for message in FROM_WORKER:
            reader.feed_data(frame(message))
        reader.feed_data(frame(FROM_WORKER[0])[:6])
        reader.feed_eof()
        return [await read_from_worker(reader) for _ in range(4)]

    assert asyncio.run(talk()) == [*FROM_WORKER, None]


def test_a_message_that_is_not_ours_is_refused():
    ours, theirs = socket.socketpair()
    body = msgspec.msgpack.encode({"type": "Exec", "code": "x"})
    ours.sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises(msgspec.ValidationError):
        Channel(theirs).receive()
    ours.close()
    theirs.close()


NAMES = [
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total"),
    *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
    *("spec_decode_num_accepted_tokens_total", "time_to_first_token_seconds_bucket"),
    *("inter_token_latency_seconds_sum", "e2e_request_latency_seconds_count"),
    "request_queue_time_seconds_count",
]


def test_metrics_have_the_names_that_dashboards_know():
    metrics = Metrics("m", capacity=10)
    metrics.step(Gauges(), Gauges(2, 3, 5, 1, 7, 9, 4, 8, 6, [4, 2]))
    metrics.finished("stop")
    text = metrics.text().decode()
    for name in NAMES:
        assert f'\nretort:{name}{{model_name="m"' in text or f"\nretort:{name}{{" in text, name
    assert 'retort:kv_cache_usage_perc{model_name="m"} 0.5' in text
    assert (
        'retort:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="1"} 2.0'
        in text
    )
    assert 'retort:request_success_total{finished_reason="stop",model_name="m"} 1.0' in text


def test_counters_grow_by_what_is_new():
    metrics = Metrics("m")
    first, second = (
        Gauges(drafts=4, accepted_per_position=[4]),
        Gauges(drafts=5, accepted_per_position=[5, 1]),
    )
    metrics.step(Gauges(), first)
    metrics.step(first, second)
    text = metrics.text().decode()
    assert 'spec_decode_num_drafts_total{model_name="m"} 5.0' in text
    assert 'per_pos_total{model_name="m",position="0"} 5.0' in text
