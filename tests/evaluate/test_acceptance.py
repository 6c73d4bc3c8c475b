"""Acceptance against the formula written out over whole logits."""

import pytest
import torch

from retort.errors import ConfigurationError
from retort.evaluate.acceptance import (
    acceptance,
    break_even,
    expected_tokens_per_step,
    overlap,
)
from retort.evaluate.predictions import predict
from tests.evaluate.tiny import tiny_gemma2, tiny_llama

EXAMPLES = [([1, 5, 9], [4, 8, 2, 7, 7, 30, 3]), ([2], [6]), ([3, 3], [11, 12, 13, 14])]


def _naive(teacher, student, width=31):
    """Each completion token's Σ min(p_t, p_s), straight from the models' logits."""
    found = []
    with torch.no_grad():
        for prompt, completion in EXAMPLES:
            ids = torch.tensor([prompt + completion])
            p, q = (m(ids).logits[0, :, :width].softmax(-1) for m in (teacher, student))
            for t in range(len(prompt), ids.shape[1]):
                found.append(sum(min(a, b) for a, b in zip(p[t - 1], q[t - 1], strict=True)))
    return torch.stack(found)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_rate_equals_the_formula_for_every_chunk_size(chunk_size):
    teacher, student = tiny_llama(0), tiny_llama(1)
    found = acceptance(teacher, student, EXAMPLES, chunk_size)
    naive = _naive(teacher, student)
    assert found.tokens == len(naive) == 12
    assert found.rate == pytest.approx(naive.mean().item(), abs=1e-12)
    assert found.per_example[1] == pytest.approx(naive[7].item(), abs=1e-12)
    assert 0.05 < found.rate < 0.95


def test_a_model_accepts_its_own_drafts():
    model = tiny_llama(0)
    found = acceptance(model, model, EXAMPLES)
    assert found.rate == pytest.approx(1.0) and found.agreement == 1.0
    assert found.tokens_per_step(4) == pytest.approx(5.0)


def test_agreement_counts_equal_most_likely_tokens():
    teacher, student = tiny_llama(0), tiny_llama(1)
    same = []
    with torch.no_grad():
        for prompt, completion in EXAMPLES:
            ids = torch.tensor([prompt + completion])
            equal = teacher(ids).logits.argmax(-1) == student(ids).logits.argmax(-1)
            same += equal[0, len(prompt) - 1 : -1].tolist()
    assert acceptance(teacher, student, EXAMPLES).agreement == pytest.approx(sum(same) / 12)


def test_vocabularies_padded_differently_share_their_common_width():
    teacher, student = tiny_llama(0, vocab_size=31), tiny_llama(1, vocab_size=40)
    found = acceptance(teacher, student, EXAMPLES)
    assert found.rate == pytest.approx(_naive(teacher, student).mean().item(), abs=1e-12)


def test_a_soft_cap_after_the_head_is_not_lost():
    teacher, student = tiny_gemma2(0), tiny_llama(1)
    found = acceptance(teacher, student, EXAMPLES)
    assert found.rate == pytest.approx(_naive(teacher, student).mean().item(), abs=1e-12)
    assert predict(teacher, [1, 2, 3], 1).hidden.shape[-1] == 31  # the logits themselves were kept


def test_the_pass_computes_one_row_of_logits():
    model = tiny_llama(0)
    rows = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    found = predict(model, list(range(20)), 5)
    assert rows == [1, 1] and found.hidden.shape == (15, 16)  # the pass, and the check of the head


def test_training_mode_comes_back():
    model = tiny_llama(0).train()
    acceptance(model, model, EXAMPLES[:1])
    assert model.training


def test_overlap_of_two_known_distributions():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.6, 0.3]).log()
    assert overlap(p, q).item() == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize(("alpha", "k", "expected"), [(0.5, 3, 1.875), (0.0, 7, 1), (1.0, 7, 8)])
def test_expected_tokens_of_a_step(alpha, k, expected):
    assert expected_tokens_per_step(alpha, k) == pytest.approx(expected)


def test_expected_tokens_agree_with_a_simulation():
    draws = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    simulated = 1 + draws.int().cumprod(1).sum(1).double().mean().item()
    assert expected_tokens_per_step(0.6, 5) == pytest.approx(simulated, abs=0.02)


@pytest.mark.parametrize(("alpha", "k"), [(1.2, 3), (-0.1, 3), (0.5, -1)])
def test_impossible_rates_are_refused(alpha, k):
    with pytest.raises(ConfigurationError):
        expected_tokens_per_step(alpha, k)


@pytest.mark.parametrize("examples", [[], [([1], [2]), ([], [3])], [([1], [2]), ([1], [])]])
def test_examples_without_prompt_or_completion_are_named(examples):
    with pytest.raises(ConfigurationError, match=r"example 1|got none"):
        acceptance(tiny_llama(0), tiny_llama(1), examples)


@pytest.mark.parametrize("draft_length", [1, 2, 5])
def test_break_even_is_the_acceptance_that_a_dearer_step_needs(draft_length):
    for alpha in (0.05, 0.4, 0.95):
        cost = expected_tokens_per_step(alpha, draft_length)
        assert break_even(cost, draft_length) == pytest.approx(alpha)
    assert break_even(0.9, draft_length) == break_even(1.0, draft_length) == 0
    assert break_even(draft_length + 1, draft_length) == pytest.approx(1)
    assert break_even(draft_length + 1.01, draft_length) is None


def test_break_even_needs_a_draft():
    with pytest.raises(ConfigurationError, match="at least one draft"):
        break_even(1.5, 0)
