"""Every kernel is a `torch.library` op: torch's own checks pass, `torch.compile` traces it."""

from __future__ import annotations

import pytest
import torch

from retort.ops import linear, native
from retort.ops.linear import packed_argmax
from retort.ops.native import activation as activations
from retort.ops.native import attention, elementwise
from retort.ops.native.activation import activation
from retort.ops.native.attention import RaggedLayout, RowBuffers, ragged_attention
from retort.ops.native.elementwise import Norm, rms_norm, rotary
from retort.ops.panels import pack

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

X, ANGLES = torch.randn(5, 4, 12), torch.randn(5, 8)
NORM, WEIGHT = Norm(torch.randn(12), 1e-5, 1.0), pack(torch.randn(40, 12), torch.randn(40))
STARTS, COUNTS, CAPACITIES = [3, 0], [2, 3], [9, 4]


def buffers():
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(2, c, 12, generator=generator) for c in CAPACITIES] for _ in ("keys", "values")
    ]


def arguments():
    new = X[:, :2].contiguous(), X[:, 2:].contiguous()
    return (X, *new, STARTS, COUNTS, *buffers(), 0.3, 4, 5.0, torch.randn(4))


CASES = {
    "norm": (elementwise._rms_norm_op, (X, NORM.weight, 1e-5, 1.0)),
    "rotary": (elementwise._rotary_op, (X, ANGLES, ANGLES)),
    "activation": (activations._activation_op, ("gelu", X, X)),
    "argmax": (linear._packed_argmax_op, (X, WEIGHT.data, WEIGHT.bias, 40)),
    "attention": (attention._ragged_attention_op, arguments()),
}


@pytest.mark.parametrize("name", CASES)
def test_an_op_passes_torchs_own_checks(name):
    op, given = CASES[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, given, test_utils=tests)


def functions():
    return {
        "norm": lambda x: rms_norm(x, NORM) + 1,
        "rotary": lambda x: rotary(x, ANGLES, ANGLES) + 1,
        "activation": lambda x: activation("silu", x) + 1,
        "argmax": lambda x: packed_argmax(x, WEIGHT)[0] + 1,
    }


@pytest.mark.parametrize("name", functions())
def test_compiled_code_holds_the_op_and_gives_its_bits(name):
    function, seen = functions()[name], []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    assert torch.equal(torch.compile(function, backend=backend, fullgraph=True)(X), function(X))
    assert any("retort" in target for target in seen), seen


def test_attention_compiles_and_appends_to_the_buffers():
    ours, theirs = buffers(), buffers()
    layout = RaggedLayout(STARTS, COUNTS, CAPACITIES)
    places = [RowBuffers(*b) for b in (ours, theirs)]

    def attend(x, place):
        return ragged_attention(x, x[:, :2], x[:, 2:], layout, place, scaling=0.3) + 1

    compiled = torch.compile(attend, backend="eager")
    assert torch.equal(compiled(X, places[0]), attend(X, places[1]))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert torch.equal(a, b)
