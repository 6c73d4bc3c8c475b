"""All layers in one call: shapes that do not fit are refused, and rows do not see each other.

Bits beside separate calls and numbers beside the naive model: `tests.models.test_one_call`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops.native.elementwise import Norm
from retort.ops.native.retention import RetentionRows, RetentionTables
from retort.ops.native.retnet import NativeRetNet, NativeRetNetLayer, RetNetMemory
from retort.ops.panels import pack
from retort.ops.retention import BlockDecay, log_decay, position_tables

HIDDEN, HEADS, DK, DV, LENGTH, LAYERS = 37, 3, 6, 21, 4, 3
K, V = HEADS * DK, HEADS * DV
STARTS, COUNTS = (0, 5, 13), (23, 1, 6)
NAN = float("nan")
TABLES = RetentionTables(BlockDecay.of(log_decay(HEADS, torch.float32), LENGTH), DK, DV)


def weight(n, k):
    return pack(torch.randn(n, k) / k**0.5)


def norm(n):
    return Norm(1 + 0.2 * torch.randn(n), 1e-6)


def layer(window):
    gates = [(11, HIDDEN), (7, HIDDEN), (K, 11), (V, 7)] if window else []
    return NativeRetNetLayer(
        projections=[weight(n, HIDDEN) for n in (K, K, 2 * V)],
        output=weight(HIDDEN, V),
        norm=norm(HIDDEN),
        group_norm=norm(DV),
        window=window,
        selects=[weight(*size) for size in gates],
        fused_norms=[norm(K), norm(V)] if window else None,
        mlp=[weight(*size) for size in ((19, HIDDEN), (19, HIDDEN), (HIDDEN, 19))],
        mlp_norm=norm(HIDDEN),
    )


def model():
    torch.manual_seed(0)
    return NativeRetNet([layer(i) for i in range(LAYERS)], norm(HIDDEN))


def problem(which=(0, 1, 2), seed=1):
    """Arguments of a call over some rows; everything that may not be read is NaN."""
    starts, counts = ([x[i] for i in which] for x in (STARTS, COUNTS))
    tokens = [torch.randn(n, HIDDEN, generator=_generator(seed + i)) for i, n in enumerate(COUNTS)]
    positions = torch.cat([s + torch.arange(n) for s, n in zip(starts, counts, strict=True)])
    first = [s // LENGTH for s in starts]
    last = [(s + n - 1) // LENGTH for s, n in zip(starts, counts, strict=True)]
    rows = RetentionRows(
        tuple(starts), tuple(counts),
        states=tuple(i if b >= 2 else -1 for i, b in zip(which, first, strict=True)),
        before=tuple(2 * i if b else -1 for i, b in zip(which, first, strict=True)),
        current=tuple(2 * i + 1 if s % LENGTH else -1 for i, s in zip(which, starts, strict=True)),
        moved=tuple(i if b > a else -1 for i, a, b in zip(which, first, last, strict=True)),
        moved_blocks=tuple(last),
    )  # fmt: skip
    n = len(STARTS)
    states = torch.randn(LAYERS, n, HEADS, DK, DV, generator=_generator(2))
    tapes = [
        torch.randn(LAYERS, 2 * n + 1, HEADS, LENGTH, d, generator=_generator(3)) for d in (DK, DV)
    ]
    for i, start in enumerate(STARTS):
        for tape in tapes:
            tape[:, 2 * i + 1, :, start % LENGTH :] = NAN
    pages = torch.full((len(positions),), -1)
    moved = torch.full_like(states, NAN)
    memory = RetNetMemory(TABLES, rows, states, *tapes, moved, positions, pages)
    angles = position_tables(HEADS, DK).at(positions)
    everything = torch.arange(len(positions))
    return torch.cat([tokens[i] for i in which]), *angles, DK**-0.5, memory, everything


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_a_rows_bits_ignore_its_company_and_the_threads(isa):
    layers = model()
    together, memory = layers(*(call := problem())), call[-2]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layers(*problem()), together)
    finally:
        torch.set_num_threads(before)
    assert together.isfinite().all()
    for i, part in enumerate(together.split(COUNTS)):
        alone = problem([i])
        assert torch.equal(layers(*alone), part)
        assert torch.equal(alone[-2].moved[:, i].isnan(), memory.moved[:, i].isnan())
        if memory.rows.moved[i] >= 0:
            assert torch.equal(alone[-2].moved[:, i], memory.moved[:, i])


def test_only_the_named_pages_are_written(isa):
    layers, call = model(), problem()
    memory = call[-2]
    kept = [memory.keys.clone(), memory.values.clone()]
    memory.pages[-1] = 2 * len(STARTS)
    layers(*call)
    offset = int(memory.positions[-1]) % LENGTH
    for tape, before in zip((memory.keys, memory.values), kept, strict=True):
        assert not torch.equal(tape[:, -1, :, offset], before[:, -1, :, offset])
        tape[:, -1, :, offset] = before[:, -1, :, offset]
        assert torch.equal(tape.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("value_heads", [DV, 32])
@pytest.mark.parametrize("which", [[], [0], [5, 6, 22, 23, 29], [*range(3, 20), 28]])
def test_wanted_tokens_alone_have_the_same_bits(isa, value_heads, which, monkeypatch):
    """Whether or not values fill whole panels, so that the last layer can leave tokens out."""
    monkeypatch.setitem(globals(), "DV", value_heads)
    monkeypatch.setitem(globals(), "V", HEADS * value_heads)
    decay = BlockDecay.of(log_decay(HEADS, torch.float32), LENGTH)
    monkeypatch.setitem(globals(), "TABLES", RetentionTables(decay, DK, value_heads))
    layers, (*call, every) = model(), problem()
    want, moved = layers(*call, every), call[-1].moved.clone()
    tapes = [x.clone() for x in (call[-1].keys, call[-1].values)]
    *call, _ = problem()
    got = layers(*call, torch.tensor(which, dtype=torch.long))
    assert torch.equal(got, want[which])
    assert torch.equal(call[-1].moved.nan_to_num(7.0), moved.nan_to_num(7.0))
    for tape, kept in zip((call[-1].keys, call[-1].values), tapes, strict=True):
        assert torch.equal(tape.nan_to_num(7.0), kept.nan_to_num(7.0))


def test_no_tokens(isa):
    nothing = RetentionRows((), (), (), (), (), (), ())
    x, cos, sin, root, scale, memory, every = problem()
    empty = replace(memory, rows=nothing, positions=torch.empty(0, dtype=torch.long),
                    pages=torch.empty(0, dtype=torch.long))  # fmt: skip
    assert model()(x[:0], cos[:0], sin[:0], root[:0], scale, empty, every[:0]).shape == (0, HIDDEN)


def test_bad_input_is_refused():
    layers = model()
    x, cos, sin, root, scale, memory, every = problem()
    one, last = layers.layers[0], layers.layers[-1]

    def call(x=x, cos=cos, root=root, wanted=every, **changes):
        return layers(x, cos, sin, root, scale, replace(memory, **changes), wanted)

    other = RetentionTables(BlockDecay.of(log_decay(HEADS, torch.float32), LENGTH), DK, DV + 1)
    for bad in (
        lambda: call(x=x.double()),
        lambda: call(x=x[:, :-1]),
        lambda: call(x=x[1:]),
        lambda: call(cos=cos[:-1]),
        lambda: call(root=root[:, :-1]),
        lambda: call(states=memory.states[:-1]),
        lambda: call(states=memory.states[:, :1]),
        lambda: call(keys=memory.keys[:, :2], values=memory.values[:, :2]),
        lambda: call(values=memory.values[:, 1:]),
        lambda: call(moved=memory.moved[:, :1]),
        lambda: call(pages=memory.pages + 9),
        lambda: call(pages=memory.pages.int()),
        lambda: call(positions=memory.positions[1:]),
        lambda: call(tables=other),
        lambda: call(wanted=every + 1),
        lambda: call(wanted=every.flip(0)),
        lambda: call(wanted=every.int()),
        lambda: NativeRetNet([], norm(HIDDEN)),
        lambda: NativeRetNet([last], norm(HIDDEN)),
        lambda: NativeRetNet([one, replace(one, selects=last.selects)], norm(HIDDEN)),
        lambda: NativeRetNet([one, replace(layer(1), selects=())], norm(HIDDEN + 1)),
        lambda: NativeRetNet([one, layer(1), replace(layer(1), selects=())], norm(HIDDEN)),
        lambda: NativeRetNet([replace(one, output=weight(HIDDEN, V - 1))], norm(HIDDEN)),
        lambda: NativeRetNet([replace(one, mlp=())], norm(HIDDEN)),
        lambda: NativeRetNet([one, replace(one, mlp=(), mlp_norm=None)], norm(HIDDEN)),
        lambda: NativeRetNet(
            [replace(one, output=pack(torch.randn(HIDDEN, V), torch.ones(HIDDEN)))], norm(HIDDEN)
        ),
    ):
        with pytest.raises(ConfigurationError):
            bad()
