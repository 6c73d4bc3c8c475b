"""One contract for every row cache: random operations against a naive list of tokens a row.

The list of tokens is read anew by the whole model; the cache must give the same logits for what
was appended, whatever was rewound, freed, parked, copied or poisoned in between.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.cache.attention import AttentionRowCache
from retort.cache.mamba import MambaRowCache
from retort.cache.native import NativeAttentionRowCache
from retort.cache.retention import RetentionRowCache
from retort.decode.packed import PackedModel
from retort.errors import ConfigurationError, RetortError, RewindError
from retort.ops import native
from tests.decode.toys import toy
from tests.models import mambas, retnets

F32, F64 = torch.float32, torch.float64
SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
OPERATIONS = [
    "open",
    "append",
    "append",
    "append",
    "rewind",
    "free",
    "park",
    "select",
    "cancel",
    "twin",
]


def llama(dtype, backend):
    model = toy(dtype=dtype, **SMALL, head_dim=4 if dtype == F64 else 16)
    packed = PackedModel(model, cpu_backend=backend)
    packed.cache._poison = math.nan
    return packed


CACHES = {
    "attention": lambda: llama(F64, "torch"),
    "native": lambda: llama(F32, "native"),
    "retention draft": lambda: PackedModel(retnets.tiny(), max_draft=5),
    "retention completion": lambda: PackedModel(retnets.tiny(), tape="completion"),
    "mamba draft": lambda: PackedModel(mambas.tiny(), max_draft=5),
    "mamba completion": lambda: PackedModel(mambas.tiny(), tape="completion"),
}
KINDS = {
    "attention": AttentionRowCache,
    "native": NativeAttentionRowCache,
    "retention": RetentionRowCache,
    "mamba": MambaRowCache,
}


@pytest.fixture(scope="module", params=CACHES)
def packed(request):
    """A packed model over the cache; tests leave it without rows."""
    if request.param == "native" and not native.available():
        pytest.skip(native.why_not())
    made = CACHES[request.param]()
    assert type(made.cache) is KINDS[request.param.split()[0]]
    yield made
    made.close()


class Naive:
    """The tokens of every row, and what the model says to them without any cache."""

    def __init__(self, packed):
        self.packed = packed
        self.rows = {}
        self.parked = []

    @torch.no_grad()
    def logits(self, row, last):
        ids = torch.tensor([self.rows[row]])
        return self.packed.model(input_ids=ids, use_cache=False).logits[0, -last:]


def poison(cache):
    """NaN wherever no token of a row lies."""
    if isinstance(cache, AttentionRowCache):
        for row, layers in cache._buffers.items():
            for buffer in layers.values():
                buffer[:, :, cache.length(row) :] = math.nan
        return
    cache.poison()


def append(data, packed, naive):
    rows = data.draw(st.permutations(sorted(naive.rows)))
    rows = rows[: data.draw(st.integers(1, len(rows)))]
    feeds = [(r, data.draw(st.lists(st.integers(3, 30), min_size=1, max_size=40))) for r in rows]
    for row, tokens in feeds:
        naive.rows[row] += tokens
    got = packed.forward(feeds, [len(tokens) for _, tokens in feeds])
    want = torch.cat([naive.logits(row, len(tokens)) for row, tokens in feeds])
    tolerance = 1e-9 if got.dtype == F64 else 2e-4
    torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)


def rewind(data, packed, naive):
    row = data.draw(st.sampled_from(sorted(naive.rows)))
    length = data.draw(st.integers(packed.cache.earliest(row), len(naive.rows[row])))
    packed.rewind(row, length)
    del naive.rows[row][length:]


def free(data, packed, naive):
    row = data.draw(st.sampled_from(sorted(naive.rows)))
    packed.free_row(row)
    del naive.rows[row]


def park(data, packed, naive):
    """Out with one row; every second time in with one that waits."""
    if naive.parked and data.draw(st.booleans()):
        parked, tokens = naive.parked.pop()
        naive.rows[packed.cache.unpark(parked)] = tokens
        return
    row = data.draw(st.sampled_from(sorted(naive.rows)))
    parked, tokens = packed.cache.park(row), naive.rows.pop(row)
    assert (parked is None) == isinstance(packed.cache, AttentionRowCache)
    if parked is not None:
        naive.parked.append((parked, tokens))


def select(data, packed, naive):
    order = data.draw(st.lists(st.sampled_from(sorted(naive.rows)), min_size=1, max_size=4))
    packed.cache.select(order)
    naive.rows = {i: list(naive.rows[row]) for i, row in enumerate(order)}


def cancel(data, packed, naive):
    """A pass that fails: no row has moved."""
    row = data.draw(st.sampled_from(sorted(naive.rows)))
    packed.cache.begin([row], [data.draw(st.integers(1, 30))])
    packed.cache.cancel()


def twin(data, packed, naive):
    """A new row made of copied pieces of an old one."""
    row = data.draw(st.sampled_from(sorted(naive.rows)))
    cache, tokens = packed.cache, naive.rows[row]
    if not tokens:
        return
    length = data.draw(st.integers(1, len(tokens))) if cache.divisible else len(tokens)
    cuts = range(0, length, 7) if cache.divisible else [0]
    pieces = [cache.piece(row, at, min(at + 7, length)) for at in cuts if cache.divisible]
    pieces = pieces or [cache.piece(row, 0, length)]
    naive.rows[cache.unpark(cache.parked(length, pieces))] = tokens[:length]


ACTIONS = {"append": append, "rewind": rewind, "free": free, "park": park, "select": select}
ACTIONS |= {"cancel": cancel, "twin": twin}


def exercise(data, packed, most):
    naive = Naive(packed)
    for _ in range(data.draw(st.integers(2, most))):
        kind = data.draw(st.sampled_from(OPERATIONS))
        if kind == "open" or not naive.rows:
            naive.rows[packed.add_row()] = []
        else:
            ACTIONS[kind](data, packed, naive)
        packed.cache.check()
        assert {r: packed.length(r) for r in packed.cache.rows} == {
            row: len(tokens) for row, tokens in naive.rows.items()
        }
        poison(packed.cache)


def run(packed, examples, most):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

    @settings(max_examples=examples, deadline=None, suppress_health_check=quiet, database=None)
    @given(st.data())
    def test(data):
        try:
            exercise(data, packed, most)
        finally:
            packed.cache.cancel()
            for row in packed.cache.rows:
                packed.free_row(row)

    test()


def test_random_operations_equal_a_list_of_tokens(packed):
    run(packed, examples=15, most=10)


@pytest.mark.slow
def test_many_random_operations_equal_a_list_of_tokens(packed):
    run(packed, examples=300, most=25)


def test_parked_rows_come_back_with_the_same_bits(packed):
    """Recurrent rows copy state and tape out; attention rows are read again."""
    first, other = [5, 6, 7] * 9, [8, 9] * 20
    row = packed.add_row()
    packed.forward([(row, first)], [1])
    plain = packed.forward([(row, [4, 5])], [2])
    packed.free_row(row)

    row = packed.add_row()
    packed.forward([(row, first)], [1])
    parked = packed.cache.park(row)
    guest = packed.add_row()
    packed.forward([(guest, other)], [1])
    poison(packed.cache)
    if parked is None:
        row = packed.add_row()
        packed.forward([(row, first)], [1])
    else:
        row = packed.cache.unpark(parked)
        assert row != guest
    assert torch.equal(packed.forward([(row, [4, 5])], [2]), plain)
    packed.cache.check()
    for each in packed.cache.rows:
        packed.free_row(each)


def test_errors_name_both_sides(packed):
    row = packed.add_row()
    with pytest.raises(RewindError, match="cannot be rewound to length 4: it holds 0"):
        packed.rewind(row, 4)
    with pytest.raises(ConfigurationError, match="no row 7"):
        packed.cache.park(7)
    with pytest.raises(ConfigurationError, match="no row 7"):
        packed.cache.select([row, 7])
    packed.free_row(row)


def test_the_check_finds_what_does_not_fit(packed):
    row = packed.add_row()
    packed.forward([(row, [3, 4, 5])], [1])
    packed.cache.check()
    packed.cache._lengths[9] = 2
    with pytest.raises(RetortError, match=r"is inconsistent: .* of other rows"):
        packed.cache.check()
    del packed.cache._lengths[9]
    packed.cache.begin([row], [1])
    with pytest.raises(RetortError, match="a pass is open"):
        packed.cache.check()
    packed.cache.cancel()
    packed.free_row(row)
