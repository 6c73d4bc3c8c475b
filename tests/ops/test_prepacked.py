"""Linear layers on weights that oneDNN packed once, against F.linear."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from retort.errors import ConfigurationError
from retort.ops import prepacked
from retort.ops.prepacked import PrepackedLinear, prepack_linears
from tests.ops.test_packing import IDS, tiny

pytestmark = pytest.mark.skipif(not prepacked.available(), reason="no oneDNN")

SIZES = [(1, 1), (1, 7), (7, 1), (5, 3), (33, 17), (97, 31), (130, 257), (577, 1537)]


def linear(n, k, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
@torch.no_grad()
def test_equals_f_linear_at_odd_sizes(n, k, bias):
    source = linear(n, k, bias)
    layer = PrepackedLinear(source)
    assert (layer.out_features, layer.in_features) == (n, k)
    for rows in (1, 2, 3, 8, 13, 65):
        x = torch.randn(rows, k)
        want = F.linear(x, source.weight, source.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(17,), (0, 17), (2, 3, 17), (1, 1, 17)])
@torch.no_grad()
def test_takes_the_shapes_that_a_linear_layer_takes(shape):
    source = linear(33, 17)
    x = torch.randn(shape)
    torch.testing.assert_close(PrepackedLinear(source)(x), source(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_takes_inputs_with_gaps_between_their_elements():
    source = linear(33, 17)
    for x in (torch.randn(17, 5).t(), torch.randn(4, 34)[:, ::2], torch.randn(9, 17)[::3]):
        torch.testing.assert_close(PrepackedLinear(source)(x), source(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_conv1d_is_the_transposed_layer():
    torch.manual_seed(0)
    source = Conv1D(7, 13)
    layer, x = PrepackedLinear(source), torch.randn(3, 13)
    torch.testing.assert_close(layer(x), source(x), atol=1e-5, rtol=0)
    assert torch.equal(layer.unpacked(), source.weight)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_unpacking_gives_the_very_weight(n, k):
    source = linear(n, k)
    assert torch.equal(PrepackedLinear(source).unpacked(), source.weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_logits_stay_and_restore_puts_everything_back(kind):
    model = tiny(kind)
    before, tree, names = model(IDS).logits, dict(model.named_modules()), list(model.state_dict())
    handle = prepack_linears(model)
    assert len(handle.packed) == (15 if kind == "llama" else 9)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    handle.restore()
    assert dict(model.named_modules()) == tree
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_release_keeps_one_copy_and_restore_unpacks_the_same_bits(tied):
    model = tiny(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = model(IDS).logits
    handle = prepack_linears(model, release=True)
    assert model.lm_head.weight.is_meta is not tied
    assert all(m.weight.is_meta for n, m in handle.packed.items() if n != "lm_head")
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-5)
    handle.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model(IDS).logits, want)


@torch.no_grad()
def test_refresh_follows_a_weight_update():
    model = tiny()
    handle = prepack_linears(model)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    handle.refresh()
    got = model(IDS).logits
    handle.restore()
    torch.testing.assert_close(got, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_original_weight_and_not_through_a_released_one():
    source = linear(5, 3)
    layer, x = PrepackedLinear(source), torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(source.weight.grad, x.detach().sum(0).expand(5, 3))
    layer.release()
    with pytest.raises(ConfigurationError, match="released"):
        layer(x)


def test_a_copy_is_a_plain_layer_with_its_weight():
    source = linear(5, 3)
    weight = source.weight.detach().clone()
    layer = PrepackedLinear(source)
    layer.release()
    copied = deepcopy(layer)
    assert type(copied) is nn.Linear and torch.equal(copied.weight, weight)


@torch.no_grad()
def test_what_onednn_refuses_stays_and_is_named(monkeypatch):
    def refuse(weight):
        raise RuntimeError("no kernel\nfor it")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    monkeypatch.setattr(prepacked, "_reorder", refuse)
    handle = prepack_linears(model)
    assert handle.packed == {}
    assert handle.skipped["0"] == "oneDNN refuses it: no kernel"
    assert "float32" in handle.skipped["1"]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_pytorch_without_the_operators_or_with_wrong_ones_is_found(monkeypatch, fault):
    def product(x, packed, bias):
        if fault == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(3, 35)

    prepacked._works.cache_clear()
    monkeypatch.setattr(prepacked, "_multiply", product)
    assert not prepacked.available()
    prepacked._works.cache_clear()


def test_onednn_that_is_switched_off_is_not_used():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not prepacked.available()
    assert prepacked.available()
