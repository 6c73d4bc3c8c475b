"""The native attention cache's look-up of row buffers: a row that grows is looked up alone."""

import math

import pytest
import torch

from retort.cache import native as native_cache
from retort.cache.native import NativeAttentionRowCache
from retort.ops import native
from retort.ops.attention import row_attention
from retort.ops.native.attention import RowBuffers

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

HEADS, KV_HEADS, DIM, LAYERS = 6, 3, 7, 2
SCALE = DIM**-0.5
ROWS = (0, 1, 2)
LENGTH = 90
# Passes over all rows and some, in changing orders; the row that grows brings 5 tokens to each.
ORDERS = [(0, 1, 2), (2, 0, 1), (0, 1), (1, 2, 0), (2, 0), (2, 1), (0, 1, 2), (0, 1, 2)] * 2


def text(row):
    """Queries, keys and values of each layer, ``[heads, LENGTH, DIM]``."""
    generator = torch.Generator().manual_seed(row)
    new = lambda heads: torch.randn(heads, LENGTH, DIM, generator=generator)  # noqa: E731
    return [(new(HEADS), new(KV_HEADS), new(KV_HEADS)) for _ in range(LAYERS)]


TEXTS = {row: text(row) for row in ROWS}


def new_cache(grower=None):
    """A cache of all rows, with room for their text in all but one."""
    cache = NativeAttentionRowCache(poison=math.nan)
    for row in ROWS:
        assert cache.add_row(0 if row == grower else LENGTH) == row
    return cache


def tokens(row, grower):
    return 5 if row == grower else 1 + row


def feed(cache, counts):
    """One pass over ``{row: tokens}``: outputs ``[layers, tokens, heads, DIM]`` of each row."""
    starts, ys = {row: cache.length(row) for row in counts}, []
    cache.begin(list(counts), list(counts.values()))
    for layer in range(LAYERS):
        parts = [
            [x[:, starts[row] : starts[row] + n] for x in TEXTS[row][layer]]
            for row, n in counts.items()
        ]
        q, k, v = (torch.cat(x, 1)[None] for x in zip(*parts, strict=True))
        cache.update(k, v, layer)
        ys.append(cache.attend(layer, q, DIM, scaling=SCALE))
    cache.end()
    for row in ROWS:  # nothing beyond a row's end may be read
        for buffer in cache._buffers[row].values():
            buffer[:, :, cache.length(row) :] = math.nan
    return dict(zip(counts, torch.stack(ys).split(list(counts.values()), 1), strict=True))


def expected(row, start, count):
    """The same in float64, from the text alone."""
    ys = []
    for layer in TEXTS[row]:
        q, k, v = (x[:, : start + count].double() for x in layer)
        ys.append(row_attention(q[:, start:], k, v, scaling=SCALE).transpose(0, 1))
    return torch.stack(ys)


@pytest.mark.parametrize("grower", ROWS)
def test_rows_keep_their_bits_while_another_one_grows(grower):
    """Against each row by itself, in a buffer that never moves."""
    cache, alone = new_cache(grower), [new_cache() for _ in ROWS]
    capacities = {row: set() for row in ROWS}
    for order in ORDERS:
        counts = {row: tokens(row, grower) for row in order}
        starts = {row: cache.length(row) for row in order}
        for row, y in feed(cache, counts).items():
            capacities[row].add(cache.capacity(row))
            assert torch.equal(y, feed(alone[row], {row: counts[row]})[row])
            close = expected(row, starts[row], counts[row])
            torch.testing.assert_close(y.double(), close, atol=1e-5, rtol=0)
    moves = {row: len(seen) for row, seen in capacities.items()}
    assert moves.pop(grower) > 3 and set(moves.values()) == {1}


@pytest.mark.parametrize("grower", ROWS)
def test_only_the_row_that_grew_is_looked_up_again(grower, monkeypatch):
    """Nothing is made where no row grew, and where one did only its own part."""
    looked_up = []

    class Recorded(RowBuffers):
        def __init__(self, keys, values):
            looked_up.extend(key.data_ptr() for key in keys)
            super().__init__(keys, values)

    monkeypatch.setattr(native_cache, "RowBuffers", Recorded)
    cache, before, grown = new_cache(grower), None, 0
    for number in range(16):
        capacity = cache.capacity(grower)
        looked_up.clear()
        cache.begin(ROWS, [tokens(row, grower) for row in ROWS])
        _, stack = cache.stack_places(range(LAYERS), KV_HEADS, DIM)
        changed = ROWS if number == 0 else (grower,) if cache.capacity(grower) > capacity else ()
        assert sorted(looked_up) == sorted(
            buffer[0].data_ptr() for row in changed for buffer in cache._buffers[row].values()
        )
        for layer, part in enumerate(stack.layers):
            rows = [cache._buffers[row][layer] for row in ROWS]
            assert part.addresses == [b[i].data_ptr() for i in (0, 1) for b in rows]
            assert part.capacities == tuple(map(cache.capacity, ROWS))
        assert (stack is before) == (not changed)
        before, grown = stack, grown + bool(changed)
        cache.end()
    assert 3 < grown < 10
