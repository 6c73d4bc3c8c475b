"""The attention row cache against a naive list of tokens, under random operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.cache.attention import AttentionRowCache
from retort.errors import ConfigurationError, RewindError

KV_HEADS, DIM, LAYERS = 2, 3, 2


def _states(tokens, layer):
    """Keys that tell which token and layer they came from, ``[1, kv_heads, n, dim]``."""
    base = torch.tensor([float(t) for t in tokens])[None, None, :, None]
    return (base * 10 + layer).expand(1, KV_HEADS, len(tokens), DIM).double()


class Naive:
    """A list of tokens for each row."""

    def __init__(self):
        self.rows = {}


def _append(cache, naive, rows, counts, source):
    tokens = [[next(source) for _ in range(c)] for c in counts]
    cache.begin(rows, counts)
    flat = [t for chunk in tokens for t in chunk]
    for layer in range(LAYERS):
        cache.update(_states(flat, layer), -_states(flat, layer), layer)
    cache.end()
    for row, chunk in zip(rows, tokens, strict=True):
        naive.rows[row] += chunk


def _assert_equal(cache, naive):
    assert cache.rows == tuple(sorted(naive.rows))
    for row, tokens in naive.rows.items():
        assert cache.length(row) == len(tokens)
        for layer in range(LAYERS if tokens else 0):
            keys, values = cache.keys_values(row, layer, len(tokens))
            assert torch.equal(keys, _states(tokens, layer)[0])
            assert torch.equal(values, -_states(tokens, layer)[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_operations_equal_a_list_of_tokens(data):
    cache, naive, source = AttentionRowCache(poison=math.nan), Naive(), iter(range(1, 10**6))
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["open", "append", "append", "rewind", "free"]))
        if kind == "open" or not naive.rows:
            naive.rows[cache.add_row()] = []
        elif kind == "append":
            rows = data.draw(st.permutations(sorted(naive.rows)))
            rows = rows[: data.draw(st.integers(1, len(rows)))]
            _append(cache, naive, rows, [data.draw(st.integers(1, 40)) for _ in rows], source)
        else:
            row = data.draw(st.sampled_from(sorted(naive.rows)))
            if kind == "free":
                cache.free_row(row)
                del naive.rows[row]
            else:
                length = data.draw(st.integers(0, len(naive.rows[row])))
                cache.rewind(row, length)
                del naive.rows[row][length:]
        _assert_equal(cache, naive)


def test_storage_follows_the_rows_and_not_the_longest():
    cache, naive, source = AttentionRowCache(), Naive(), iter(range(10**7))
    lengths = [16, 64, 100, 1000, 4096]
    for length in lengths:
        row = cache.add_row()
        naive.rows[row] = []
        for count in [length - length // 3] + [1] * (length // 3):
            _append(cache, naive, [row], [count], source)
    needed = sum(lengths) * 2 * LAYERS * KV_HEADS * DIM * 8
    assert needed <= cache.allocated_bytes <= 2 * needed


def test_a_failed_pass_leaves_the_lengths():
    cache = AttentionRowCache()
    row = cache.add_row()
    cache.begin([row], [5])
    cache.cancel()
    assert cache.length(row) == 0


def test_errors_name_both_sides():
    cache = AttentionRowCache()
    row = cache.add_row()
    with pytest.raises(RewindError, match="row 0 cannot be rewound to length 4: it holds 0"):
        cache.rewind(row, 4)
    with pytest.raises(ConfigurationError, match="no row 7"):
        cache.length(7)
    with pytest.raises(ConfigurationError, match="distinct rows"):
        cache.begin([row, row], [1, 1])


def test_a_row_that_says_how_much_it_will_hold_is_moved_once():
    def moves(room):
        cache = AttentionRowCache(poison=math.nan)
        row, seen = cache.add_row(room), set()
        naive, source = Naive(), iter(range(1, 10**6))
        naive.rows[row] = []
        for _ in range(40):
            _append(cache, naive, [row], [10], source)
            seen.add(cache.capacity(row))
        _assert_equal(cache, naive)
        return seen

    assert len(moves(400)) == 1 and max(moves(400)) < 520
    assert len(moves(0)) > 5
    assert len(moves(10)) > 3, "too little room is no limit"


def test_a_row_made_of_kept_pieces_has_the_room_that_it_will_need():
    cache, naive, source = AttentionRowCache(poison=math.nan), Naive(), iter(range(1, 10**6))
    naive.rows[cache.add_row()] = []
    _append(cache, naive, [0], [32], source)
    row = cache.unpark(cache.parked(32, [cache.piece(0, 0, 16), cache.piece(0, 16, 32)]), 300)
    naive.rows[row] = list(naive.rows[0])
    before = cache.capacity(row)
    _append(cache, naive, [row], [268], source)
    assert cache.capacity(row) == before >= 300
    _assert_equal(cache, naive)
    cache.free_row(row)
    assert cache.add_row() == row
    cache.begin([row], [1])
    assert cache.capacity(row) < 32, "the next row does not inherit it"
