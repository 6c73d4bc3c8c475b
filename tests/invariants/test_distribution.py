"""FAULTS D20: what is sampled with speculation follows the exact joint law of two tokens."""

import itertools

import pytest
import torch

from retort.decode import sampling
from retort.decode.engine import Engine
from retort.decode.processors import shape_scores
from retort.decode.request import SamplingParams
from tests.decode.toys import toy
from tests.invariants.naive import SHAPES, excess, naive_probs

VOCAB, DRAWS, SIGMAS = 7, 100_000, 4.5
PROMPT = [2, 5]
RULES = ["coupled", "rejection"]
DRAFTS = ["lookup", "model", "impossible"]
TABLE, CHANGE = torch.randn(2, VOCAB, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.3
OTHER = TABLE + 0.7 * CHANGE


def two_steps(table, options):
    """Scores of the first token ``[V]`` and of the second after each first ``[V, V]``."""
    params = SamplingParams(do_sample=True, **options)
    eos = {options["eos_token_id"]} if "eos_token_id" in options else set()
    first = shape_scores(table[PROMPT[-1]], params, PROMPT, [], eos)
    second = [shape_scores(table[t], params, PROMPT, [t], eos) for t in range(VOCAB)]
    return first, torch.stack(second)


def exact_joint(options):
    """The law of both tokens ``[V, V]``, by the processors' definitions."""
    first = naive_probs(TABLE[PROMPT[-1]], options, PROMPT, [])
    after = [naive_probs(TABLE[t], options, PROMPT, [t]) for t in range(VOCAB)]
    return first[:, None] * torch.stack(after)


def decide(rule, drafts, scores, other, keys, index):
    """One position of all rows at once: their tokens, and which drafts were accepted."""
    guess = torch.full((len(scores), 1), (3, 1)[index])
    if drafts == "impossible":  # a draft that the target takes least, or never
        guess = scores.argmin(-1, keepdim=True)
    q = sampling.one_hot(guess, scores)
    if drafts == "model":
        stream = sampling.TOKEN if rule == "coupled" else sampling.DRAFT
        guess, q = sampling.draw(other, keys, index, stream)[:, None], other.softmax(-1)
    if rule == "coupled":
        tokens = sampling.draw(scores, keys, index)
    else:
        tokens = sampling.judge(scores, q, guess, keys, index)
    return tokens, tokens == guess[:, 0]


def simulate(rule, drafts, options):
    """Counts ``[V, V]`` of both tokens over 10⁵ keys, and how many drafts were accepted."""
    keys = torch.arange(DRAWS)[:, None]
    (first, second), (draft_first, draft_second) = (two_steps(t, options) for t in (TABLE, OTHER))
    everyone = (DRAWS, VOCAB)
    one, good = decide(rule, drafts, first.expand(everyone), draft_first.expand(everyone), keys, 0)
    two, also = decide(rule, drafts, second[one], draft_second[one], keys, 1)
    counts = torch.bincount(one * VOCAB + two, minlength=VOCAB**2)
    return counts.view(VOCAB, VOCAB), int(good.sum() + also.sum())


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_verification_function_draws_from_the_exact_joint_law(rule, drafts, options):
    counts, accepted = simulate(rule, drafts, options)
    assert excess(counts, exact_joint(options)) < SIGMAS
    if drafts == "model":
        assert accepted > DRAWS / 10


def from_p(p, q, key, index):
    """Wrong: the rejected draft's mass is not taken off."""
    return sampling.draw(p.log(), key, index, sampling.RESAMPLE)


def always(p, q, draft, key, index):
    """Wrong: a draft that is at all possible is accepted."""
    return p.gather(-1, draft) > 0


def inverted(p, q, draft, key, index):
    """Wrong: accepted with probability q/p."""
    return always(p, q, draft, key, index) & _accepts(q, p, draft, key, index)


_accepts = sampling.accepts
WRONG = [("resample", from_p), ("accepts", always), ("accepts", inverted)]


@pytest.mark.parametrize(("name", "rule"), WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_rule_fails_the_same_test(monkeypatch, name, rule):
    monkeypatch.setattr(sampling, name, rule)
    counts, _ = simulate("rejection", "model", {})
    assert excess(counts, exact_joint({})) > 20


def test_a_wrong_processor_fails_the_same_test():
    counts, _ = simulate("coupled", "model", {"temperature": 1.05})
    assert excess(counts, exact_joint({"temperature": 1.0})) > 6


def test_an_all_zero_residual_draws_from_p():
    p = torch.tensor([[0.25, 0.75, 0.0]]).double().expand(20_000, 3)
    keys = torch.arange(20_000)[:, None]
    tokens = sampling.resample(p, p.clone(), keys, 0)
    assert excess(torch.bincount(tokens, minlength=3), p[0]) < SIGMAS


def test_model_drafts_share_the_noise_and_are_accepted_far_more_often():
    """Two laws that differ little agree in most tokens when the noise is shared."""
    near = TABLE[0] + 0.1 * CHANGE[0]
    keys = torch.arange(20_000)[:, None]
    token = sampling.draw(TABLE[0].double().expand(20_000, -1), keys, 0)
    shared = sampling.draw(near.double().expand(20_000, -1), keys, 0)
    apart = sampling.draw(near.double().expand(20_000, -1), keys, 0, sampling.DRAFT)
    assert (token == shared).double().mean() > 0.9
    assert (token == apart).double().mean() < 0.6


# The same law through the engine

SPREAD = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def target():
    return toy(eos_token_id=None, **SPREAD)


@pytest.fixture(scope="module")
def other():
    return toy(seed=9, eos_token_id=None, **SPREAD)


@torch.no_grad()
def engine_joint(model, options):
    """The law of the second and third token ``[V + 1, V + 1]``; the last place says: none."""
    eos, law = options.get("eos_token_id"), torch.zeros(VOCAB + 1, VOCAB + 1).double()

    def spread(output, mass):
        if len(output) == 3 or (output and output[-1] == eos):
            law[tuple([*output, VOCAB, VOCAB][1:3])] += mass
            return
        logits = model(torch.tensor([PROMPT + output])).logits[0, -1]
        for token, p in enumerate(naive_probs(logits, options, PROMPT, output).tolist()):
            if p > 0:
                spread([*output, token], mass * p)

    spread([], 1.0)
    return law


def engine_counts(model, drafter, rule, options, draws=2000):
    """Counts of the second and third token over ``n`` samples, and accepted drafts."""
    with Engine(
        model, drafter=drafter, draft_budget=2, verification=rule, max_batch_size=64
    ) as engine:
        params = {"eos_token_id": [], "max_new_tokens": 4, "logprobs": 1, **options}
        outputs = engine.generate([PROMPT], do_sample=True, n=draws, seed=1, **params)
        accepted = engine.stats.accepted_tokens
    counts = torch.zeros(VOCAB + 1, VOCAB + 1)
    for output in outputs:
        assert output.finish_reason != "error", output.error
        assert len(output.logprobs) == len(output.token_ids)
        counts[tuple([*output.token_ids, VOCAB, VOCAB][1:3])] += 1
    return counts, accepted


class Fixed:
    """Bare tokens, as prompt lookup gives them, whatever the text."""

    passes = False

    def propose(self, contexts):
        return [[3, 1][: c.limit] for c in contexts]

    def release(self, request_id):
        pass


CELLS = list(itertools.product(RULES, ["lookup", "model"]))


def check_engine(target, other, cell, options):
    rule, drafts = cell
    drafter = Fixed() if drafts == "lookup" else other
    counts, accepted = engine_counts(target, drafter, rule, options)
    assert excess(counts, engine_joint(target, options)) < SIGMAS
    assert accepted > 0


@pytest.mark.parametrize(
    ("cell", "options"), zip(CELLS, SHAPES[:2] + SHAPES[-2:], strict=True), ids=str
)
def test_the_engine_draws_from_the_exact_joint_law(target, other, cell, options):
    check_engine(target, other, cell, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_engine_draws_from_the_exact_joint_law_in_every_cell(target, other, cell, options):
    check_engine(target, other, cell, options)


def test_the_engine_fails_the_test_with_a_wrong_rule(monkeypatch, target):
    monkeypatch.setattr(sampling, "resample", from_p)
    counts, _ = engine_counts(target, Fixed(), "rejection", {})
    assert excess(counts, engine_joint(target, {})) > 6


def test_rejection_is_reproducible_by_seed(target, other):
    texts = []
    for seed in (1, 1, 2):
        with Engine(target, drafter=other, draft_budget=3, verification="rejection") as engine:
            outputs = engine.generate(
                [PROMPT], do_sample=True, n=8, seed=seed, eos_token_id=[], max_new_tokens=8
            )
            texts.append([o.token_ids for o in outputs])
    assert texts[0] == texts[1] != texts[2]
