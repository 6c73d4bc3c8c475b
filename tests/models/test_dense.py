"""The dense connection by itself: gate, fusion, window."""

import torch

from retort.models.dense import FeatureWindow, HiddenFusion, RMSNorm
from retort.ops import reference


def test_fusion_equals_the_formula_and_so_does_its_gradient():
    torch.manual_seed(0)
    fusion = HiddenFusion(6, 4, 3).double()
    x, *features = (
        torch.randn(5, d, dtype=torch.float64, requires_grad=True) for d in (6, 4, 4, 4)
    )
    weights = list(fusion.parameters())
    got = fusion(x, features[0], features[1:])
    want = reference.hidden_fusion(x, features[0], features[1:], *weights)
    torch.testing.assert_close(got, want, atol=1e-14, rtol=0)
    inputs = [x, *features, *weights]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-13, rtol=0)


def test_a_zero_gate_leaves_the_feature_alone():
    fusion = HiddenFusion(6, 4, 3)
    torch.nn.init.zeros_(fusion.fc2.weight)
    own = torch.randn(5, 4)
    assert torch.equal(fusion(torch.randn(5, 6), own, [torch.randn(5, 4)]), own)


def test_without_a_gate_features_add_up_and_there_is_no_weight():
    fusion = HiddenFusion(6, 4, None)
    own, *earlier = torch.randn(3, 5, 4)
    assert torch.equal(fusion(torch.randn(5, 6), own, earlier), own + (earlier[0] + earlier[1]))
    assert not list(fusion.parameters())


def test_window_holds_the_last_layers_kind_after_kind():
    window = FeatureWindow(2)
    assert window.flat() == []
    for layer in range(4):
        window.push(torch.tensor(layer), torch.tensor(10 + layer))
    assert [int(t) for t in window.flat()] == [2, 3, 12, 13]
    empty = FeatureWindow(0)
    empty.push(torch.tensor(1))
    assert empty.flat() == []


def test_norm_is_float64_clean():
    norm = RMSNorm(8, 1e-6).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), want, atol=1e-15, rtol=0)
    assert RMSNorm(8, 1e-6).half()(x.half()).dtype == torch.float16
