"""Failed passes: the engine goes on in smaller ones, and only rows that fail alone are lost."""

import pytest
import torch

from retort import Engine, SamplingParams
from tests.decode.toys import prompts, toy

POISON = 96


def texts(engine, given, **options):
    return [o.token_ids for o in engine.generate(given, max_new_tokens=12, **options)]


@pytest.fixture(scope="module")
def model():
    return toy()


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model) as engine:
        return texts(engine, prompts())


def limited(model, monkeypatch, tokens):
    """Passes over more than ``tokens`` tokens run out of memory."""
    forward, refused = type(model).forward, []

    def call(self, input_ids=None, **more):
        if input_ids.shape[1] > tokens:
            refused.append(input_ids.shape[1])
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", call)
    return refused


@pytest.mark.parametrize("room", [1, 4, 30])
@pytest.mark.parametrize("drafter", [None, "prompt-lookup"])
def test_out_of_memory_makes_passes_smaller(model, expected, monkeypatch, room, drafter):
    refused = limited(model, monkeypatch, room)
    with Engine(model, drafter=drafter, draft_budget=4) as engine:
        assert texts(engine, prompts()) == expected
    assert refused


def test_a_row_that_cannot_be_processed_fails_alone(model, expected, monkeypatch):
    given = [[t % POISON for t in p] for p in prompts()]
    with Engine(model, drafter="prompt-lookup", draft_budget=4) as engine:
        fine = texts(engine, given)
        poisoned(model, monkeypatch)
        outputs = engine.generate([[5, POISON, 7], *given], max_new_tokens=12)
        assert outputs[0].finish_reason == "error" and "poison" in outputs[0].error
        ok = [o for o in outputs[1:] if o.finish_reason != "error"]
        assert ok and all(o.token_ids == fine[o.index - outputs[1].index] for o in ok)
        assert engine.target.cache.rows == ()


def poisoned(model, monkeypatch):
    """Passes that read the token ``POISON`` fail."""
    forward = type(model).forward

    def call(self, input_ids=None, **more):
        if (input_ids == POISON).any():
            raise RuntimeError("poison")
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", call)


def test_a_bad_prompt_that_is_alone_in_its_pass_costs_nobody_else(model, expected, monkeypatch):
    good = next(p for p in prompts() if POISON not in p)
    right = expected[prompts().index(good)]
    poisoned(model, monkeypatch)
    with Engine(model, max_batch_size=1) as engine:
        outputs = engine.generate([[5, POISON, 7], good], max_new_tokens=12)
        assert [o.finish_reason for o in outputs] == ["error", outputs[1].finish_reason]
        assert "poison" in outputs[0].error and outputs[1].token_ids == right
        rid = engine.add_request([POISON], SamplingParams(max_new_tokens=2))
        assert [o.request_id for o in engine.step()] == [rid]
        assert not engine.has_unfinished() and engine.target.cache.rows == ()


def test_a_row_goes_on_where_it_was_once_the_engine_works_again(model, monkeypatch):
    """Even where half of its tokens were read when every pass began to fail."""
    given, half, forward = [5, 6, 7, 8, 9, 10], [5, 6, 7], type(model).forward

    def call(self, input_ids=None, **more):
        if input_ids[0].tolist() != half:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids=input_ids, **more)

    with Engine(model) as engine:
        right = texts(engine, [given])
        rid = engine.add_request(given, SamplingParams(max_new_tokens=12))
        monkeypatch.setattr(type(model), "forward", call)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
        assert engine.target.length(engine.row(rid)) == len(half)
        monkeypatch.setattr(type(model), "forward", forward)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
    assert [o.token_ids for o in outputs] == right


def test_a_pass_that_nothing_can_save_raises(model, monkeypatch):
    limited(model, monkeypatch, 0)
    with Engine(model) as engine, pytest.raises(torch.OutOfMemoryError):
        texts(engine, prompts())


def test_prompt_logprobs_equal_one_dense_pass(model):
    given = [p for p in prompts() if len(p) > 2]
    with Engine(model, max_prefill_tokens=7, drafter="prompt-lookup") as engine:
        params = {"prompt_logprobs": 2, "logprobs": 1, "max_new_tokens": 3}
        outputs = engine.generate(given, **params)
        scored = engine.generate(given, params=SamplingParams(max_new_tokens=0, prompt_logprobs=0))
    for prompt, output, only in zip(given, outputs, scored, strict=True):
        dense = model(torch.tensor([prompt])).logits[0].detach().double().log_softmax(-1)
        wanted = [float(dense[i, t]) for i, t in enumerate(prompt[1:])]
        found = [e[t] for e, t in zip(output.prompt_logprobs, prompt[1:], strict=True)]
        assert found == pytest.approx(wanted, abs=1e-9)
        alone = [e[t] for e, t in zip(only.prompt_logprobs, prompt[1:], strict=True)]
        assert alone == pytest.approx(wanted, abs=1e-9)
        assert only.token_ids == [] and only.finish_reason == "length"
        assert len(output.logprobs) == len(output.token_ids)


def test_ends_say_which_token_wrote_what(zoo_tokenizer):
    from retort.decode.stopping import TextBuffer

    ids = zoo_tokenizer("naïve 🙂 text").input_ids
    buffer = TextBuffer(zoo_tokenizer, ())
    for token in ids:
        buffer.push(token)
    assert len(buffer.ends) == len(ids) and buffer.ends[-1] == len("naïve 🙂 text")
    assert buffer.ends == sorted(buffer.ends)


def test_every_sample_and_round_has_a_key_of_its_own():
    from retort.decode.sampling import stream_key

    seeds = (0, 11, 2**63 - 1, -(2**63))
    keys = {stream_key(s, n, r) for s in seeds for n in range(130) for r in range(5)}
    assert len(keys) == len(seeds) * 130 * 5
