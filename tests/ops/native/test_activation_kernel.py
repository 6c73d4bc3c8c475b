"""SiLU, softplus and pairwise rotary against float64 at odd widths, and their bits anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retort.errors import ConfigurationError
from retort.ops.native.activation import ACTIVATIONS, activation, rotate_pairs

WANTED = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "cos": torch.cos,
    "sin": torch.sin,
    "softplus": lambda x: F.softplus(x, threshold=1000),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_equal_their_definition_wherever_an_element_stands(isa, name):
    torch.manual_seed(0)
    x = torch.cat((10 * torch.randn(500), torch.tensor([0.0, -0.0, 90.0, -90.0, 1e-30, 1e5])))
    got, want = activation(name, x), WANTED[name](x.double())
    assert ((got - want).abs() <= 4e-7 * (0.5 + want.abs())).all()
    for size in (1, 7, 33):
        assert torch.equal(torch.cat([activation(name, part) for part in x.split(size)]), got)
    assert activation(name, torch.tensor([torch.nan])).isnan().all()
    assert activation(name, x[:0]).shape == (0,) and activation(name, x[3]) == got[3]


@pytest.mark.parametrize("n", [1, 7, 64, 129, 9001])
def test_rows_of_any_width_and_stride_times_another(isa, n):
    torch.manual_seed(n)
    x = torch.cat([torch.randn(4, n) * s for s in (0.01, 1, 8, 60)]).view(2, 8, n)
    other, wide = torch.randn_like(x), x.double()
    torch.testing.assert_close(activation("silu", x).double(), F.silu(wide), atol=1e-7, rtol=4e-7)
    want = F.softplus(wide, threshold=1000)
    got = activation("softplus", x)
    torch.testing.assert_close(got.double(), want, atol=1e-37, rtol=4e-7)
    assert torch.equal(activation("silu", x, other), activation("silu", x) * other)
    assert torch.equal(activation("silu", x)[1, 3:4], activation("silu", x[1, 3:4]))
    strided = torch.randn(5, 2 * n + 3)[:, 1 : n + 1]
    assert torch.equal(activation("tanh", strided), activation("tanh", strided.clone()))
    assert torch.equal(activation("tanh", strided.T), activation("tanh", strided).T)


def test_extremes_and_nothing(isa):
    x = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    want = torch.tensor([[0.0, 0.0, 0.0, 0.6931472, 88.0, 200.0, 1e30]])
    torch.testing.assert_close(activation("softplus", x), want, atol=1e-30, rtol=1e-6)
    assert activation("silu", x).isfinite().all()
    assert activation("silu", torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("width", [2, 10, 64, 100])
def test_pairs_are_turned(isa, width):
    torch.manual_seed(width)
    x = torch.randn(3, 11, width).transpose(0, 1)
    angle = torch.randn(11, width // 2)
    a, b = x.double()[..., ::2], x.double()[..., 1::2]
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    want = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    got = rotate_pairs(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(got[4:5], rotate_pairs(x[4:5], angle.cos()[4:5], angle.sin()[4:5]))


def test_bad_input_is_refused():
    x, angle = torch.randn(2, 3, 4), torch.randn(2, 2)
    for bad in (
        lambda: activation("relu", x),
        lambda: activation("silu", x.double()),
        lambda: activation("silu", x.to("meta")),
        lambda: activation("silu", x, x[:1]),
        lambda: activation("softplus", x.half()),
        lambda: rotate_pairs(x[..., :3], angle, angle),
        lambda: rotate_pairs(x, angle[:1], angle),
        lambda: rotate_pairs(x, angle, angle.double()),
        lambda: rotate_pairs(x.transpose(1, 2), angle, angle),
    ):
        with pytest.raises(ConfigurationError):
            bad()
