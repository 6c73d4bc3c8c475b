"""Packing, its inverse, storage types, bad input, the twin, and the compiled op."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops import linear, native
from retort.ops.linear import packed_argmax, packed_linear
from retort.ops.panels import gated, pack, unpack


@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 80])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_unpack_is_the_inverse_of_pack(n, precision):
    weight = torch.randn(n, 7).bfloat16().float()
    assert torch.equal(unpack(pack(weight, precision=precision)), weight)


def test_auto_stores_bf16_only_where_it_is_exact():
    exact = torch.randn(8, 8).bfloat16()
    assert pack(exact.float()).data.dtype == torch.bfloat16
    assert pack(exact).data.dtype == torch.bfloat16
    inexact = exact.float()
    inexact[3, 3] = 1 + 2**-20
    assert pack(inexact).data.dtype == torch.float32
    assert torch.equal(unpack(pack(inexact)), inexact)


def test_bf16_storage_gives_the_bits_of_fp32_storage():
    weight, x = torch.randn(40, 100).bfloat16().float(), torch.randn(3, 100)
    narrow, wide = pack(weight), pack(weight, precision="float32")
    assert torch.equal(packed_linear(x, narrow), packed_linear(x, wide))


def test_half_inputs_are_computed_in_float32_and_rounded_once():
    weight, x = pack(torch.randn(40, 100)), torch.randn(3, 100).bfloat16()
    got = packed_linear(x, weight)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, packed_linear(x.float(), weight).bfloat16())


def test_the_twin_does_the_same_without_the_native_core(monkeypatch):
    plain = pack(torch.randn(40, 100), torch.randn(40))
    pair = gated(plain, pack(torch.randn(40, 100)))
    x, residual = torch.randn(3, 100), torch.randn(3, 40)
    with_core = [
        packed_linear(x, plain, residual), packed_linear(x, pair), *packed_argmax(x, plain)
    ]  # fmt: skip
    monkeypatch.setattr(native, "available", lambda: False)
    without = [
        packed_linear(x, plain, residual), packed_linear(x, pair), *packed_argmax(x, plain)
    ]  # fmt: skip
    for a, b in zip(with_core, without, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_custom_op_passes_torchs_own_checks_and_compiles():
    weight, x = pack(torch.randn(40, 20), torch.randn(40)), torch.randn(2, 3, 20)
    for up in ((None, None), (weight.data, weight.bias)):
        arguments = (x, weight.data, weight.bias, weight.n, *up, None)
        torch.library.opcheck(linear._packed_linear_op, arguments)
    for layer in (weight, gated(weight, weight)):
        compiled = torch.compile(lambda t, w=layer: packed_linear(t, w) + 1, backend="eager")
        assert torch.equal(compiled(x), packed_linear(x, layer) + 1)


def test_bad_weights_are_refused():
    good = torch.randn(4, 3)
    for bad in (
        lambda: pack(torch.randn(4)),
        lambda: pack(good.long()),
        lambda: pack(good.double()),
        lambda: pack(good.to("meta")),
        lambda: pack(good, torch.randn(3)),
        lambda: gated(pack(good), pack(torch.randn(4, 4))),
        lambda: gated(gated(pack(good), pack(good)), pack(good)),
        lambda: pack(good, precision="int8"),
    ):
        with pytest.raises(ConfigurationError):
            bad()


def test_bad_inputs_are_refused():
    weight = pack(torch.randn(4, 3))
    pair = gated(weight, weight)
    x = torch.randn(2, 3)
    for bad in (
        lambda: packed_linear(torch.randn(2, 4), weight),
        lambda: packed_linear(torch.tensor(1.0), weight),
        lambda: packed_linear(x.long(), weight),
        lambda: packed_linear(x.double(), weight),
        lambda: packed_linear(x.to("meta"), weight),
        lambda: packed_linear(x, weight, torch.randn(2, 3)),
        lambda: packed_linear(x, weight, torch.randn(2, 4).double()),
        lambda: packed_linear(x, pair, torch.randn(2, 4)),
        lambda: packed_argmax(x, pair),
    ):
        with pytest.raises(ConfigurationError):
            bad()


def test_a_residual_is_added_whether_its_rows_are_dense_or_not():
    weight, x = pack(torch.randn(20, 30), torch.randn(20)), torch.randn(2, 7, 30)
    residual = torch.randn(7, 2, 20)
    want = packed_linear(x, weight) + residual.transpose(0, 1)
    for given in (residual.transpose(0, 1), residual.transpose(0, 1).contiguous()):
        assert torch.equal(packed_linear(x, weight, given), want)


def test_the_result_is_the_linear_layer():
    layer, x = torch.nn.Linear(30, 20), torch.randn(7, 30)
    got = packed_linear(x, pack(layer.weight, layer.bias))
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias).detach())
