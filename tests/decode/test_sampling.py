"""Sampling draws from the exact distribution, and speculation does not change the text."""

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.processors import shape_scores
from retort.decode.request import SamplingParams
from retort.decode.sampling import gumbel
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, toy
from tests.invariants.naive import SHAPES, naive_probs


@pytest.mark.parametrize("options", SHAPES)
def test_draws_follow_the_exact_distribution(options):
    logits = torch.tensor([0.3, -1.2, 2.0, 1.1, 0.0, -0.4, 1.7])
    prompt, output = [2, 5], [3, 3, 6]
    expected = naive_probs(logits, options, prompt, output)
    params = SamplingParams(do_sample=True, **options)
    scores = shape_scores(logits, params, prompt, output, set())
    assert torch.allclose(scores.softmax(-1), expected, atol=1e-12)
    draws = 100_000
    noise = torch.stack([gumbel(11, i, torch.arange(7)) for i in range(2000)])
    noise = torch.cat([noise, gumbel(13, 5, torch.arange(7 * (draws - 2000))).view(-1, 7)])
    counts = torch.bincount(torch.argmax(scores + noise, -1), minlength=7).double()
    assert _chi_square(counts, expected) < 40  # 6 degrees of freedom: p < 1e-6 beyond
    wrong = torch.full((7,), 1 / 7).double()
    assert _chi_square(counts, wrong) > 1000 or torch.allclose(expected, wrong, atol=0.02)


def _chi_square(counts, probs):
    assert counts[probs == 0].sum() == 0 or probs.min() > 0
    seen = probs > 0
    want = probs[seen] * counts.sum()
    return float(((counts[seen] - want) ** 2 / want).sum())


@pytest.mark.parametrize("options", SHAPES)
def test_one_seed_gives_one_text_with_any_drafts_and_in_any_company(options):
    model, texts = toy(), prompts((5, 9, 4))
    many = {"do_sample": True, "max_new_tokens": 20, "seed": 5, **options}
    with Engine(model) as engine:
        plain = [engine.generate([p], **many)[0].token_ids for p in texts]
    accepted = 0
    answers = [p + t + [0] * 9 for p, t in zip(texts, plain, strict=True)]
    for drafter, budget in (
        ("prompt-lookup", 4),
        (model, 3),
        (ScriptedDrafter("random", answers), 8),
    ):
        with Engine(model, drafter=drafter, draft_budget=budget, max_batch_size=2) as engine:
            assert [o.token_ids for o in engine.generate(texts, **many)] == plain
            accepted += engine.stats.accepted_tokens
    assert accepted > 0


def test_seeds_differ_and_tokens_of_two_positions_are_independent():
    first, second = (
        torch.stack([gumbel(s, i, torch.arange(50)) for s in range(200)]) for i in (0, 1)
    )
    assert abs(float(first.mean()) - 0.5772) < 0.03
    together = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))
    assert abs(float(together[0, 1])) < 0.03


def test_minimum_length_and_logprobs_with_speculation():
    model, prompt = toy(), prompts((6,))[0]
    options = {"min_new_tokens": 10, "max_new_tokens": 12, "logprobs": 2}
    with Engine(model) as engine:
        (plain,) = engine.generate([prompt], **options)
    answers = [prompt + plain.token_ids + [0] * 9]
    with Engine(model, drafter=ScriptedDrafter("right", answers), draft_budget=4) as engine:
        (fast,) = engine.generate([prompt], **options)
    assert fast.token_ids == plain.token_ids and len(plain.token_ids) >= 10
    assert fast.stats.accepted_tokens > 0
    for token, a, b in zip(plain.token_ids, plain.logprobs, fast.logprobs, strict=True):
        assert token in a and a.keys() == b.keys()
        assert all(abs(a[t] - b[t]) < 1e-10 for t in a)
