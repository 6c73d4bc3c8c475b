"""All layers in one call: shapes that do not fit are refused, and rows do not see each other.

Bits beside separate calls and numbers beside the naive model: `tests.models.test_one_call`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops.native.elementwise import Norm
from retort.ops.native.mamba import MambaMemory, NativeMamba, NativeMambaLayer
from retort.ops.native.scan import ScanRows
from retort.ops.panels import pack

HIDDEN, D, N, K, RANK, LAYERS, PAGE = 21, 150, 5, 4, 3, 3, 8
COUNTS = (1, 9, 4)
NAN = float("nan")
SLOTS, PAGES = 3 * len(COUNTS), len(COUNTS) + 1


def weight(n, k, bias=False):
    return pack(torch.randn(n, k) / k**0.5, torch.randn(n) if bias else None)


def norm(n):
    return Norm(1 + 0.2 * torch.randn(n), 1e-6)


def layer(window):
    return NativeMambaLayer(
        input=weight(2 * D, HIDDEN),
        parameters=weight(RANK + 2 * N, D),
        step=weight(D, RANK, bias=True),
        output=weight(HIDDEN, D),
        norm=norm(HIDDEN),
        convolution=torch.randn(D, K),
        convolution_bias=torch.randn(D),
        a=-torch.rand(N, D) - 0.1,
        d=torch.randn(D),
        window=window,
        select=[weight(7, HIDDEN), weight(D, 7)] if window else [],
    )


def model():
    torch.manual_seed(0)
    return NativeMamba([layer(i) for i in range(LAYERS)], norm(HIDDEN))


def problem(which=(0, 1, 2)):
    """Arguments of a call over some rows: row 0 goes on from state 0, the others start anew.

    Each row keeps the state after its first and after its last token; what may not be read is NaN.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(n, HIDDEN, generator=generator) for n in COUNTS]
    counts = tuple(COUNTS[i] for i in which)
    ends = torch.tensor(counts).cumsum(0).tolist()
    kept = {}
    for i, count, end in zip(which, counts, ends, strict=True):
        kept[end - count] = 3 * i + 1
        kept[end - 1] = 3 * i + 2
    rows = ScanRows(counts, tuple(0 if i == 0 else -1 for i in which), tuple(kept.items()))
    states = torch.full((LAYERS, SLOTS, N, D), NAN)
    states[:, 0] = torch.randn(LAYERS, N, D, generator=generator)
    inputs = torch.full((LAYERS, PAGES, PAGE, D), NAN)
    inputs[:, 0, : K - 1] = torch.randn(LAYERS, K - 1, D, generator=generator)
    old = torch.tensor([0 if i == 0 else -1 for i in which])[:, None].expand(-1, K - 1)
    history = old.contiguous(), torch.arange(K - 1).expand(len(which), -1).contiguous()
    tape = torch.full((ends[-1],), -1), torch.zeros(ends[-1], dtype=torch.long)
    last = tuple(3 * i + 2 for i in which)
    fed = torch.full((LAYERS, PAGES, PAGE, 2 * D + N), NAN)
    memory = MambaMemory(rows, last, states, fed, inputs, history, tape)
    return torch.cat([tokens[i] for i in which]), memory


def test_a_rows_bits_ignore_its_company_and_the_threads(isa):
    layers = model()
    x, memory = problem()
    together = layers(x, memory)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layers(*problem()), together)
    finally:
        torch.set_num_threads(before)
    assert together.isfinite().all()
    for i, part in enumerate(together.split(COUNTS)):
        x, alone = problem([i])
        assert torch.equal(layers(x, alone), part)
        for slot in (3 * i + 1, 3 * i + 2):
            if COUNTS[i] > 1 or slot == 3 * i + 2:
                assert alone.states[:, slot].isfinite().all()
                assert torch.equal(alone.states[:, slot], memory.states[:, slot])


def test_only_the_named_pages_are_written(isa):
    x, memory = problem()
    kept = [memory.fed.clone(), memory.inputs.clone()]
    memory.tape[0][-1], memory.tape[1][-1] = PAGES - 1, 5
    model()(x, memory)
    for tape, before in zip((memory.fed, memory.inputs), kept, strict=True):
        assert tape[:, -1, 5].isfinite().all()
        tape[:, -1, 5] = NAN
        assert torch.equal(tape.nan_to_num(7.0), before.nan_to_num(7.0))


def test_no_tokens(isa):
    _, memory = problem()
    none, tokens = torch.empty(0, K - 1, dtype=torch.long), torch.empty(0, dtype=torch.long)
    empty = replace(
        memory, rows=ScanRows((), ()), last=(), history=(none, none), tape=(tokens, tokens)
    )
    assert model()(torch.empty(0, HIDDEN), empty).shape == (0, HIDDEN)


def test_bad_input_is_refused():
    layers = model()
    x, memory = problem()
    one, last = layers.layers[0], layers.layers[-1]
    history, tape = memory.history, memory.tape

    def call(x=x, **changes):
        return layers(x, replace(memory, **changes))

    for bad in (
        lambda: call(x=x.double()),
        lambda: call(x=x[1:]),
        lambda: call(x=x[:, 1:]),
        lambda: call(states=memory.states[:-1]),
        lambda: call(states=memory.states[:, :2]),
        lambda: call(fed=memory.fed[..., :-1]),
        lambda: call(inputs=memory.inputs[:, 1:]),
        lambda: call(last=(1, 5, 8)),
        lambda: call(rows=replace(memory.rows, kept=memory.rows.kept[:-1])),
        lambda: call(rows=replace(memory.rows, initial=(SLOTS, -1, -1))),
        lambda: call(history=(history[0] + PAGES, history[1])),
        lambda: call(history=(history[0], history[1] + PAGE)),
        lambda: call(history=(history[0][1:], history[1][1:])),
        lambda: call(tape=(tape[0] - 1, tape[1])),
        lambda: call(tape=(tape[0], tape[1] - 1)),
        lambda: call(tape=(tape[0].int(), tape[1])),
        lambda: NativeMamba([], norm(HIDDEN)),
        lambda: NativeMamba([last], norm(HIDDEN)),
        lambda: NativeMamba([one, replace(one, select=last.select)], norm(HIDDEN)),
        lambda: NativeMamba([one, layer(1), replace(layer(1), select=[])], norm(HIDDEN)),
        lambda: NativeMamba([one], norm(HIDDEN + 1)),
        lambda: NativeMamba([replace(one, output=weight(HIDDEN, D - 1))], norm(HIDDEN)),
        lambda: NativeMamba([replace(one, d=one.d[1:])], norm(HIDDEN)),
        lambda: NativeMamba([replace(one, a=one.a.double())], norm(HIDDEN)),
        lambda: NativeMamba([one, replace(one, convolution=torch.randn(D, K - 1))], norm(HIDDEN)),
    ):
        with pytest.raises(ConfigurationError):
            bad()
