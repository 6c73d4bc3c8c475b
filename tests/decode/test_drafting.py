"""Several drafters side by side, drafters that fail or propose nonsense, faults in one row."""

import warnings

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.errors import ConfigurationError
from retort.ops import native
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, reference, toy

NEW = 16


def _finish(engine):
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return {o.request_id: o for o in outputs}


def test_each_request_names_its_drafter_or_none():
    model, texts = toy(), prompts((6, 9, 4, 7))
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    with Engine(model, drafter={"lookup": "prompt-lookup", "self": model}, draft_budget=3) as e:
        names = ["lookup", "self", None, "default"]
        ids = [
            e.add_request(p, SamplingParams(max_new_tokens=NEW), drafter=n)
            for p, n in zip(texts, names, strict=True)
        ]
        done = _finish(e)
        assert [done[i].token_ids for i in ids] == expected
        drafted = [done[i].stats.draft_tokens for i in ids]
        assert drafted[2] == 0 and all(d > 0 for d in (drafted[0], drafted[1], drafted[3]))
        assert done[ids[1]].stats.accepted_tokens == drafted[1]
        with pytest.raises(ConfigurationError, match="drafter='other': this engine has lookup, se"):
            e.add_request(texts[0], drafter="other")


class Nonsense:
    """Proposes too much, unknown tokens, or fails."""

    passes = False

    def __init__(self, make):
        self.make = make

    def propose(self, contexts):
        return [self.make() for _ in contexts]

    def release(self, request_id):
        pass


def _raise():
    raise RuntimeError("no memory")


@pytest.mark.parametrize("make", [lambda: [5] * 500, lambda: [5, 97, 5], lambda: [-1], _raise])
@pytest.mark.filterwarnings("ignore:Nonsense failed")
def test_a_bad_drafter_costs_speed_and_nothing_else(make):
    model, texts = toy(), prompts((6, 9))
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    with Engine(model, drafter=Nonsense(make), draft_budget=4) as engine:
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW)] == expected


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=str)
def test_a_fault_in_one_row_ends_that_row_alone(sampling):
    model, texts = toy(eos_token_id=None), prompts((6, 9, 4))
    with Engine(model) as engine:
        expected = [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW, **sampling)]

    def faulty(tokens, scores):
        if len(tokens) >= len(texts[1]) + 5:
            raise ValueError("boom")
        return scores

    def params(i):
        return SamplingParams(
            max_new_tokens=NEW, logits_processors=[faulty] if i == 1 else [], **sampling
        )

    answers = [p + e + [0] * 4 for p, e in zip(texts, expected, strict=True)]
    with Engine(model, drafter=ScriptedDrafter("right", answers), draft_budget=4) as engine:
        ids = [engine.add_request(p, params(i)) for i, p in enumerate(texts)]
        done = _finish(engine)
        assert engine.target.cache.rows == () and engine.stats.accepted_tokens > 0
    outputs = [done[i] for i in ids]
    assert [o.token_ids for o in outputs][::2] == expected[::2]
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "ValueError: boom")
    assert outputs[1].token_ids == expected[1][:5]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_a_row_from_which_nothing_can_be_chosen_ends_alone(wrong, sampling):
    model, texts = toy(eos_token_id=None), prompts((6, 9, 4))
    options = {"max_new_tokens": NEW, **sampling}
    with Engine(model) as engine:
        expected = [o.token_ids for o in engine.generate(texts, **options)]
        bad = [lambda tokens, scores: scores * 0 + wrong]
        given = [SamplingParams(logits_processors=bad * (i == 1), **options) for i in range(3)]
        ids = [engine.add_request(p, g) for p, g in zip(texts, given, strict=True)]
        done = _finish(engine)
    outputs = [done[i] for i in ids]
    assert [o.token_ids for o in outputs] == [expected[0], [], expected[2]]
    assert outputs[1].finish_reason == "error" and "finite score" in outputs[1].error


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("options", [{}, {"logprobs": 0}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("drafter", [None, "prompt-lookup", "model"])
def test_a_model_that_gives_no_numbers_for_a_row_ends_it(backend, options, drafter):
    if backend == "native" and not native.available():
        pytest.skip("no native core")
    model, bad = toy(eos_token_id=None, dtype=torch.float32), 50
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    texts = [[5, bad, 6] * 3, [5, 6, 7] * 3]
    more = {"drafter": toy(dtype=torch.float32) if drafter == "model" else drafter}
    with Engine(model, cpu_backend=backend, draft_budget=3, **more) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW, **options)
    assert (outputs[0].token_ids, outputs[0].finish_reason) == ([], "error")
    assert "finite score" in outputs[0].error
    assert outputs[1].finish_reason == "length"


def test_a_draft_model_that_gives_no_numbers_drafts_nothing():
    model, texts = toy(eos_token_id=None), prompts((6, 9))
    drafter = toy()
    with torch.no_grad():
        drafter.lm_head.weight.fill_(torch.nan)
    for options in ({"repetition_penalty": 1.2}, {"do_sample": True}):
        with Engine(model) as engine:
            expected = [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW, **options)]
        with Engine(model, drafter=drafter, draft_budget=3) as engine, warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = engine.generate(texts, max_new_tokens=NEW, **options)
            assert engine.stats.draft_tokens == 0
        assert [o.token_ids for o in outputs] == expected
