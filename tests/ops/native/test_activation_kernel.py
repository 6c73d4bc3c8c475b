"""SiLU, softplus and pairwise rotary against float64 at odd widths, and their bits anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retort.errors import ConfigurationError
from retort.ops.native.activation import rotate_pairs, silu, softplus


@pytest.mark.parametrize("n", [1, 7, 64, 129])
def test_activations_equal_their_definitions(isa, n):
    torch.manual_seed(n)
    x = torch.cat([torch.randn(40, n) * s for s in (0.01, 1, 8, 60)]).view(2, 80, n)
    wide, other = x.double(), torch.randn_like(x)
    torch.testing.assert_close(silu(x).double(), F.silu(wide), atol=1e-7, rtol=4e-7)
    want = F.softplus(wide, threshold=1000)
    torch.testing.assert_close(softplus(x).double(), want, atol=1e-37, rtol=4e-7)
    assert torch.equal(silu(x, other), silu(x) * other)
    assert torch.equal(silu(x)[1, 3:4], silu(x[1, 3:4]))
    strided = torch.randn(5, 2 * n + 3)[:, 1 : n + 1]
    assert torch.equal(softplus(strided), softplus(strided.clone()))


def test_extremes_and_nothing(isa):
    x = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    want = torch.tensor([[0.0, 0.0, 0.0, 0.6931472, 88.0, 200.0, 1e30]])
    torch.testing.assert_close(softplus(x), want, atol=1e-30, rtol=1e-6)
    assert silu(x).isfinite().all() and silu(torch.empty(0, 3)).shape == (0, 3)
    assert silu(torch.tensor([[float("nan")]])).isnan().all()


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
        lambda: silu(x.double()),
        lambda: silu(x.to("meta")),
        lambda: silu(x, x[:1]),
        lambda: softplus(x.half()),
        lambda: rotate_pairs(x[..., :3], angle, angle),
        lambda: rotate_pairs(x, angle[:1], angle),
        lambda: rotate_pairs(x, angle, angle.double()),
        lambda: rotate_pairs(x.transpose(1, 2), angle, angle),
    ):
        with pytest.raises(ConfigurationError):
            bad()
