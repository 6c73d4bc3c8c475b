"""Every form of both models against the naive recurrence: value and gradient, whatever the rows.

One batch holds an odd length, left and right padding, holes, and packed sequences. float64 to
1e-10; float32 to 2e-4 where logits (gradients) are scaled to 5.
"""

import copy

import pytest
import torch

from tests.models import mambas, retnets
from tests.ops.test_selective_scan import operations

WHOLE = 4096
SIZES = (1, 7, 64, WHOLE)
RETNET_FORMS = [("parallel", 64), ("recurrent", 64), *(("chunkwise", n) for n in SIZES)]
MAMBA_FORMS = [(form, n) for form in ("chunked", "rescan", "recurrent") for n in SIZES]
RETNETS = {
    "RetNet": {"dense_block_layers": 0},
    "RetNet with norms": {"dense_block_layers": 0, "dense_norms": True},
    "DenseRetNet m=1": {"dense_block_layers": 1},
    "DenseRetNet m=2": {"intermediate_k_select_scale": 8, "intermediate_v_select_scale": 2},
    "DenseRetNet m=4": {"dense_block_layers": 4, "num_hidden_layers": 6},
    "DenseRetNet without gate": {"dense_gate": False},
}
MAMBAS = {
    "Mamba": {"dense_block_layers": 0},
    "DenseMamba m=1": {"dense_block_layers": 1},
    "DenseMamba m=2": {},
    "DenseMamba m=4": {"dense_block_layers": 4, "num_hidden_layers": 6},
    "DenseMamba without gate": {"dense_gate": False},
}
QUICK = [(name, 23) for name in ("DenseRetNet m=2", "DenseMamba m=2")]
CASES = [
    *QUICK,
    *(pytest.param(name, 71, marks=pytest.mark.slow) for name in (*RETNETS, *MAMBAS)),
]
B = 3


def made(name, **changes):
    """The model, its forms, and what says the truth about it."""
    if name in RETNETS:
        return retnets.tiny(**RETNETS[name], **changes), RETNET_FORMS, retnets.naive_logits
    return mambas.tiny(**MAMBAS[name], **changes), MAMBA_FORMS, mambas.naive_logits


def batch(width):
    """Tokens, mask, positions, and the sequences ``(row, columns)`` that they hold."""
    mask = torch.ones(B, width, dtype=torch.long)
    mask[0, :5], mask[0, 8::7], mask[1, -6:], mask[2, [0, 12]] = 0, 0, 0, 0
    positions = torch.arange(width).expand(B, width).clone()
    starts = [[0], [0], [0, 2, 15]]  # the last row is packed, one sequence has a single token
    for start in starts[2]:
        positions[2, start:] = torch.arange(width - start)
    sequences = []
    for row, firsts in enumerate(starts):
        for start, end in zip(firsts, [*firsts[1:], width], strict=True):
            columns = torch.arange(start, end)
            sequences.append((row, columns[mask[row, start:end] == 1]))
    return retnets.ids(B, width), mask, positions, sequences


def judged(logits, sequences):
    return torch.cat([logits[row, columns] for row, columns in sequences])


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    total = (logits * weight.to(logits)).sum()
    grads = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def distance(got, want):
    """Largest difference, scaled so that the largest number is 5."""
    want = want.detach()
    return float((got.detach().double() - want).abs().max() / want.abs().max() * 5)


@pytest.mark.parametrize(("name", "width"), CASES)
def test_every_form_equals_the_naive_recurrence(name, width):
    model, forms, naive = made(name)
    tokens, mask, positions, sequences = batch(width)
    single = copy.deepcopy(model).float()
    want, rounded = (
        torch.cat([naive(m, tokens[row, columns]) for row, columns in sequences])
        for m in (model, single)
    )
    want_grads = gradients(model, want)
    floor = 4 * distance(gradients(single, rounded), want_grads)
    for form, size in forms:
        for judge, tolerance in ((model, 1e-10), (single, 2e-4)):
            judge.config.scan_form = judge.config.retention_form = form
            judge.config.chunk_size = size
            logits = judge(tokens, attention_mask=mask, position_ids=positions).logits
            got = judged(logits, sequences)
            assert distance(got, want) < tolerance, (form, size)
            limit = tolerance if judge is model else max(tolerance, floor)
            assert distance(gradients(judge, got), want_grads) < limit, (form, size)


@torch.no_grad()
@pytest.mark.parametrize("name", ["DenseRetNet m=2", "DenseMamba m=2"])
def test_operations_do_not_grow_with_the_tokens_inside_a_chunk(name):
    model, *_ = made(name, chunk_size=512)
    counts = {operations(lambda n=n: model(retnets.ids(1, n), use_cache=False)) for n in (32, 500)}
    assert len(counts) == 1
