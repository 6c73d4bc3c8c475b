"""RMSNorm and rotary against float64 at odd widths, and their bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops.native.activation import activation
from retort.ops.native.elementwise import Norm, rms_norm, rotary
from retort.ops.native.invariant import row_invariant

WIDTHS = [1, 7, 64, 129, 576]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm_equals_its_definition(isa, n, offset):
    torch.manual_seed(n)
    norm = Norm(torch.randn(n), 1e-5, offset)
    x = 3 * torch.randn(2, 40, n)
    wide = x.double()
    want = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (offset + norm.weight)
    got = rms_norm(x, norm)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)
    assert torch.equal(got[1, 3:4], rms_norm(x[1, 3:4], norm))
    strided = torch.randn(5, 2 * n + 3)[:, 1 : n + 1]
    assert torch.equal(rms_norm(strided, norm), rms_norm(strided.clone(), norm))


@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (80, 32), (6, 2), (128, 100)])
def test_rotary_equals_rotate_half(isa, width, rotated):
    torch.manual_seed(width)
    x = torch.randn(3, 11, width).transpose(0, 1)
    cos, sin = torch.randn(2, 11, rotated)
    head, rest = x.double().split((rotated, width - rotated), dim=-1)
    a, b = head.chunk(2, dim=-1)
    turned = head * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    got = rotary(x, cos, sin)
    torch.testing.assert_close(got.double(), torch.cat((turned, rest), -1), atol=1e-6, rtol=1e-6)
    assert torch.equal(got[4:5], rotary(x[4:5], cos[4:5], sin[4:5]))


def test_inside_the_mode_torchs_functions_are_the_cores_and_only_there():
    x = torch.randn(2, 3, 37)
    calls = {
        "tanh": (torch.tanh, torch.Tensor.tanh),
        "silu": (F.silu, torch.nn.SiLU()),
        "gelu": (F.gelu, torch.nn.GELU()),
        "gelu_tanh": (torch.nn.GELU(approximate="tanh"),),
        "cos": (torch.cos, torch.Tensor.cos),
        "sin": (torch.sin, torch.Tensor.sin),
        "sigmoid": (torch.sigmoid, torch.Tensor.sigmoid),
    }
    with torch.no_grad(), row_invariant():
        for name, functions in calls.items():
            for function in functions:
                assert torch.equal(function(x), activation(name, x))
                assert function(x.transpose(0, 2)).shape == (37, 3, 2)
        a, b = torch.randn(1, 7, 1), torch.randn(1, 1, 5)
        assert torch.equal(a @ b, a * b)
        assert torch.tanh(x.double()).dtype == torch.float64
        assert torch.equal(F.silu(kept := x.clone(), inplace=True), kept)
    with row_invariant():
        wanted = x.clone().requires_grad_()
        torch.tanh(wanted).sum().backward()
        assert wanted.grad is not None


def test_bad_input_is_refused():
    norm, x, angles = Norm(torch.ones(4), 1e-5), torch.randn(2, 3, 4), torch.randn(2, 4)
    for bad in (
        lambda: rms_norm(x.double(), norm),
        lambda: rms_norm(x[..., :3], norm),
        lambda: rms_norm(x.to("meta"), norm),
        lambda: rms_norm(x, Norm(torch.ones(4).double(), 1e-5)),
        lambda: rms_norm(x, Norm(torch.ones(8)[::2], 1e-5)),
        lambda: rotary(x[0], angles, angles),
        lambda: rotary(x, angles[:1], angles),
        lambda: rotary(x, angles[:, :3], angles[:, :3]),
        lambda: rotary(x, torch.randn(2, 6), torch.randn(2, 6)),
        lambda: rotary(x, angles.double(), angles.double()),
    ):
        with pytest.raises(ConfigurationError):
            bad()
