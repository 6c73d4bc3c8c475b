"""Retention: every form equals the naive sum, values and gradients, wherever padding stands."""

import pytest
import torch

from retort.ops import reference
from retort.ops.clock import Clock
from retort.ops.retention import (
    chunkwise_retention,
    log_decay,
    normaliser,
    parallel_retention,
    recurrent_retention,
    rotary_phase,
    rotate,
)

B, T, H, DK, DV = 3, 37, 4, 6, 10

FORMS = {
    "parallel": parallel_retention,
    "recurrent": recurrent_retention,
    **{f"chunks of {n}": lambda *a, n=n: chunkwise_retention(*a, chunk_size=n) for n in (1, 7, 64)},
}


def tensors(dtype=torch.float64, heads=H):
    generator = torch.Generator().manual_seed(0)
    sizes = (DK, DK, DV)
    return [torch.randn(B, T, heads, d, generator=generator, dtype=dtype) for d in sizes]


def clocks():
    """No padding; padding left, right and in holes; packed sequences; both together."""
    real = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    real[0, :9] = False
    real[1, 25:] = False
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 0] = starts[1, 5] = starts[1, 20] = starts[2, 11] = True
    cases = [(None, None), (real, None), (None, starts), (real, starts)]
    return [Clock.of(mask, first, (B, T)) for mask, first in cases]


def naive(q, k, v, clock, gamma):
    out = torch.zeros_like(v)
    for b in range(B):
        for number in clock.sequence[b].unique():
            mine = ((clock.sequence[b] == number) & clock.real[b]).nonzero()[:, 0]
            if len(mine):
                out[b, mine] = reference.retention_sum(q[b, mine], k[b, mine], v[b, mine], gamma)
    return out


def outputs(form, q, k, v, clock):
    decay = log_decay(q.shape[2], q.dtype)
    o = form(q, k, v, decay, clock) / normaliser(clock.seen, decay).unsqueeze(-1)
    return o * clock.real[..., None, None]


@pytest.mark.parametrize("case", range(4))
def test_every_form_equals_the_naive_sum(case):
    q, k, v = tensors()
    clock = clocks()[case]
    want = naive(q, k, v, clock, log_decay(H, q.dtype).exp().tolist())
    for name, form in FORMS.items():
        torch.testing.assert_close(
            outputs(form, q, k, v, clock),
            want,
            atol=1e-12,
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("case", range(4))
def test_gradients_of_every_form_agree(case):
    weight = torch.randn(B, T, H, DV, dtype=torch.float64)
    grads = []
    for form in FORMS.values():
        qkv = [x.requires_grad_() for x in tensors()]
        (outputs(form, *qkv, clocks()[case]) * weight).sum().backward()
        grads.append(torch.cat([x.grad.flatten() for x in qkv]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-11, rtol=0)


def test_float32_is_close_to_float64():
    q, k, v = tensors()
    for clock in clocks():
        want = outputs(parallel_retention, q, k, v, clock)
        for form in FORMS.values():
            got = outputs(form, q.float(), k.float(), v.float(), clock)
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_recurrence_equals_the_state_of_the_sum():
    q, k, v = (x[0] for x in tensors())
    gamma = log_decay(H, q.dtype).exp().tolist()
    state = reference.retention_state(k, v, gamma)
    norm = normaliser(torch.tensor([T]), log_decay(H, q.dtype))[0]
    last = torch.einsum("hk,hkv->hv", q[-1], state) / norm[:, None]
    torch.testing.assert_close(last, reference.retention_sum(q, k, v, gamma)[-1])


def test_normaliser_does_not_cancel_in_float32_with_16_heads():
    n = torch.tensor([1, 2, 3, 100, 10_000])
    want = normaliser(n, log_decay(16, torch.float64))
    got = normaliser(n, log_decay(16, torch.float32))
    torch.testing.assert_close(got.double(), want, atol=0, rtol=1e-5)
    gamma = 1 - 2.0**-20
    sums = torch.tensor([sum(gamma**i for i in range(m)) for m in n.tolist()]).double().sqrt()
    torch.testing.assert_close(want[:, -1], sums)


def test_long_chunks_stay_finite_in_float32():
    """γ₀^(c_i − c_j) above the diagonal overflows from 2,794 tokens on unless masked before exp."""
    q, k, v = (torch.randn(1, 3000, 1, d, requires_grad=True) for d in (2, 2, 2))
    clock = Clock.of(None, None, (1, 3000))
    y = chunkwise_retention(q, k, v, log_decay(1, torch.float32), clock, chunk_size=3000)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()


def test_rotary_turns_interleaved_pairs():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 7, 9]])
    got = rotate(x, rotary_phase(positions, 8, torch.float64))
    for i in range(4):
        angle = positions.double()[..., None] * 10000 ** (-i / 3)
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        torch.testing.assert_close(got[..., 2 * i], even * angle.cos() - odd * angle.sin())
        torch.testing.assert_close(got[..., 2 * i + 1], odd * angle.cos() + even * angle.sin())


def test_chunks_run_no_loop_over_tokens():
    """The number of operations depends on the number of chunks, not on the tokens inside them."""

    def operations(length, size):
        q, k, v = (torch.randn(1, length, 2, 4) for _ in range(3))
        decay, clock = log_decay(2, torch.float32), Clock.of(None, None, (1, length))
        with torch.profiler.profile() as profile:
            chunkwise_retention(q, k, v, decay, clock, chunk_size=size)
        return sum(event.count for event in profile.key_averages())

    assert operations(64, 16) == operations(512, 128)


def test_clock_counts_real_tokens_of_each_sequence():
    real = torch.tensor([[0, 1, 1, 0, 1, 1]]).bool()
    clock = Clock.of(real, torch.tensor([[1, 1, 0, 0, 1, 0]]).bool(), (1, 6))
    assert clock.seen.tolist() == [[0, 1, 2, 2, 1, 2]]
    assert clock.positions[real].tolist() == [0, 1, 0, 1]
    assert Clock.of(torch.ones(2, 3).bool(), None, (2, 3)).uniform
