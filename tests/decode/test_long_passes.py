"""Passes of more than 512 tokens are cut: the same bits, counts and lengths, all or nothing."""

from __future__ import annotations

import pytest
import torch

import retort.decode.packed as packed_module
from retort.decode.packed import PackedModel, _parts
from retort.ops import native
from tests.decode.toys import toy

needs_core = pytest.mark.skipif(not native.available(), reason="no native core")
COUNTS, KEEP = [7, 1, 12, 9], [0, 1, 12, 3]


@pytest.fixture
def feeds():
    return [(row, torch.randint(97, (n,)).tolist()) for row, n in enumerate(COUNTS)]


@pytest.mark.parametrize("limit", [1, 2, 5, 8, 28, 29, 100])
def test_parts_hold_every_token_once_in_order_and_keep_what_was_asked(feeds, limit):
    joined, kept = {}, {}
    for part, keep in _parts(feeds, KEEP, limit):
        assert sum(len(tokens) for _, tokens in part) <= limit
        for (row, tokens), k in zip(part, keep, strict=True):
            kept[row] = (
                kept.get(row, [])
                + list(range(len(joined.get(row, [])), 10**6))[len(tokens) - k : len(tokens)]
            )
            joined[row] = joined.get(row, []) + tokens
    assert list(joined.items()) == feeds
    assert [kept[r] for r in range(4)] == [
        list(range(n - k, n)) for n, k in zip(COUNTS, KEEP, strict=True)
    ]


def run(feeds, greedy=False):
    packed = PackedModel(toy(dtype=torch.float32), cpu_backend="native")
    for _ in feeds:
        packed.add_row()
    return packed, packed.forward(feeds, KEEP, greedy)


@needs_core
@pytest.mark.parametrize("greedy", [False, True])
def test_a_cut_pass_has_the_bits_of_a_whole_one(feeds, greedy, monkeypatch):
    _, whole = run(feeds, greedy)
    monkeypatch.setattr(packed_module, "MAX_PASS_TOKENS", 5)
    packed, cut = run(feeds, greedy)
    assert torch.equal(cut, whole)
    assert packed.forward_passes == 6 and packed.forward_tokens == sum(COUNTS)
    assert [packed.length(r) for r in range(4)] == COUNTS


@needs_core
def test_when_a_part_fails_every_row_keeps_its_length(feeds, monkeypatch):
    packed, _ = run(feeds)
    monkeypatch.setattr(packed_module, "MAX_PASS_TOKENS", 5)
    run_part, calls = packed._run, []

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return run_part(*args)

    monkeypatch.setattr(packed, "_run", fail_at_the_third)
    with pytest.raises(MemoryError):
        packed.forward(feeds, KEEP)
    assert [packed.length(r) for r in range(4)] == COUNTS
