"""Kept prefixes through the server: usage, metrics, and never from one API key to another."""

import pytest

from tests.serve import tiny

KEYS = ["first key", "second key"]
SYSTEM = tiny.TEXT * 2
FIELDS = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def guarded(folder):
    """A fresh server with two keys."""
    with tiny.in_process(folder, api_keys=KEYS) as server:
        server.http.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield server


def ask(served, words: str, key: str = KEYS[0], **more) -> tuple[str, int, int]:
    """Text, prompt tokens, and how many of them were not read again."""
    body = {"prompt": SYSTEM + words, **FIELDS, **more}
    answer = served.http.post(
        "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
    ).json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], usage["prompt_tokens"], cached


def test_a_shared_system_prompt_is_read_once(guarded, engine):
    first, second = ask(guarded, "the cat"), ask(guarded, "the old house")
    assert first[2] == 0 and second[2] >= 32
    for (text, *_), words in ((first, "the cat"), (second, "the old house")):
        options = {"max_new_tokens": 8, "ignore_eos": True}
        assert engine.generate(SYSTEM + words, **options)[0].text == text
    assert guarded.metric("prefix_cache_queries") == first[1] + second[1]
    assert guarded.metric("prefix_cache_hits") == second[2]


def test_one_keys_prefixes_never_serve_another(guarded):
    assert ask(guarded, "the cat")[2] == 0
    assert ask(guarded, "the cat", KEYS[1])[2] == 0
    assert ask(guarded, "the cat")[2] > 0
    assert ask(guarded, "the cat", KEYS[1])[2] > 0


def test_a_salt_keeps_a_clients_users_apart(guarded):
    assert ask(guarded, "the cat", cache_salt="a")[2] == 0
    assert ask(guarded, "the cat", cache_salt="b")[2] == 0
    assert ask(guarded, "the cat", cache_salt="a")[2] > 0


def test_choices_of_one_prompt_count_it_once(guarded):
    body = {"prompt": SYSTEM, "n": 3, **FIELDS}
    for expected in (False, True):
        usage = guarded.post("/v1/completions", **body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == expected


def test_echoed_prompts_are_scored_whole(guarded):
    fields = {"echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0, "prompt": SYSTEM}
    answers = [guarded.post("/v1/completions", **fields).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert None not in answers[1]["choices"][0]["logprobs"]["token_logprobs"][1:]
