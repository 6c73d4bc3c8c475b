"""The official OpenAI client must not notice the difference."""

import json
import subprocess
import sys

import openai
import pytest

from tests.serve import tiny

CAT = [{"role": "user", "content": "the cat sat on the mat"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(client):
    def call(prompt="the cat sat", **options):
        options = {"temperature": 0, "max_tokens": 24, **options}
        return client.completions.create(model=tiny.NAME, prompt=prompt, **options)

    return call


@pytest.fixture
def chat(client):
    def call(**options):
        options = {"temperature": 0, "max_tokens": 24, "messages": CAT, **options}
        return client.chat.completions.create(model=tiny.NAME, **options)

    return call


def joined(chunks) -> str:
    return "".join(c.choices[0].text for c in chunks if c.choices)


def test_models(client):
    assert [m.id for m in client.models.list()] == [tiny.NAME]
    assert client.models.retrieve(tiny.NAME).id == tiny.NAME


def test_completion(complete, engine):
    answer = complete()
    assert answer.object == "text_completion" and answer.model == tiny.NAME
    choice = answer.choices[0]
    assert choice.text == engine.generate("the cat sat", max_new_tokens=24)[0].text
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_completion_streams(complete):
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3 and joined(chunks) == complete().choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["length"]


def test_no_usage_chunk_unless_asked(complete):
    assert all(c.choices for c in complete(stream=True))


def test_chat(chat, engine):
    answer = chat()
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == engine.generate([CAT], max_new_tokens=24)[0].text


def test_chat_streams(chat):
    chunks = list(chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == chat().choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {
        "chat.completion.chunk"
    }


def test_chat_n_and_usage_stream(chat):
    options = {"n": 2, "temperature": 1, "seed": 4}
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **options))
    texts, whole = ["", ""], chat(**options)
    for choice in (c for chunk in chunks for c in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in whole.choices] and texts[0] != texts[1]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_n_streams_with_logprobs(chat):
    options = {"n": 3, "temperature": 1, "seed": 9, "logprobs": True, "top_logprobs": 2}
    found = [[], [], []]
    for choice in (c for chunk in chat(stream=True, **options) for c in chunk.choices):
        found[choice.index] += choice.logprobs.content if choice.logprobs else []
    whole = [choice.logprobs.content for choice in chat(**options).choices]
    assert found == whole and all(len(content) == 24 for content in whole)


def test_the_clients_own_stream_helper(client, chat):
    options = {"model": tiny.NAME, "messages": CAT, "temperature": 0, "seed": 1}
    stop = chat(max_tokens=60).choices[0].message.content[20:22]
    with client.chat.completions.stream(**options, stop=stop, max_tokens=60) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.message.content == chat(max_tokens=60, stop=stop).choices[0].message.content


@pytest.mark.parametrize("name", ["tools", "response_format"])
def test_what_is_not_offered_is_the_clients_bad_request(chat, name):
    given = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "json_object"},
    }
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported") as caught:
        chat(**{name: given[name]})
    assert caught.value.param == name and caught.value.code == "unsupported"


def test_a_closed_stream_frees_its_row(served, chat):
    with tiny.held(served.engine, after=3):
        with chat(stream=True, max_tokens=400, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
        served.wait_idle()


def test_max_completion_tokens(chat):
    answer = chat(max_tokens=openai.omit, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("prompt", ["the cat", ["the cat", "on the mat"], [5, 6, 7], [[5, 6], [7]]])
def test_prompts_in_four_forms(complete, engine, prompt):
    answer = complete(prompt, max_tokens=6)
    expected = [o.text for o in engine.generate(prompt, max_new_tokens=6)]
    assert [c.text for c in answer.choices] == expected
    assert [c.index for c in answer.choices] == list(range(len(expected)))


def test_n_gives_independent_choices_that_a_seed_repeats(complete, engine):
    answer = complete(n=3, temperature=1, seed=11)
    texts = [c.text for c in answer.choices]
    given = {"max_new_tokens": 24, "do_sample": True, "seed": 11}
    assert texts == [o.text for o in engine.generate("the cat sat", n=3, **given)]
    assert len(set(texts)) == 3 and texts[0] == complete(temperature=1, seed=11).choices[0].text
    assert 24 < answer.usage.completion_tokens <= 72


def test_without_a_seed_texts_differ(complete):
    assert complete(temperature=1).choices[0].text != complete(temperature=1).choices[0].text


def test_n_streams_interleave_and_agree(complete):
    options = {"n": 3, "temperature": 1, "seed": 11}
    texts = ["", "", ""]
    for chunk in complete(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in complete(**options).choices]


def test_stop(complete):
    text = complete(max_tokens=60).choices[0].text
    stop = text[12:14]
    cut = complete(max_tokens=60, stop=[stop, "never there"])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert joined(complete(max_tokens=60, stop=stop, stream=True)) == cut.choices[0].text


def test_stop_token_ids_and_min_tokens(served, engine):
    ids = engine.generate("the cat sat", max_new_tokens=30)[0].token_ids
    options = {"prompt": "the cat sat", "max_tokens": 30, "stop_token_ids": [ids[4]]}
    cut = served.complete(**options)
    assert cut["usage"]["completion_tokens"] == ids.index(ids[4]) + 1
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert served.complete(**options, min_tokens=10)["usage"]["completion_tokens"] > 10
    assert served.complete(**options, ignore_eos=True)["choices"] == cut["choices"]


def test_end_of_sequence_and_ignore_eos(served):
    biased = {"prompt": "the cat", "max_tokens": 9, "logit_bias": {"0": 100}}
    ended = served.complete(**biased)
    assert ended["choices"][0] | {"text": ""} == ended["choices"][0]
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == 1
    assert served.complete(**biased, ignore_eos=True)["usage"]["completion_tokens"] == 9


def test_completion_logprobs(complete):
    choice = complete(logprobs=3, max_tokens=6).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == value == max(top.values()) and 1 <= len(top) <= 3
    assert logprobs.text_offset[0] == 0


def test_logprobs_with_echo_hold_the_prompt(complete):
    choice = complete("the cat sat", logprobs=1, echo=True, max_tokens=2).choices[0]
    assert choice.text.startswith("the cat sat")
    assert "".join(choice.logprobs.tokens).startswith("the cat sat")
    assert choice.logprobs.token_logprobs[0] is None
    first = next(iter(complete("the cat sat", logprobs=1, echo=True, stream=True)))
    assert first.choices[0].text.startswith("the cat sat")
    assert first.choices[0].logprobs.token_logprobs[0] is None


def test_chat_logprobs_streamed_and_not(chat):
    choice = chat(logprobs=True, top_logprobs=2, max_tokens=8).choices[0]
    answer = choice.logprobs.content
    assert len(answer) == 8
    for item in answer:
        assert len(item.top_logprobs) == 2 and item.top_logprobs[0].logprob == item.logprob
    spelled = b"".join(bytes(item.bytes) for item in answer)
    assert spelled.decode("utf-8", "replace") == choice.message.content
    streamed = []
    for chunk in chat(logprobs=True, top_logprobs=2, max_tokens=8, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [(i.token, i.logprob) for i in streamed] == [(i.token, i.logprob) for i in answer]


def test_penalties_bias_and_truncation_change_the_text_as_in_the_engine(served, engine):
    cases = [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"40": 8.5}}, {"logit_bias": {40: 8.5}}),
        (
            {"temperature": 0.7, "seed": 5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
            {"do_sample": True, "temperature": 0.7, "seed": 5}
            | {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
        ),
    ]
    for ours, theirs in cases:
        answer = served.complete(prompt="the cat sat", max_tokens=20, **ours)
        expected = engine.generate("the cat sat", max_new_tokens=20, **theirs)[0].text
        assert answer["choices"][0]["text"] == expected, ours


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_everything_at_once_still_speculates(served, temperature):
    """Logprobs, a penalty, a seed and a stop string do not switch speculation off."""
    options = {"logprobs": 2, "presence_penalty": -1.5, "seed": 3, "stop": ["never there"]}
    options |= {"prompt": "the cat sat on the mat. the cat sat on the mat. the cat"}
    options |= {"max_tokens": 80, "temperature": temperature, "ignore_eos": True}
    options |= {"logit_bias": {str(i): 9 for i in range(60, 64)}}  # few tokens: texts repeat
    answer, plain = served.complete(**options), served.complete(**options, speculation="off")
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 80
    assert answer["choices"] == plain["choices"], "numbers too"


def test_speculation_off_is_the_same_text_without_drafts(served):
    options = {"prompt": "the cat sat on the mat", "max_tokens": 80}
    on, off = served.complete(**options), served.complete(**options, speculation="off")
    assert on["choices"][0]["text"] == off["choices"][0]["text"]
    assert on["usage"]["completion_tokens_details"]["accepted_tokens"] > 0
    assert off["usage"]["completion_tokens_details"]["draft_tokens"] == 0
    assert off["usage"]["completion_tokens_details"]["steps"] == 80


def test_errors_are_the_clients_own_exceptions(client, complete):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(temperature=1.9e9)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="x")


def test_origins_cover_the_streamed_text(served):
    body = {"messages": CAT, "stream": True, "max_tokens": 120, "temperature": 0}
    answer = served.post(
        "/v1/chat/completions", **body, stream_options={"include_origins": True}
    ).text
    events = tiny.events(answer)
    origins = {"a": 0, "c": 0, "p": 0}
    for choice in (e["choices"][0] for e in events):
        spans = choice["retort"]["spans"]
        assert sum(n for _, n in spans) == len(choice["delta"].get("content", ""))
        for origin, count in spans:
            origins[origin] += count
    assert origins["a"] > 0 and origins["p"] > 0
    last = events[-1]["choices"][0]["retort"]
    assert 0 < last["accepted_tokens"] <= last["draft_tokens"]


def test_no_character_of_an_answer_ends_a_line_of_the_stream(served):
    """httpx and huggingface_hub cut lines where `str.splitlines` does, inside JSON strings too."""
    prompt = "the cat\x85 sat\u2028 on\u2029 the\x0b mat\x1e naïve 🙂"
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "echo": True}
    with served.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert text == served.complete(**body)["choices"][0]["text"] and text.startswith(prompt)


def test_transformers_chat_finds_its_model_loaded(served):
    answer = served.post("/load_model", model=tiny.NAME)
    assert tiny.events(answer.text)[0]["status"] == "ready"
    assert served.post("/load_model", model="other").status_code == 404


def test_transformers_chat(served):
    """The real program, talking to the server as it does to its own."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", tiny.NAME]
    done = subprocess.run(
        [*command, f"{served.url}/v1"],
        input="the cat sat\n!exit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    # It samples: where an answer ends at the token limit it asks whether to go on, and "!exit" is
    # no answer to that.
    asked = "Generation stopped after reaching the token limit" in done.stdout
    assert done.returncode == 0 or asked, done.stderr[-500:]
    assert "was already loaded" in done.stdout and f"<{tiny.NAME}>:" in done.stdout
    assert served.metric("generation_tokens") > 0
