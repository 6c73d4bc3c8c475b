"""Prompt slices beside decoding rows: a step stays within its stretch, and prompts are read."""

import pytest

from retort.decode.engine import Engine
from retort.decode.pace import PrefillPace
from retort.decode.params import SamplingParams
from retort.decode.scheduler import replay
from retort.errors import ConfigurationError
from tests.decode.toys import prompts, toy


def settle(pace, rows, plain, per_token, steps=60):
    """A machine on which a step takes ``plain`` and ``per_token`` more for each prompt token."""
    for _ in range(5):
        pace.observe(rows, 0, plain)
    for _ in range(steps):
        n = pace.slice(rows)
        pace.observe(rows, n, plain + per_token * n)
    return pace.slice(rows)


@pytest.mark.parametrize(
    ("per_token", "expected"), [(0.001, 20), (0.0001, 128), (1.0, 4), (0.0005, 40)]
)
def test_a_step_stays_within_its_stretch(per_token, expected):
    pace = PrefillPace(128, stretch=2.0)
    assert settle(pace, 4, 0.02, per_token) == pytest.approx(expected, abs=1)


def test_it_follows_the_machine():
    pace = PrefillPace(512, stretch=2.0)
    assert settle(pace, 4, 0.02, 0.001) == pytest.approx(20, abs=1)
    assert settle(pace, 4, 0.02, 0.002) == pytest.approx(10, abs=1)  # attention over more keys
    assert settle(pace, 4, 0.02, 0.0005) == pytest.approx(40, abs=2)


def test_a_hiccup_is_not_taken_for_slow_tokens():
    pace = PrefillPace(512, stretch=2.0)
    before = settle(pace, 4, 0.02, 0.001)
    pace.observe(4, before, 1.0)  # the machine was away for a second
    assert pace.slice(4) >= 0.7 * before


def test_steps_that_drafts_make_longer_leave_no_more_room_for_prompts():
    pace = PrefillPace(512, stretch=2.0)
    before = settle(pace, 4, 0.02, 0.001)
    for _ in range(50):
        pace.observe(4 + 20, 0, 0.04)
        pace.observe(4 + 20, before, 0.04 + 0.001 * before)
    assert pace.slice(4) == pytest.approx(before, abs=1)


def test_the_engine_counts_drafts_among_a_steps_tokens(monkeypatch):
    seen = []
    observe = PrefillPace.observe
    monkeypatch.setattr(
        PrefillPace, "observe", lambda self, n, *more: seen.append(n) or observe(self, n, *more)
    )
    for drafter in (None, "prompt-lookup"):
        with Engine(toy(), drafter=drafter, draft_budget=3) as engine:
            engine.generate([[5, 6, 7] * 6], max_new_tokens=20, ignore_eos=True)
            assert sum(seen) == engine.stats.draft_tokens + engine.stats.steps - 1  # one reads
            assert engine.stats.draft_tokens > 0 or drafter is None
        seen.clear()


def test_where_nobody_decodes_or_no_stretch_is_given_all_is_read():
    pace = PrefillPace(512, stretch=2.0)
    assert pace.slice(0) == 512 and pace.slice(3) == 16
    pace.observe(0, 512, 3.0)
    assert pace.slice(3) == 16
    assert PrefillPace(512).slice(3) == 512
    assert PrefillPace(4, stretch=2.0).slice(3) == 4


@pytest.mark.parametrize("wrong", [1, 0.5, -1, float("nan"), float("inf"), True, "2"])
def test_what_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="prefill_stretch"):
        PrefillPace(512, wrong)
    with pytest.raises(ConfigurationError, match="prefill_stretch"):
        Engine(toy(), prefill_stretch=wrong)


def test_the_engine_reads_long_prompts_in_slices_beside_decoding_rows_and_can_be_replayed():
    model, texts = toy(), [*prompts(), list(range(3, 90)) * 2]
    options = {"max_new_tokens": 30, "ignore_eos": True}
    with Engine(model) as engine:
        expected = [o.token_ids for o in engine.generate(texts, **options)]
    with Engine(model, prefill_stretch=1.5, drafter="prompt-lookup", debug=True) as engine:
        params, done = SamplingParams(**options), {}
        ids = [engine.add_request(p, params) for p in texts[:-1]]
        for _ in range(4):
            done |= {o.request_id: o for o in engine.step()}
        ids.append(engine.add_request(texts[-1], params))
        while engine.has_unfinished():
            done |= {o.request_id: o for o in engine.step()}
        scheduler = engine.scheduler
    assert [done[i].token_ids for i in ids] == expected
    beside = [sum(n for _, n, _ in d.prefills) for d in scheduler.decisions if d.decodes]
    assert 0 < max(beside) < len(texts[-1])
    limits = {"max_batch_size": 16, "max_draft": scheduler.max_draft}
    assert scheduler.decisions == replay(scheduler.events, **limits)


def test_a_prompt_that_is_read_in_slices_is_not_moved(monkeypatch):
    """Moving a long row to larger storage would hold up the rows that decode."""
    from retort.cache.attention import AttentionRowCache

    moved, grow = [], AttentionRowCache._grow

    def watch(self, row, used, capacity):
        moved.append((row, used))
        grow(self, row, used, capacity)

    monkeypatch.setattr(AttentionRowCache, "_grow", watch)
    with Engine(toy(), max_prefill_tokens=5) as engine:
        moved.clear()
        engine.generate([list(range(3, 90)) * 2], max_new_tokens=2)
    assert moved == [(0, 0)]
