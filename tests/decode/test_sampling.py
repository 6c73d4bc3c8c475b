"""Sampling draws from the exact distribution, and speculation does not change the text."""

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.processors import shape_scores
from retort.decode.request import SamplingParams
from retort.decode.sampling import gumbel
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, toy

SHAPES = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"logit_bias": {2: 3.0, 0: -100.0}},
    {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "repetition_penalty": 0.8},
]


def _naive(logits, options, prompt, output):
    """The processors' definitions, one token at a time."""
    scores = [float(x) for x in logits]
    rep = options.get("repetition_penalty", 1.0)
    for t in set(prompt) | set(output):
        scores[t] = scores[t] * rep if scores[t] < 0 else scores[t] / rep
    for t in set(output):
        scores[t] -= options.get("presence_penalty", 0)
        scores[t] -= options.get("frequency_penalty", 0) * output.count(t)
    for t, b in options.get("logit_bias", {}).items():
        scores[t] += b
    scores = [s / options.get("temperature", 1.0) for s in scores]
    probs = torch.tensor(scores).double().softmax(-1)
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    kept = order[: options.get("top_k") or len(order)]
    probs = _only(probs, kept)
    mass, nucleus = 0.0, []
    for t in kept:
        if mass < options.get("top_p", 1.0):
            nucleus.append(t)
        mass += float(probs[t])
    probs = _only(probs, nucleus)
    least = options.get("min_p", 0.0) * float(probs.max())
    return _only(probs, [t for t in nucleus if float(probs[t]) >= least])


def _only(probs, kept):
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize("options", SHAPES)
def test_draws_follow_the_exact_distribution(options):
    logits = torch.tensor([0.3, -1.2, 2.0, 1.1, 0.0, -0.4, 1.7])
    prompt, output = [2, 5], [3, 3, 6]
    expected = _naive(logits, options, prompt, output)
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
