"""The chunked form equals the whole one, keeps pairs across chunks, and holds little memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retort.distill.losses import (
    IGNORED,
    AcceptanceMetric,
    BandNetwork,
    DacTerm,
    DivergenceTerm,
    SftTerm,
    SpanTerm,
    chunked_loss,
    divergence,
)
from retort.distill.signals import HeadSignal
from retort.errors import ConfigurationError
from tests.distill import naive


class Wrapped(nn.Linear):
    """Not a plain linear layer to `fused.fits`, so that torch's checkpoint recomputes."""


class Setup:
    """Hidden states and heads of a student (V = 29) and a teacher (V = 31), 13 rows."""

    def __init__(self, dtype, rows=13, plain=True):
        generator = torch.manual_seed(0)
        self.hidden = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
        self.head = (nn.Linear if plain else Wrapped)(6, 29, bias=plain, dtype=dtype)
        self.teacher = HeadSignal(
            2 * torch.randn(rows, 10, dtype=dtype), nn.Linear(10, 31, dtype=dtype)
        )
        self.targets = torch.randint(0, 29, (rows,), generator=generator)
        self.targets[torch.rand(rows) < 0.2] = IGNORED
        self.pairs = torch.rand(rows) < 0.7
        self.network = BandNetwork().to(dtype)
        nn.init.normal_(self.network.outer.weight, std=0.5)
        self.parameters = [self.hidden, *self.head.parameters(), *self.network.parameters()]

    def terms(self):
        kd = DivergenceTerm(divergence("jsd", beta=0.4))
        return [SftTerm(), kd, DacTerm(network=self.network), SpanTerm(), AcceptanceMetric()]

    def run(self, chunk_size, top_k=None):
        rows = len(self.targets)
        signal = self.teacher if top_k is None else self.teacher.rows(0, rows).top_k(top_k)
        sums = chunked_loss(
            self.hidden, self.head, self.targets, self.terms(),
            signal=signal, pairs=self.pairs, temperature=1.3, chunk_size=chunk_size,
        )  # fmt: skip
        loss = sum(weight * term.mean() for weight, term in enumerate(sums.values(), 1))
        return sums, torch.autograd.grad(loss, self.parameters)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 100])
@pytest.mark.parametrize("plain", [True, False])
def test_value_count_statistics_and_gradient_equal_the_whole(
    dtype, tolerance, top_k, chunk_size, plain
):
    setup = Setup(dtype, plain=plain)
    (whole, whole_grads), (parts, part_grads) = (setup.run(s, top_k) for s in (None, chunk_size))
    assert list(whole) == ["sft", "kd", "dac", "span", "acceptance"]
    for name, term in whole.items():
        same = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(parts[name].total, term.total, **same)
        torch.testing.assert_close(parts[name].stats, term.stats, rtol=1e-5, atol=1e-5)
        assert parts[name].count == term.count
    torch.testing.assert_close(part_grads, whole_grads, rtol=10 * tolerance, atol=tolerance)


def test_every_term_reaches_the_reference_through_the_heads():
    setup = Setup(torch.float64)
    sums, _ = setup.run(chunk_size=4)
    logits = setup.head(setup.hidden)
    signal = {"logits": setup.teacher.head(setup.teacher.hidden).detach()}
    torch.testing.assert_close(sums["sft"].total, naive.sft_sum(logits, setup.targets))
    jsd = naive.divergence_sum("jsd", signal, logits, setup.targets, 29, 1.3, beta=0.4)
    torch.testing.assert_close(sums["kd"].total, jsd)
    spans = naive.span_sum(signal, logits, setup.pairs, 29, "l2", 1.3)
    torch.testing.assert_close(sums["span"].total, spans)


def test_heads_never_see_more_than_a_chunk_and_one_row():
    setup, seen = Setup(torch.float32), []
    for head in (setup.head, setup.teacher.head):
        head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    setup.run(chunk_size=4)
    assert max(seen) == 5


def test_no_logits_are_kept_for_the_backward_pass():
    setup, kept = Setup(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    ):
        sums = chunked_loss(
            setup.hidden, setup.head, setup.targets, setup.terms(),
            signal=setup.teacher, pairs=setup.pairs, chunk_size=4,
        )  # fmt: skip
    assert sums["dac"].total.requires_grad
    assert sum(kept) <= 2 * setup.hidden.numel()


def test_no_rows_give_zero_sums_that_still_reach_the_parameters():
    setup = Setup(torch.float32, rows=0)
    sums, gradients = setup.run(chunk_size=4)
    assert all(term.total == 0 and term.count == 0 for term in sums.values())
    assert not any(gradient.any() for gradient in gradients)


def test_without_gradient_values_are_the_same():
    setup = Setup(torch.float64)
    with torch.no_grad():
        quiet = chunked_loss(setup.hidden, setup.head, setup.targets, [SftTerm()], chunk_size=4)
    torch.testing.assert_close(quiet["sft"].total, naive.sft_sum(
        setup.head(setup.hidden).detach(), setup.targets))  # fmt: skip


@pytest.mark.parametrize("frozen", ["hidden", "weight", "network"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    setup = Setup(torch.float64)
    _, whole = setup.run(None)
    kept = [setup.hidden, setup.head.weight, *setup.network.parameters()]
    off = {"hidden": [setup.hidden], "weight": [setup.head.weight]}.get(frozen, kept[2:])
    for parameter in off:
        parameter.requires_grad_(False)
    wanted = [i for i, p in enumerate(setup.parameters) if p.requires_grad]
    setup.parameters = [setup.parameters[i] for i in wanted]
    _, parts = setup.run(5)
    torch.testing.assert_close(parts, tuple(whole[i] for i in wanted))


def test_one_terms_gradient_is_its_own():
    setup = Setup(torch.float64)
    for name in ("sft", "kd", "dac", "span"):
        ends = []
        for size in (None, 5):
            sums = chunked_loss(
                setup.hidden, setup.head, setup.targets, setup.terms(),
                signal=setup.teacher, pairs=setup.pairs, chunk_size=size,
            )  # fmt: skip
            ends.append(torch.autograd.grad(2 * sums[name].total, [setup.hidden, setup.head.bias]))
        torch.testing.assert_close(ends[1], ends[0])


def test_autocast_holds_in_the_backward_pass_too():
    setup, ends = Setup(torch.float32), []
    for size in (None, 5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = chunked_loss(
                setup.hidden, setup.head, setup.targets, [SftTerm()], chunk_size=size
            )
        ends.append(torch.autograd.grad(sums["sft"].total, [setup.hidden, setup.head.weight]))
        assert all(g.dtype == torch.float32 for g in ends[-1])
    torch.testing.assert_close(ends[1], ends[0], rtol=2e-2, atol=2e-2)


def test_the_heads_gradient_has_one_buffer():
    """However many chunks there are, no second tensor of the weight's size is made."""
    setup = Setup(torch.float32, rows=40)
    size, made = setup.head.weight.shape, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape in (size, size[::-1]):
                made.append((out.untyped_storage().data_ptr(), func))
            return out

    sums = chunked_loss(
        setup.hidden, setup.head, setup.targets, setup.terms(),
        signal=setup.teacher, pairs=setup.pairs, chunk_size=3,
    )  # fmt: skip
    with Watch():
        sums["kd"].total.backward()
    own = {place for place, _ in made} - {setup.head.weight.untyped_storage().data_ptr()}
    assert own == {setup.head.weight.grad.untyped_storage().data_ptr()}


def test_bad_input_is_named():
    setup = Setup(torch.float32)
    signal = HeadSignal(setup.teacher.hidden[:4], setup.teacher.head)
    with pytest.raises(ConfigurationError, match="the signal"):
        chunked_loss(setup.hidden, setup.head, setup.targets, setup.terms(), signal=signal)
    with pytest.raises(ConfigurationError, match="teacher signal"):
        chunked_loss(setup.hidden, setup.head, setup.targets, [DacTerm(network=setup.network)])
