"""Ragged attention against a naive float64 row, its bits in any company, bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native.attention import RaggedLayout, RowBuffers, ragged_attention

NAN = float("nan")


@dataclass(frozen=True)
class Model:
    heads: int = 6
    kv_heads: int = 2
    dk: int = 64
    dv: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def options(self):
        sinks = torch.linspace(-1, 2, self.heads) if self.sinks else None
        return {
            "scaling": self.dk**-0.5,
            "sliding_window": self.window,
            "softcap": self.softcap,
            "sinks": sinks,
        }


MODELS = [
    Model(),
    Model(dk=128, dv=128, heads=4, kv_heads=4),
    Model(dk=7, dv=5, heads=3, kv_heads=1),
    Model(dk=80, dv=40, heads=10, kv_heads=2, window=9),
    Model(dk=24, dv=100, window=70, softcap=3.0),
    Model(dk=16, dv=33, sinks=True, softcap=20.0),
    Model(heads=7, kv_heads=1, dk=1, dv=1),
]


def row_tensors(model, length, seed):
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return (
        2 * new(length, model.heads, model.dk),
        new(length, model.kv_heads, model.dk),
        new(length, model.kv_heads, model.dv),
    )


def naive(model, q, k, v):
    """All positions of a row, float64, straight from the definition."""
    options, group = model.options(), model.heads // model.kv_heads
    out = torch.zeros(len(q), model.heads, model.dv, dtype=torch.float64)
    for i in range(len(q)):
        first = 0 if model.window is None else max(0, i - model.window + 1)
        for head in range(model.heads):
            keys, values = (t[first : i + 1, head // group].double() for t in (k, v))
            scores = keys @ q[i, head].double() * options["scaling"]
            if model.softcap:
                scores = model.softcap * torch.tanh(scores / model.softcap)
            if model.sinks:
                scores = torch.cat((scores, options["sinks"][head].double()[None]))
            out[i, head] = scores.softmax(0)[: len(keys)] @ values
    return out.flatten(1)


class Rows:
    """Rows with poisoned spare capacity, fed by packed passes."""

    def __init__(self, model, data, spare=3):
        self.model, self.data, self.lengths = model, data, [0] * len(data)
        shape = [(model.kv_heads, len(q) + spare) for q, _, _ in data]
        self.keys = [torch.full((*s, model.dk), NAN) for s in shape]
        self.values = [torch.full((*s, model.dv), NAN) for s in shape]

    def feed(self, rows, counts):
        """One pass; returns for each row its ``[count, heads * dv]``."""
        starts = [self.lengths[r] for r in rows]
        parts = [
            [t[s : s + c] for t in self.data[r]]
            for r, s, c in zip(rows, starts, counts, strict=True)
        ]
        q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        layout = RaggedLayout(starts, counts, [self.keys[r].shape[1] for r in rows])
        buffers = RowBuffers([self.keys[r] for r in rows], [self.values[r] for r in rows])
        out = ragged_attention(q, k, v, layout, buffers, **self.model.options())
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return out.split(counts)


def whole(model, row):
    """A row's outputs token by token, alone."""
    rows = Rows(model, [row])
    return torch.cat([rows.feed([0], [1])[0] for _ in row[0]])


@lru_cache
def whole_of_seed(model, seed, _isa):
    return whole(model, row_tensors(model, 90, seed))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_equals_the_naive_float64_row(isa, threads, model):
    lengths = (1, 3, 65, 150)
    data = [row_tensors(model, n, n) for n in lengths]
    outs = Rows(model, data).feed(range(4), list(lengths))
    for out, row in zip(outs, data, strict=True):
        torch.testing.assert_close(out.double(), naive(model, *row), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_query_has_the_same_bits_alone_chunked_and_in_company(isa, threads, model):
    lengths = (130, 25, 70)
    data = [row_tensors(model, n, n) for n in lengths]
    alone = [whole(model, row) for row in data]
    rows = Rows(model, data)
    got = [[], [], []]
    plan = [([0, 1, 2], [100, 5, 1]), ([2, 0], [50, 1]), ([1, 2, 0], [20, 9, 8])]
    for which, counts in [*plan, ([0], [21]), ([2], [10])]:
        for row, out in zip(which, rows.feed(which, counts), strict=True):
            got[row].append(out)
    for parts, want in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(parts), want)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.skipif(not native.available(), reason="no native core")
def test_any_sequence_of_passes_and_rejections_gives_the_bits_of_one_token_at_a_time(data):
    model = data.draw(st.sampled_from(MODELS[:6]))
    tensors = [row_tensors(model, 90, seed) for seed in range(3)]
    alone = [whole_of_seed(model, seed, native.isa()) for seed in range(3)]
    rows = Rows(model, tensors)
    for _ in range(6):
        which = data.draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
        which = [r for r in which if rows.lengths[r] < 90]
        if not which:
            continue
        counts = [data.draw(st.integers(1, min(40, 90 - rows.lengths[r]))) for r in which]
        outs = rows.feed(which, counts)
        for row, out, count in zip(which, outs, counts, strict=True):
            end = rows.lengths[row]
            assert torch.equal(out, alone[row][end - count : end])
            rows.lengths[row] -= data.draw(st.integers(0, count))


def test_strided_heads_first_tensors_are_read_in_place(isa):
    model = MODELS[0]
    q, k, v = row_tensors(model, 20, 0)
    want = whole(model, (q, k, v))
    q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
    assert torch.equal(Rows(model, [(q, k, v)]).feed([0], [20])[0].clone(), want)


def call(model=MODELS[0], count=4, capacity=6, start=0, **changes):
    q, k, v = row_tensors(model, count, 0)
    keys = torch.zeros(model.kv_heads, capacity, model.dk)
    values = torch.zeros(model.kv_heads, capacity, model.dv)
    tensors = {"query": q, "key": k, "value": v} | changes
    layout = RaggedLayout([start], [count], [capacity])
    return ragged_attention(
        **tensors, layout=layout, buffers=RowBuffers([keys], [values]), **model.options()
    )


def test_keys_already_in_the_buffers_need_not_be_given(isa):
    model = MODELS[0]
    q, k, v = row_tensors(model, 20, 0)
    buffers = RowBuffers([k.transpose(0, 1).contiguous()], [v.transpose(0, 1).contiguous()])
    layout = RaggedLayout([12], [8], [20])
    out = ragged_attention(q[12:], None, None, layout, buffers, **model.options())
    assert torch.equal(out, whole(model, (q, k, v))[12:])


@pytest.mark.skipif(not native.available(), reason="no native core")
def test_an_empty_pass_gives_nothing():
    out = ragged_attention(
        torch.zeros(0, 2, 0), None, None, RaggedLayout([], [], []), RowBuffers([], []), scaling=1.0
    )
    assert out.shape == (0, 0)


def test_bad_tensors_are_refused_before_a_pointer_is_taken():
    q, k, v = row_tensors(MODELS[0], 4, 0)
    bad = [
        {"query": q[:3]},
        {"query": q.double()},
        {"query": q.to("meta")},
        {"query": q[0]},
        {"query": q.transpose(1, 2).contiguous().transpose(1, 2)},
        {"query": q[:, :5]},
        {"key": k[:, :1]},
        {"key": None},
        {"value": v[..., :3]},
    ]
    for change in bad:
        with pytest.raises(ConfigurationError):
            call(**change)


def test_lengths_beyond_capacity_and_bad_buffers_are_refused():
    for start, count, capacity in ((3, 4, 6), (-1, 2, 6), (0, 0, 6)):
        with pytest.raises(ConfigurationError, match="do not fit"):
            RaggedLayout([start], [count], [capacity])
    with pytest.raises(ConfigurationError, match="one entry"):
        RaggedLayout([0], [1, 1], [3])
    good = torch.zeros(2, 8, 4)
    for keys, values in (
        ([good], []),
        ([good], [good.double()]),
        ([good], [good.transpose(0, 1)]),
        ([good], [torch.zeros(2, 9, 4)]),
        ([good, torch.zeros(3, 8, 4)], [good, good]),
    ):
        with pytest.raises(ConfigurationError):
            RowBuffers(keys, values)
    layout = RaggedLayout([0], [1], [9])
    with pytest.raises(ConfigurationError, match="capacities"):
        ragged_attention(
            torch.zeros(1, 2, 4), None, None, layout, RowBuffers([good], [good]), scaling=1.0
        )
    with pytest.raises(ConfigurationError, match="sliding_window"):
        call(replace(MODELS[0], window=0))


def test_rows_joined_one_by_one_are_the_buffers_of_all():
    keys, values = ([torch.randn(2, capacity, 4) for capacity in (3, 8)] for _ in range(2))
    single = [RowBuffers([k], [v]) for k, v in zip(keys, values, strict=True)]
    joined, whole = RowBuffers.joined(single), RowBuffers(keys, values)
    assert joined.addresses == whole.addresses and joined.capacities == whole.capacities == (3, 8)
    assert joined.values - joined.keys == whole.values - whole.keys
    with pytest.raises(ConfigurationError, match="one size"):
        RowBuffers.joined([single[0], RowBuffers([torch.zeros(3, 8, 4)], [torch.zeros(3, 8, 4)])])
