"""Several drafters side by side, drafters that fail or propose nonsense, faults in one row."""

import pytest

import retort.decode.verify as verify_module
from retort.decode.engine import Engine
from retort.decode.request import SamplingParams
from retort.errors import ConfigurationError
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


def test_a_fault_in_one_row_ends_that_row_alone(monkeypatch):
    model, texts = toy(eos_token_id=None), prompts((6, 9, 4))
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    inner = verify_module._verify_row

    def faulty(request, *rest):
        if request.index == 1 and len(request.output) >= 5:
            raise ValueError("boom")
        return inner(request, *rest)

    monkeypatch.setattr(verify_module, "_verify_row", faulty)
    with Engine(model, drafter="prompt-lookup") as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
        assert engine.target.cache.rows == ()
    assert [o.token_ids for o in outputs][::2] == expected[::2]
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "ValueError: boom")
    assert outputs[1].token_ids == expected[1][: len(outputs[1].token_ids)]
