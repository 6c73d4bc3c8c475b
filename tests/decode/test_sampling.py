"""Sampling draws from the exact distribution, and speculation does not change the text."""

import math

import pytest
import torch

from retort.decode.choosing import Place, choose
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.decode.processors import shape_scores, warp
from retort.decode.sampling import accepts, draw, gumbel, judge
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


# Many rows at once, against one row and one token at a time


def naive_noise(key, index, token, stream=0):
    """Gumbel noise in whole numbers of Python."""
    most = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & most
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & most
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix((mix((key * golden + index) & most) + stream * golden) & most)
    bits = mix((token * golden + state + golden) & most)
    return -math.log(-math.log(((bits >> 11) + 0.5) * 2.0**-53))


@pytest.mark.parametrize("key", [0, 5, -3, 2**63 - 1, -(2**63)])
def test_noise_equals_whole_number_arithmetic(key):
    tokens = torch.arange(61)
    for index, stream in ((0, 0), (7, 3)):
        wanted = [naive_noise(key % 2**64, index, t, stream) for t in range(61)]
        found = gumbel(key, index, tokens, stream)
        assert torch.allclose(
            found, torch.tensor(wanted, dtype=found.dtype), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("vocab", [1, 2, 97, 33_001])
def test_a_row_is_drawn_alike_alone_and_in_any_batch(vocab):
    """Whatever is possible in the other rows, and whether they can be drawn from at all."""
    rows = torch.randn(9, vocab).double() * 3
    rows[1, ::2], rows[3] = -torch.inf, torch.nan
    rows[4, vocab // 2 :] = -torch.inf
    rows[5, :-1] = -torch.inf
    key, index = torch.randint(-(2**63), 2**63 - 1, (9, 1)), torch.randint(0, 500, (9, 1))
    alone = [int(draw(rows[i], int(key[i]), int(index[i]))) for i in range(9)]
    assert draw(rows, key, index).tolist() == alone and alone[3] == -1
    for some in ([0, 8], [4, 5], [8, 3, 1], [2]):
        assert draw(rows[some], key[some], index[some]).tolist() == [alone[i] for i in some]
    noise = gumbel(key, index, torch.arange(vocab))
    for i in range(9):
        assert torch.equal(noise[i], gumbel(int(key[i]), int(index[i]), torch.arange(vocab)))


def test_a_draw_equals_one_token_at_a_time():
    scores = torch.randn(40, 17).double()
    for i, row in enumerate(scores.tolist()):
        wanted = max(range(17), key=lambda t: row[t] + naive_noise(i, 3, t))
        assert int(draw(scores[i], i, 3)) == wanted


def mixed_places(n, vocab):
    """Rows of every shaping, some greedy, each with text and noise of its own."""
    options = [*SHAPES, *SHAPES[1:5]]
    ids = torch.randint(0, 7, (n, 8)).tolist()
    return [
        Place(
            SamplingParams(do_sample=i % 5 != 3, **options[i % len(options)]),
            ids[i][:3], ids[i][3 : 3 + i % 6], {3}, key=i * 77,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("vocab", [7, 97, 1031])
def test_shaping_and_choosing_are_bitwise_alike_alone_and_in_any_batch(vocab):
    places = mixed_places(31, vocab)
    logits = torch.randn(31, vocab) * torch.linspace(0.1, 8, 31)[:, None]
    alone = [
        shape_scores(row, p.params, p.prompt, p.output, p.eos)
        for row, p in zip(logits, places, strict=True)
    ]
    together = logits.double()
    for row, place in zip(together, places, strict=True):
        place.adjust(row)
    together = warp(together, [p.params for p in places])
    assert torch.equal(together, torch.stack(alone))
    tokens = [choose(row[None], [p])[0] for row, p in zip(alone, places, strict=True)]
    assert choose(together, places) == tokens


def test_judging_is_alike_alone_and_in_any_batch():
    p, q = torch.randn(2, 50, 33).double() * 2
    key, index = torch.arange(50)[:, None], torch.full((50, 1), 4)
    guess = draw(q, key, index, 1)[:, None]
    q = q.softmax(-1)
    together = judge(p, q, guess, key, index).tolist()
    alone = [int(judge(p[i], q[i], guess[i], i, 4)) for i in range(50)]
    assert together == alone and together != guess[:, 0].tolist()


def test_judging_stays_on_the_device_of_its_drafts():
    p, q = torch.randn(2, 5, 33, device="meta").softmax(-1)
    draft = torch.zeros(5, 1, dtype=torch.int64, device="meta")
    assert accepts(p, q, draft, draft, draft).device.type == "meta"


def test_the_coldest_temperature_is_greedy():
    model, texts = toy(eos_token_id=None), prompts((5, 9))
    with Engine(model) as engine:
        greedy = [o.token_ids for o in engine.generate(texts, max_new_tokens=12)]
        cold = {"do_sample": True, "temperature": 1e-99, "top_p": 0.9}
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=12, **cold)] == greedy
