"""The scheduler alone: order, room, preemption without starvation, and replay from its log."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.decode.scheduler import Scheduler, replay
from retort.errors import ConfigurationError
from tests.decode.toys import prompts, toy


def _request(name, size, new=10, drafter=None):
    params = SamplingParams(max_new_tokens=new)
    return Request(name, 0, list(range(3, 3 + size)), params, frozenset(), drafter=drafter)


def _slices(plan):
    return [(p.request.id, len(p.tokens), p.last) for p in plan.prefills]


def _ids(requests):
    return [r.id for r in requests]


def test_first_in_first_out_and_long_prompts_in_slices():
    scheduler = Scheduler(max_batch_size=2, max_prefill_tokens=5)
    a, b, c = (_request(n, k) for n, k in (("a", 8), ("b", 4), ("c", 2)))
    for request in (a, b, c):
        scheduler.add(request)
    plan = scheduler.schedule()
    assert _ids(plan.admitted) == ["a", "b"]
    assert _slices(plan) == [("a", 5, False)]
    a.fed = 5
    assert _slices(scheduler.schedule()) == [("a", 3, True), ("b", 2, False)]
    a.fed = 7
    assert _ids(scheduler.schedule().decodes) == ["a"]
    scheduler.remove(a)
    assert _ids(scheduler.schedule().admitted) == ["c"]


def test_the_youngest_makes_room_and_nobody_overtakes_it():
    scheduler = Scheduler(3, max_cached_tokens=20, max_draft=2)
    a, b = _request("a", 5, drafter="d"), _request("b", 7, drafter="d")
    c = _request("c", 2)
    for request in (a, b, c):
        scheduler.add(request)
    assert _ids(scheduler.schedule().admitted) == ["a", "b", "c"]  # 5 + 2, 7 + 2 and 2 tokens
    a.tokens += [1] * 3  # 10 + 9 + 2 are more than 20
    assert _ids(scheduler.schedule().preempted) == ["c"]
    b.tokens += [1] * 2
    assert _ids(scheduler.schedule().preempted) == ["b"]
    assert _ids(scheduler.waiting) == ["b", "c"]
    a.tokens += [1] * 2  # c alone would fit, and waits behind b
    assert not scheduler.schedule().admitted and _ids(scheduler.running) == ["a"]
    scheduler.remove(a)
    assert _ids(scheduler.schedule().admitted) == ["b", "c"]


def test_a_request_that_could_never_end_is_refused():
    with Engine(toy(), max_cached_tokens=20) as engine:
        with pytest.raises(ConfigurationError, match="may grow to 21 tokens and max_cached_tokens"):
            engine.add_request([5] * 5, SamplingParams(max_new_tokens=16))
        assert not engine.has_unfinished()
    for name in ("max_batch_size", "max_prefill_tokens", "max_cached_tokens"):
        with pytest.raises(ConfigurationError, match=f"{name}=0 must be .*at least 1"):
            Engine(toy(), **{name: 0})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_ends_within_the_room_whatever_is_accepted(data):
    """A simulated engine: rows gain any number of tokens a pass; all end, in room."""
    draft, room = data.draw(st.integers(0, 4)), data.draw(st.integers(40, 90))
    limits = {"max_cached_tokens": room, "max_draft": draft, "max_prefill_tokens": 8}
    limits["max_batch_size"] = data.draw(st.integers(1, 4))
    scheduler = Scheduler(**limits, record=True)
    for i, size in enumerate(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))):
        scheduler.add(_request(f"r{i}", size, new=18, drafter="d"))
    passes = 0
    while not scheduler.idle:
        plan = scheduler.schedule()
        assert scheduler.running and scheduler.running[0] not in plan.preempted
        for request in plan.preempted:
            request.fed = 0
        _advance(data, plan, scheduler, draft, room)
        order = [int(r.id[1:]) for r in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        passes += 1
        assert passes < 1000
    assert replay(scheduler.events, **limits) == scheduler.decisions


def _advance(data, plan, scheduler, draft, room):
    """The pass: all rows together never hold more than there is room for."""
    drafts = {r.id: max(min(draft, r.room - 1), 0) for r in plan.decodes}
    held = sum(r.fed for r in scheduler.running) + sum(len(p.tokens) for p in plan.prefills)
    assert held + sum(1 + k for k in drafts.values()) <= room
    for prefill in plan.prefills:
        prefill.request.fed += len(prefill.tokens)
    for request in [*(p.request for p in plan.prefills if p.last), *plan.decodes]:
        most = 1 + drafts.get(request.id, 0)
        request.tokens += [7] * data.draw(st.integers(1, most))
        request.fed = len(request.tokens) - 1
        if request.room <= 0:
            request.finish_reason = "length"
            scheduler.remove(request)


def test_the_engine_schedules_as_its_log_says():
    limits = {"max_batch_size": 3, "max_prefill_tokens": 9, "max_cached_tokens": 60}
    with Engine(
        toy(eos_token_id=None), drafter="prompt-lookup", draft_budget=3, debug=True, **limits
    ) as engine:
        for i, prompt in enumerate(prompts()):
            engine.add_request(prompt, SamplingParams(max_new_tokens=12 + 3 * i))
            engine.step()
        engine.abort("request-4")
        while engine.has_unfinished():
            engine.step()
        scheduler = engine.scheduler
        assert engine.stats.preemptions > 0
        assert any(d.preempted for d in scheduler.decisions)
        assert replay(scheduler.events, max_draft=3, **limits) == scheduler.decisions
        other = {**limits, "max_cached_tokens": 50}
        assert replay(scheduler.events, max_draft=3, **other) != scheduler.decisions
