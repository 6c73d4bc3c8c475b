"""The packed linear against float64, and a row's bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from retort.ops.linear import packed_argmax, packed_linear, packed_linears
from retort.ops.panels import gated, pack, unpack

SIZES = [(1, 1), (33, 7), (70, 129), (95, 512), (160, 1024)]
PRECISIONS = ["float32", "bfloat16"]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(got, want, k):
    scale = 1 + want.abs().max()
    return ((got.double() - want).abs().max() / scale).item() < 3e-7 * max(8, k**0.5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_equals_a_float64_product_at_odd_sizes(isa, threads, n, k, precision):
    torch.manual_seed(n)
    weight = pack(torch.randn(n, k), torch.randn(n), precision=precision)
    for m in (1, 2, 5, 13, 37):
        x, residual = torch.randn(m, k), torch.randn(m, n)
        want = x.double() @ unpack(weight).double().T + weight.bias.double() + residual.double()
        assert close(packed_linear(x, weight, residual), want, k)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_gated_layers_equal_silu_gate_times_up(isa, threads, n, k, precision):
    torch.manual_seed(k)
    gate = pack(torch.randn(n, k), torch.randn(n), precision=precision)
    up = pack(torch.randn(n, k), None if n % 2 else torch.randn(n))
    x = torch.randn(19, k)
    one, two = (
        x.double() @ unpack(w).double().T + (0 if w.bias is None else w.bias.double())
        for w in (gate, up)
    )
    assert close(packed_linear(x, gated(gate, up)), F.silu(one) * two, k)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_has_the_same_bits_in_any_company(isa, threads, n, k, precision):
    torch.manual_seed(0)
    plain = pack(torch.randn(n, k), torch.randn(n), precision=precision)
    pair = gated(plain, pack(torch.randn(n, k), precision=precision))
    x = torch.randn(520, k)
    some = [*range(33), 127, 128, 300, 519]
    for weight in (plain, pair):
        alone = torch.cat([packed_linear(x[i : i + 1], weight) for i in some])
        for m in (*range(2, 33), 128, 520):
            kept = [i for i in some if i < m]
            assert torch.equal(packed_linear(x[:m], weight)[kept], alone[: len(kept)]), m


def layer(n, bf16=False):
    weight = torch.randn(n, 40)
    return pack(weight.bfloat16() if bf16 else weight, torch.randn(n))


# Alike, gated alike, of two storage types, gated and not.
TOGETHER = {
    "plain": lambda: [layer(70), layer(33), layer(200)],
    "gated": lambda: [gated(layer(50), layer(50)), gated(layer(97), layer(97))],
    "mixed storage": lambda: [layer(70), layer(33, bf16=True), layer(64)],
    "mixed gate": lambda: [gated(layer(50), layer(50, bf16=True))],
    "all": lambda: [layer(70), layer(33, bf16=True), gated(layer(50), layer(50))],
}


@pytest.mark.parametrize("kind", TOGETHER)
@pytest.mark.parametrize("rows", [1, 3, 5, 18])
def test_several_layers_in_one_call_have_the_bits_of_separate_calls(isa, threads, kind, rows):
    torch.manual_seed(0)
    weights = TOGETHER[kind]()
    x = torch.randn(1, rows, 40)
    for got, weight in zip(packed_linears(x, weights), weights, strict=True):
        assert got.shape == (1, rows, weight.n)
        assert torch.equal(got, packed_linear(x, weight))
        for i in range(rows):
            assert torch.equal(got[:, i : i + 1], packed_linear(x[:, i : i + 1], weight))


def test_argmax_names_the_first_largest_logit(isa, threads):
    torch.manual_seed(0)
    weight = pack(torch.randn(333, 40), torch.randn(333))
    x = torch.randn(2, 9, 40)
    logits = packed_linear(x, weight)
    index, value = packed_argmax(x, weight)
    assert torch.equal(index, logits.argmax(-1))
    assert torch.equal(value, logits.amax(-1))
    ties = pack(torch.ones(100, 40))
    assert packed_argmax(x, ties)[0].eq(0).all()
    x[1, 3] = float("nan")
    assert packed_argmax(x, weight)[0][1, 3] == 0


def test_strided_rows_are_read_in_place_and_no_rows_give_no_rows(isa):
    weight = pack(torch.randn(48, 24))
    wide = torch.randn(6, 100)
    assert torch.equal(
        packed_linear(wide[:, 7:31], weight), packed_linear(wide[:, 7:31].clone(), weight)
    )
    assert torch.equal(
        packed_linear(wide[:4, :24].T.contiguous().T, weight),
        packed_linear(wide[:4, :24].clone(), weight),
    )
    assert packed_linear(wide[:0, :24], weight).shape == (0, 48)
    assert packed_argmax(wide[:0, :24], weight)[0].shape == (0,)
