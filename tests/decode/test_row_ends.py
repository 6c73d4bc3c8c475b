"""With drafts a row ends where it ends without: nothing of it runs on behind its last token."""

import pytest
import torch

from retort import speculative
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.test_stop_strings import Letters
from tests.decode.toys import prompts, reference, toy

NEW, EIGHT = 16, 8


@pytest.fixture(scope="module")
def model():
    return toy(eos_token_id=None)


@pytest.fixture(scope="module")
def prompt():
    return prompts((6,))[0]


@pytest.fixture(scope="module")
def answer(model, prompt):
    return reference(model, prompt, max_new_tokens=NEW)


@pytest.fixture
def drafter(prompt, answer):
    return ScriptedDrafter("right", [prompt + answer + [0] * EIGHT])


def both_ways(model, drafter, prompt, **options):
    """The output with drafts after it was checked to be that without, and the two engines."""
    outputs = []
    for each in (None, drafter):
        with Engine(model, Letters(), drafter=each, draft_budget=EIGHT) as engine:
            outputs += engine.generate([prompt], max_new_tokens=NEW, **options)
    plain, fast = outputs
    assert fast.stats.accepted_tokens > 0
    for name in ("token_ids", "finish_reason", "error", "text"):
        assert getattr(fast, name) == getattr(plain, name)
    return fast


class Watch:
    """A processor that counts its calls and fails where the row has ended or ``last`` is over."""

    def __init__(self, prompt, ended=lambda new: False, last=NEW):
        self.start, self.ended, self.last, self.calls = len(prompt), ended, last, []

    def __call__(self, tokens, scores):
        new = list(tokens[self.start :])
        self.calls.append(len(new))
        if self.ended(new) or len(new) >= self.last:
            raise ValueError("nothing is allowed here")
        return scores


ENDS = {
    "eos": lambda last: {"eos_token_id": last},
    "stop string": lambda last: {"stop_strings": Letters().decode([last])},
    "criterion": lambda last: {"stopping_criteria": [lambda tokens: tokens[-1] == last]},
}


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1e-3}], ids=str)
@pytest.mark.parametrize("kind", ENDS)
def test_processors_are_called_once_for_each_token_and_never_behind_the_end(
    model, drafter, prompt, answer, kind, sampling
):
    last = next(t for i, t in enumerate(answer) if i >= 3 and t not in answer[:i])
    watch = Watch(prompt, ended=lambda new: last in new)
    options = {"logits_processors": [watch], **ENDS[kind](last), **sampling}
    output = both_ways(model, drafter, prompt, **options)
    count = answer.index(last) + 1
    assert (output.token_ids, output.finish_reason) == (answer[:count], "stop")
    assert watch.calls == [*range(count)] * 2


def test_what_is_forbidden_behind_the_end_does_not_matter_to_generate(
    model, drafter, prompt, answer
):
    last = answer[4]
    ids = torch.tensor([prompt])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "eos_token_id": last,
        "pad_token_id": 0,
        "prefix_allowed_tokens_fn": lambda _, ids: (
            [] if last in ids.tolist()[len(prompt) :] else list(range(97))
        ),
    }
    run = speculative(drafter, draft_budget=EIGHT)
    fast = model.generate(ids, custom_generate=run, **options)
    assert run.stats.accepted_tokens > 0
    assert torch.equal(fast, model.generate(ids, do_sample=False, **options))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1e-3}], ids=str)
def test_a_late_fault_takes_no_token_back(model, drafter, prompt, answer, sampling):
    watch = Watch(prompt, last=5)
    options = {"logits_processors": [watch], "logprobs": 0, **sampling}
    output = both_ways(model, drafter, prompt, **options)
    assert (output.token_ids, output.finish_reason) == (answer[:5], "error")
    assert [[*entry] for entry in output.logprobs] == [[t] for t in answer[:5]]


def test_the_end_inside_a_draft_counts_the_drafts_that_stood(model, drafter, prompt, answer):
    output = both_ways(model, drafter, prompt, eos_token_id=answer[4])
    new = len(output.token_ids)
    assert output.stats.accepted_tokens == new - 1  # the first came with the prompt
    assert output.stats.draft_tokens == EIGHT


def test_no_token_is_looked_at_where_none_may_follow(model, prompt):
    watch = Watch(prompt, last=0)
    with Engine(model) as engine:
        (output,) = engine.generate(
            [prompt], max_new_tokens=0, logits_processors=[watch], prompt_logprobs=0
        )
    assert (output.finish_reason, watch.calls) == ("length", [])
    assert len(output.prompt_logprobs) == len(prompt) - 1


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_log_probabilities_line_up_after_tokens_that_a_rewind_put_in(model, prompt, logprobs):
    with Engine(model) as engine:
        params = SamplingParams(max_new_tokens=6, logprobs=logprobs)
        rid = engine.add_request(prompt, params, hold=True)
        while engine.has_unfinished():
            engine.step()
        engine.rewind(rid, len(prompt) + 2, append=[50, 51], max_new_tokens=3)
        (output,) = [o for _ in range(3) for o in engine.step()]
    if logprobs is None:
        assert output.logprobs is None
        return
    assert output.token_ids[2:4] == [50, 51] and output.logprobs[2:4] == [{}, {}]
    for i, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        ids = torch.tensor([prompt + output.token_ids[:i]])
        dense = model(ids).logits[0, -1].detach().log_softmax(-1)
        assert i in (2, 3) or entry[token] == pytest.approx(float(dense[token]), abs=1e-9)
