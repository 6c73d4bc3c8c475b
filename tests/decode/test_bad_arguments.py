"""What a caller of the engine gets wrong is a ConfigurationError that names it."""

import math

import numpy as np
import pytest

from retort.decode.admission import encode
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.errors import ConfigurationError
from tests.decode.toys import prompts, reference, toy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", None),
        ("max_new_tokens", 2.5),
        ("min_new_tokens", "x"),
        ("temperature", "x"),
        ("temperature", None),
        ("temperature", 1e-320),
        ("top_p", [1]),
        ("min_p", "x"),
        ("presence_penalty", None),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: "x"}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", 5),
        ("bad_words_ids", 5),
        ("bad_words_ids", [5]),
        ("logits_processors", 5),
        ("stopping_criteria", 5),
        ("stop_strings", 5),
        ("stop_strings", [None]),
        ("eos_token_id", "x"),
        ("do_sample", "yes"),
        ("do_sample", None),
        ("ignore_eos", "no"),
        ("bad_words_ids", [np.array([3, 4])]),
    ],
)
def test_sampling_values_of_the_wrong_kind(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_strings", "a"),
        ("eos_token_id", 3),
        ("bad_words_ids", [3]),
        ("logits_processors", lambda tokens, scores: scores),
        ("stopping_criteria", lambda tokens: True),
    ],
)
def test_what_can_be_read_only_once_is_refused_and_not_ignored(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}="):
        SamplingParams(**{name: (each for each in [value])})


@pytest.mark.parametrize("value", [True, 1, np.bool_(True)])
def test_kinds_of_true(value):
    with Engine(toy(num_hidden_layers=1)) as engine:
        sampled = [
            engine.generate([[3, 4]], max_new_tokens=9, do_sample=given)[0].token_ids
            for given in (True, value, False)
        ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_ban_by_bias_is_allowed():
    assert SamplingParams(logit_bias={3: -math.inf}).logit_bias == {3: -math.inf}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_budget", 1.5),
        ("draft_budget", True),
        ("draft_budget", None),
        ("max_batch_size", 2.5),
        ("max_batch_size", None),
        ("max_cached_tokens", "x"),
        ("tape", "x"),
    ],
)
def test_engine_options_of_the_wrong_kind(name, value):
    model = toy(num_hidden_layers=1)
    with pytest.raises(ConfigurationError, match=f"{name}="):
        Engine(model, **{name: value})


@pytest.mark.parametrize(
    "given", [None, 5, {"role": "user", "content": "x"}, [None], [[1.5]], b"AB"]
)
def test_prompts_that_are_none(given):
    with Engine(toy(num_hidden_layers=1)) as engine:
        with pytest.raises(ConfigurationError, match="prompt"):
            engine.generate(given)
        assert not engine.has_unfinished()


def test_prompts_are_queued_all_or_none():
    model = toy(num_hidden_layers=1)
    with Engine(model, max_cached_tokens=40) as engine:
        with pytest.raises(ConfigurationError, match="max_cached_tokens"):
            engine.generate([[5] * 5, [5] * 30], max_new_tokens=20, n=2)
        assert not engine.has_unfinished()
        (output,) = engine.generate([[5] * 5], max_new_tokens=3)
    assert output.token_ids == reference(model, [5] * 5, max_new_tokens=3)


class Refusing:
    """A tokenizer whose chat template wants something else."""

    def apply_chat_template(self, *_, **__):
        raise ValueError("System role\nnot supported")


def test_messages_that_the_chat_template_refuses():
    with pytest.raises(ConfigurationError, match="ValueError: System role not supported"):
        encode([{"role": "system", "content": "x"}], Refusing())


@pytest.mark.parametrize(
    "prompt",
    ["ab\ud800", [{"role": "user", "content": "\udcff"}], [{"role": "\ud800", "content": "x"}]],
)
def test_a_lone_surrogate_is_no_text(prompt):
    with pytest.raises(ConfigurationError, match="surrogate"):
        encode(prompt, object())


def test_generate_keeps_the_outputs_of_other_requests_for_step():
    model = toy()
    short, long = prompts((5, 9))
    with Engine(model) as engine:
        rid = engine.add_request(short, SamplingParams(max_new_tokens=3))
        engine.generate([long], max_new_tokens=8)
        other = engine.add_request(long, SamplingParams(max_new_tokens=2))
        list(engine.stream([short], max_new_tokens=8))
        assert engine.has_unfinished()
        outputs = engine.step()
        assert [o.request_id for o in outputs] == [rid, other]
        assert outputs[0].token_ids == reference(model, short, max_new_tokens=3)
        assert not engine.has_unfinished()


def test_a_request_id_is_used_once_at_a_time():
    with Engine(toy(num_hidden_layers=1)) as engine:
        few = SamplingParams(max_new_tokens=2)
        engine.add_request([3, 4], few, request_id="mine")
        with pytest.raises(ConfigurationError, match="request id 'mine' is already in use"):
            engine.add_request([5, 6], few, request_id="mine")
        while engine.has_unfinished():
            (done,) = engine.step() or (None,)
        assert done.prompt_token_ids == [3, 4]
        assert engine.add_request([5, 6], few, request_id="mine") == "mine"


def test_a_caller_may_take_the_ids_that_the_engine_gives():
    with Engine(toy(num_hidden_layers=1)) as engine:
        engine.add_request([3, 4], request_id="request-1")
        assert engine.add_request([3, 4]) == "request-2"
        assert engine.add_request([3, 4], request_id="request-3") == "request-3"
        assert engine.add_request([3, 4]) == "request-4"


@pytest.mark.parametrize("params", ["x", 5, {"max_new_tokens": 3}, ""])
def test_params_of_another_kind(params):
    with Engine(toy(num_hidden_layers=1)) as engine:
        for call in (
            lambda: engine.generate([[3]], params=params),
            lambda: engine.add_request([3], params),
        ):
            with pytest.raises(ConfigurationError, match="params="):
                call()
        assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sample", value) for value in ("a", -1, 0.5, None)),
        ("prefix_group", [1]),
        ("request_id", 7),
        ("request_id", [7]),
    ],
)
def test_arguments_of_a_request_of_the_wrong_kind(name, value):
    with Engine(toy(num_hidden_layers=1)) as engine:
        with pytest.raises(ConfigurationError, match=f"{name}="):
            engine.add_request([3], **{name: value})
        assert not engine.has_unfinished()
