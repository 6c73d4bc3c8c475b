"""Drafters, budget, stopping: each alone."""

import math

import pytest

from retort.decode.acceptance import Acceptance
from retort.decode.budget import AutoBudget, Candidate, FixedBudget, build_budget
from retort.decode.cost import PassCost, StepCost
from retort.decode.draft import DraftContext
from retort.decode.drafter import PromptLookupDrafter
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.decode.stopping import TextBuffer, grow
from retort.errors import ConfigurationError
from tests.decode.toys import toy


def _request(name, prompt, new=10, **options):
    params = SamplingParams(max_new_tokens=new, **options)
    return Request(name, 0, list(prompt), params, frozenset({2}))


def _naive_lookup(tokens, sizes, limit):
    for size in sizes:
        suffix = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == suffix:
                return tokens[end : end + limit]
    return []


def test_prompt_lookup_finds_the_longest_and_most_recent_match():
    import random

    rng = random.Random(0)
    drafter = PromptLookupDrafter()
    for row in range(20):
        tokens = [rng.randrange(4) for _ in range(6)]
        for _ in range(40):
            got = drafter.propose([DraftContext(str(row), tokens, 5)])[0]
            assert got.tokens == _naive_lookup(tokens, (4, 3, 2), 5)
            assert got.match >= 2 * bool(got.tokens)
            tokens = tokens + [rng.randrange(4) for _ in range(rng.randrange(1, 4))]


def test_prompt_lookup_notices_that_a_row_was_rewound():
    drafter = PromptLookupDrafter()
    drafter.propose([DraftContext("a", [1, 2, 3, 4, 1, 2, 9, 9, 9, 9], 4)])
    assert drafter.propose([DraftContext("a", [1, 2, 3, 4, 1, 2], 2)])[0].tokens == [3, 4]


def _budget(flat_until, slope, prior=0.5, **options):
    cost = StepCost({n: 1.0 + slope * max(0, n - flat_until) for n in (1, 4, 8, 16, 32, 64, 128)})
    return AutoBudget(
        cost=PassCost(cost),
        acceptance=Acceptance(levels={("d", 0): math.log(prior / (1 - prior))}),
        **options,
    )


def _give(budget, rows, wanted, passes=False, match=0):
    """Lengths of rows that share one drafter."""
    pairs = zip(rows, wanted, strict=True)
    return budget.allocate([Candidate(row, "d", want, passes, match) for row, want in pairs])


def test_the_budget_drafts_while_passes_are_flat_and_stops_at_the_knee():
    rows = [str(i) for i in range(8)]
    assert sum(_give(_budget(128, 1.0, prior=0.8), rows, [7] * 8)) == 56
    assert sum(_give(_budget(8, 1.0, prior=0.8), rows, [7] * 8)) == 0
    some = _give(_budget(16, 0.5, prior=0.8), rows, [7] * 8)
    assert 0 < sum(some) <= 8


def test_rows_that_accept_more_get_more_and_hopeless_rows_get_none():
    budget = _budget(6, 0.2)
    for _ in range(30):
        budget.observe("good", "d", 4, 4)
        budget.observe("bad", "d", 4, 0)
    good, bad = _give(budget, ["good", "bad"], [7, 7])
    assert good >= 4 and bad == 0
    assert _give(budget, ["good"], [2]) == [2]


def test_where_all_rows_are_waited_for_the_last_one_is_drafted_for():
    """A verified token costs what a decoded one does, and a pass of one row nearly as much as
    one of four: only what ends the last row earlier saves time."""

    def give(*left, prior=0.6):
        budget = _budget(1, 0.1, prior=prior)
        return budget.allocate([Candidate(str(i), "d", 7, left=n) for i, n in enumerate(left)])

    assert give(None, None, None, None, prior=0.8) == give(40, 40, 40, 40, prior=0.8)
    assert sum(give(40, 40, 40, 40, prior=0.8)) > 0
    lagging = give(10, 40, 10, 10)
    assert lagging[1] >= 2 and sum(lagging) == lagging[1]
    assert give(0, 0) == give(None, None)


def test_a_batch_that_is_waited_for_tells_what_is_left_and_a_queue_does_not(monkeypatch):
    seen = []
    inner = AutoBudget.allocate

    def spy(self, candidates):
        seen.append([c.left for c in candidates])
        return inner(self, candidates)

    monkeypatch.setattr(AutoBudget, "allocate", spy)
    with Engine(toy(eos_token_id=None), drafter="prompt-lookup", max_batch_size=2) as engine:
        engine.generate([[5, 6, 7]] * 2, max_new_tokens=4)
        assert seen[0] == [3, 3]
        seen.clear()
        engine.generate([[5, 6, 7]] * 3, max_new_tokens=4)
        assert seen[0] == [None, None] and seen[-1] == [1]
        seen.clear()
        list(engine.stream([[5, 6, 7]] * 2, max_new_tokens=4))
        assert {n for step in seen for n in step} == {None}


def test_a_slow_drafter_is_not_asked():
    budget = _budget(64, 1.0)
    budget.time_draft("d", 5.0)
    assert _give(budget, ["a"], [7], True) == [0]
    assert _give(budget, ["a"], [7]) != [0]


def test_a_failed_row_is_tried_again_in_the_end():
    budget = _budget(2, 0.6)
    for _ in range(60):
        budget.observe("a", "d", 2, 0)
    first = _give(budget, ["a"], [4])
    later = [_give(budget, ["a"], [4]) for _ in range(2000)]
    assert first == [0] and any(any(x) for x in later)


def test_a_row_that_prolongs_a_longer_match_drafts_more():
    short, long = (_give(_budget(2, 0.3), ["a"], [7], match=m)[0] for m in (2, 8))
    assert long > short


def test_matches_learn_apart():
    learnt = Acceptance()
    for _ in range(40):
        learnt.observe("a", "d", 8, 3, 3)
        learnt.observe("a", "d", 2, 1, 0)
    learnt.release("a")
    assert learnt.chance("b", "d", 8, 0) > 0.9 and learnt.chance("b", "d", 2, 0) < 0.5
    assert learnt.chance("b", "d", 7, 1) == learnt.chance("b", "d", 8, 0)


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_hopeless_drafter_loses_little_of_the_time_after_its_first_steps(rows, passes):
    """The clock of a machine on which a verified token costs what a decoded one does."""
    budget, names = _budget(rows, 0.25 / rows), [str(i) for i in range(rows)]
    budget.time_draft("d", 0.1 / rows)
    total = 0.0
    for step in range(4000):
        lengths = _give(budget, names, [7] * rows, passes, match=0 if passes else 2)
        extra = 0.25 * sum(lengths) / rows + 0.1 / rows * max(lengths) * passes
        budget.time_step(rows, rows + sum(lengths), 1.0 + 0.25 * sum(lengths) / rows)
        for name, n in zip(names, lengths, strict=True):
            if n:
                budget.observe(name, "d", n, 0, 0 if passes else 2)
        total += extra if step >= 200 else 0.0
    assert 0 < total < 0.015 * 3800


def test_only_one_row_of_a_model_drafter_tries_again():
    """Each row that tries again reads all that it missed."""
    budget, names = _budget(4, 0.05), list("abcd")
    for name in names * 20:
        budget.observe(name, "d", 2, 0)
    tried = set()
    for _ in range(4000):
        lengths = _give(budget, names, [4] * 4, passes=True)
        tried |= {name for name, n in zip(names, lengths, strict=True) if n}
        for name in tried:
            budget.observe(name, "d", 1, 0)
    assert len(tried) == 1


def test_step_cost_interpolates_and_follows_drift():
    cost = StepCost({4: 1.0, 8: 3.0})
    assert cost.seconds(6) == 2.0
    assert cost.seconds(12) == 5.0
    assert cost.seconds(1) == 1.0
    for _ in range(50):
        cost.record(4, 2.0)
    assert cost.seconds(4) == pytest.approx(2.0, rel=0.01)
    assert cost.seconds(8) > 3.4  # a neighbour follows, more slowly


def test_drafts_that_cost_more_than_was_thought_use_the_credit_up():
    """Every draft is accepted, and yet passes with drafts lose: the clock has the last word."""
    budget, drafted = _budget(64, 1.0, prior=0.9), 0
    budget.cost.record = lambda *_: None  # a cost model that never learns
    for _ in range(400):
        n = _give(budget, ["a"], [4])[0]
        drafted += bool(n)
        budget.time_step(1, 1 + n, 8.0 if n else 1.0)
        if n:
            budget.observe("a", "d", n, n)
    assert 0 < drafted < 12


def test_plain_passes_are_timed_live_and_drafts_add_what_they_added():
    profile = StepCost({1: 1.0, 4: 1.0, 16: 4.0, 32: 8.0})
    cost = PassCost(profile)
    assert cost.seconds(16) == 4.0 and cost.seconds(16, 16) == 8.0
    for _ in range(60):
        cost.record(16, 0, 10.0)  # long rows: a plain pass takes more than the profile says
    assert cost.seconds(16) == pytest.approx(10.0) and cost.seconds(16, 16) == pytest.approx(14.0)
    for _ in range(60):
        cost.record(16, 16, 18.0)  # and so do drafts
    assert cost.seconds(16, 16) == pytest.approx(18.0, rel=0.02)
    assert cost.seconds(16) == pytest.approx(10.0)
    assert cost.seconds(8) == pytest.approx(10.0 * 2.0 / 4.0)  # another number of rows: by profile
    assert cost.seconds(1, 3) > cost.seconds(1)  # no draft is free


def test_what_drafts_cost_is_learnt_by_the_number_of_rows_and_firmly_from_many():
    cost = PassCost(StepCost({1: 1.0, 64: 1.0}))
    for rows in (1, 8):
        cost.record(rows, 0, 1.0)
    cost.record(8, 10, 2.0)
    many = cost.seconds(8, 2) - 1.0
    assert many == pytest.approx(2 * 0.1 / 3), "ten drafts took 0.1 each: a third is believed"
    assert cost.seconds(6, 2) == cost.seconds(8, 2), "the nearest number of rows that was seen"
    for _ in range(50):
        cost.record(1, 1, 1.0)
    assert cost.seconds(8, 2) - 1.0 == many > 2 * (cost.seconds(1, 2) - 1.0)
    for _ in range(10):
        cost.regain(1)
    assert cost.seconds(8, 2) - 1.0 == many
    few = PassCost(StepCost({1: 1.0, 64: 1.0}))
    few.record(8, 0, 1.0)
    few.record(8, 1, 1.1)
    assert few.seconds(8, 2) - 1.0 < many / 2, "one draft says little"


def test_a_disturbed_plain_pass_does_not_count():
    cost = PassCost(StepCost({1: 1.0, 16: 2.0}))
    for seconds in (9.0, 1.0, 1.1, 0.9, 1.0):
        cost.record(4, 0, seconds)
    assert cost.seconds(4) == 1.0


def test_where_every_pass_has_drafts_a_plain_one_is_due_now_and_then():
    budget, plain = _budget(128, 0.0, prior=0.9), 0
    for _ in range(400):
        n = sum(_give(budget, ["a", "b"], [4, 4]))
        budget.time_step(2, 2 + n, 1.0)
        plain += n == 0
    assert 400 / 17 - 1 <= plain <= 400 / 16 + 4
    assert budget.cost.plain == {2: 1.0}


class Eager:
    """Drafts something at every step, and counts how often it is asked."""

    passes, asked = False, 0

    def propose(self, contexts):
        self.asked += 1
        return [[5] * min(c.limit, 3) for c in contexts]

    def release(self, request_id):
        pass


@pytest.mark.parametrize(
    ("rows", "new", "budget", "least", "most"),
    [
        (1, 30, _budget(1, 9.0), 0.9, 1.0),
        (1, 400, _budget(1, 9.0), 0.25, 0.4),
        (8, 60, _budget(1, 9.0), 0.2, 0.4),
        (8, 60, 3, 0.9, 1.0),
    ],
)
def test_where_drafts_never_pay_drafters_are_asked_less_often(rows, new, budget, least, most):
    """The first eight steps; then every fifth of eight rows; one row at first at every step."""
    drafter = Eager()
    model = toy(eos_token_id=None, max_position_embeddings=512)
    with Engine(model, drafter=drafter, draft_budget=budget) as engine:
        engine.generate([[5, 6, 7]] * rows, max_new_tokens=new)
        assert (engine.stats.draft_tokens > 0) == (budget == 3)
        assert least < drafter.asked / (engine.stats.steps - 1) <= most


def test_budgets_are_checked():
    assert isinstance(build_budget(3), FixedBudget)
    for bad in (-1, "some"):
        with pytest.raises(ConfigurationError, match="draft_budget"):
            build_budget(bad)


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes, so that characters are split across tokens."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def _stream(text, stops):
    buffer, shown = TextBuffer(Bytes(), stops), []
    for byte in text.encode():
        stopped = buffer.push(byte)
        if not stopped:
            shown.append(buffer.take())
        else:
            break
    shown.append(buffer.take(last=True))
    return shown


@pytest.mark.parametrize("text", ["héllo wörld", "a🙂b", "plain"])
def test_streamed_text_is_the_text_and_never_half_a_character(text):
    shown = _stream(text, ())
    assert "".join(shown) == text
    assert not any("\ufffd" in s for s in shown)


def test_stop_strings_are_never_shown_even_in_parts():
    shown = _stream("one two STOP three", ("STOP",))
    assert "".join(shown) == "one two "
    assert "".join(_stream("one STO two", ("STOP",))) == "one STO two"


def _grown(request, tokens):
    """What a row takes of ``tokens`` until it ends."""
    for token in tokens:
        if request.finish_reason is None:
            grow(request, token)
    return request.output


def test_a_row_ends_at_eos_limit_and_stop_string():
    request = _request("a", [5], new=3)
    assert _grown(request, [7, 8, 9, 10]) == [7, 8, 9] and request.finish_reason == "length"
    request = _request("a", [5], new=9)
    assert _grown(request, [7, 2, 9]) == [7, 2] and request.finish_reason == "stop"
    request = _request("a", [5], new=9, ignore_eos=True)
    assert _grown(request, [7, 2, 9]) == [7, 2, 9] and request.finish_reason is None
    request = _request("a", [5], new=9, stop_strings=["b"])
    request.text = TextBuffer(Bytes(), request.params.stops)
    assert _grown(request, list(b"abc")) == list(b"ab") and request.finish_reason == "stop"
    assert request.text.full(request.output) == "a"


class Pairs:
    """A tokenizer whose tokens are two bytes of UTF-8 text."""

    def __init__(self, text):
        data = text.encode()
        self.pairs = [data[i : i + 2] for i in range(0, len(data), 2)]

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.pairs[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("new", [2, 9])
def test_a_stop_string_before_half_a_character_ends_the_row_at_once(new):
    pairs = Pairs("abcé fg")  # "ab", "c" with half of "é", its other half
    request = _request("a", [5], new=new, stop_strings=["bc"])
    request.text = TextBuffer(pairs, request.params.stops)
    assert _grown(request, [0, 1, 2]) == [0, 1] and request.finish_reason == "stop"
    assert request.text.full(request.output) == "a" == request.text.take(last=True)


def test_a_stop_string_is_found_behind_half_a_character():
    pairs = Pairs("abcé fg")
    request = _request("a", [5], new=9, stop_strings=["cé f"], ignore_eos=True)
    request.text = TextBuffer(pairs, request.params.stops)
    assert _grown(request, [0, 1, 2, 3]) == [0, 1, 2, 3] and request.finish_reason == "stop"
    assert request.text.full(request.output) == "ab"
