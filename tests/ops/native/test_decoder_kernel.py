"""The decoder layer has the bits of the separate kernels, whatever threads and company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops.linear import packed_linear, packed_linears
from retort.ops.native.attention import RaggedLayout, RowBuffers, ragged_attention
from retort.ops.native.decoder import AttentionOptions, NativeDecoder
from retort.ops.native.elementwise import Norm, rms_norm, rotary
from retort.ops.native.stack import NativeStack, StackBuffers
from retort.ops.panels import gated, pack

HEADS, KV_HEADS, DK, DV = 6, 2, 20, 20
COUNTS, STARTS = [1, 40, 3], [70, 0, 9]


def new_decoder(hidden=72, inner=130, head_norms=True, **options):
    torch.manual_seed(0)
    layer = lambda n, k, bias=True: pack(  # noqa: E731
        torch.randn(n, k) / k**0.5, torch.randn(n) if bias else None
    )
    norm = lambda n: Norm(torch.randn(n), 1e-5)  # noqa: E731
    return NativeDecoder(
        projections=[layer(n, hidden) for n in (HEADS * DK, KV_HEADS * DK, KV_HEADS * DV)],
        output=layer(hidden, HEADS * DV),
        gate=layer(inner, hidden, False),
        up=layer(inner, hidden),
        down=layer(hidden, inner),
        attention_norm=norm(hidden),
        mlp_norm=norm(hidden),
        attention=AttentionOptions(HEADS, KV_HEADS, DK**-0.5, **options),
        query_norm=norm(DK) if head_norms else None,
        key_norm=norm(DK) if head_norms else None,
    )


def new_pass(seed=1):
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    capacities = [start + count + 5 for start, count in zip(STARTS, COUNTS, strict=True)]
    buffers = [new(2, KV_HEADS, capacity, DK) for capacity in capacities]
    total = sum(COUNTS)
    return new(1, total, 72), new(total, DK), new(total, DK), buffers


def layout_and_buffers(rows, buffers):
    kept = [buffers[r] for r in rows]
    layout = RaggedLayout(
        [STARTS[r] for r in rows], [COUNTS[r] for r in rows], [b.shape[2] for b in kept]
    )
    return layout, RowBuffers([b[0] for b in kept], [b[1] for b in kept])


def separate(decoder, x, cos, sin, layout, buffers):
    options = decoder.attention
    q, k, v = packed_linears(rms_norm(x, decoder.attention_norm)[0], decoder.projections)
    q, k, v = (t.view(len(t), -1, DK) for t in (q, k, v))
    if decoder.query_norm:
        q, k = rms_norm(q, decoder.query_norm), rms_norm(k, decoder.key_norm)
    attended = ragged_attention(
        rotary(q, cos, sin), rotary(k, cos, sin), v, layout, buffers, scaling=options.scaling,
        sliding_window=options.sliding_window, softcap=options.softcap, sinks=options.sinks,
    )  # fmt: skip
    middle = packed_linear(attended[None], decoder.output, x)
    inner = packed_linear(rms_norm(middle, decoder.mlp_norm), gated(decoder.gate, decoder.up))
    return packed_linear(inner, decoder.down, middle)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head_norms", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 8, "softcap": 5.0, "sinks": torch.linspace(-1, 1, HEADS)}]
)
def test_it_has_the_bits_of_the_separate_kernels(isa, threads, head_norms, options):
    decoder = new_decoder(head_norms=head_norms, **options)
    x, cos, sin, buffers = new_pass()
    copies = [b.clone() for b in buffers]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = decoder(x, cos, sin, *layout_and_buffers(range(3), buffers))
        want = separate(decoder, x, cos, sin, *layout_and_buffers(range(3), copies))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(buffers, copies, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stack_has_the_bits_of_its_layers_one_by_one(isa, threads):
    layers = [new_decoder(), new_decoder(sliding_window=8), new_decoder(softcap=5.0)]
    norm = Norm(torch.randn(72), 1e-5)
    x, cos, sin, buffers = new_pass()
    places = [layout_and_buffers(range(3), [b.clone() for b in buffers]) for _ in range(6)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stack = NativeStack(layers, norm)
        got = stack(x, cos, sin, places[0][0], StackBuffers([p[1] for p in places[:3]]))
    finally:
        torch.set_num_threads(before)
    want = x
    for layer, place in zip(layers, places[3:], strict=True):
        want = layer(want, cos, sin, *place)
    assert torch.equal(got, rms_norm(want, norm))
    for a, b in zip(places[:3], places[3:], strict=True):
        assert all(
            torch.equal(s, t) for s, t in zip(*(p[1].tensors[0] for p in (a, b)), strict=True)
        )


def test_stacks_that_do_not_fit_are_refused():
    layer, norm = new_decoder(), Norm(torch.ones(72), 1e-5)
    x, cos, sin, buffers = new_pass()
    layout, places = layout_and_buffers(range(3), buffers)
    stack = NativeStack([layer, layer], norm)
    for bad in (
        lambda: NativeStack([], norm),
        lambda: NativeStack([layer, new_decoder(inner=64)], norm),
        lambda: NativeStack([layer], Norm(torch.ones(3), 1e-5)),
        lambda: StackBuffers([]),
        lambda: StackBuffers([places, layout_and_buffers([0], buffers)[1]]),
        lambda: stack(x, cos, sin, layout, StackBuffers([places])),
        lambda: stack(x.double(), cos, sin, layout, StackBuffers([places] * 2)),
        lambda: stack(x, cos[1:], sin[1:], layout, StackBuffers([places] * 2)),
    ):
        with pytest.raises(ConfigurationError):
            bad()


def test_a_row_alone_has_the_bits_of_the_row_in_company(isa):
    decoder = new_decoder()
    x, cos, sin, buffers = new_pass()
    copies = [b.clone() for b in buffers]
    together = decoder(x, cos, sin, *layout_and_buffers(range(3), buffers)).split(COUNTS, 1)
    parts = [t.split(COUNTS, d) for t, d in ((x, 1), (cos, 0), (sin, 0))]
    for row in range(3):
        alone = decoder(*(p[row] for p in parts), *layout_and_buffers([row], copies))
        assert torch.equal(alone, together[row])


def test_weights_and_tensors_that_do_not_fit_are_refused():
    decoder = new_decoder()
    x, cos, sin, buffers = new_pass()
    places = layout_and_buffers(range(3), buffers)
    wide = RowBuffers(*[[torch.zeros(KV_HEADS, c, 8) for c in places[0].capacities]] * 2)
    for bad in (
        lambda: decoder(x[:, 1:], cos, sin, *places),
        lambda: decoder(x.double(), cos, sin, *places),
        lambda: decoder(x.transpose(0, 1).expand(-1, 2, -1), cos, sin, *places),
        lambda: decoder(x, cos[1:], sin[1:], *places),
        lambda: decoder(x, cos, sin, places[0], wide),
        lambda: decoder(x, cos, sin, places[0], layout_and_buffers([0, 1], buffers)[1]),
        lambda: replace(decoder, down=decoder.gate)(x, cos, sin, *places),
        lambda: replace(decoder, query_norm=Norm(torch.ones(3), 1e-5))(x, cos, sin, *places),
    ):
        with pytest.raises(ConfigurationError):
            bad()
