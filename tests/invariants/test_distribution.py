"""FAULTS D20: what is sampled with speculation follows the exact joint law of two tokens."""

import pytest
import torch

from retort.decode import sampling
from retort.decode.engine import Engine
from tests.invariants import distribution
from tests.invariants.distribution import CHANGE, ENGINE_CELLS, FUNCTION_CELLS, PROMPT, SIGMAS
from tests.invariants.naive import SHAPES, excess


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("cell", FUNCTION_CELLS, ids=str)
def test_the_verification_function_draws_from_the_exact_joint_law(cell, options):
    record = distribution.function_cell(cell, options)
    assert record["sound"], record
    if cell[1] == "model":
        assert record["accepted_tokens"] > distribution.DRAWS / 10


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
    record = distribution.function_cell(("rejection", "model"), {})
    assert not record["sound"] and record["excess_sigmas"] > 20


def test_a_wrong_processor_fails_the_same_test():
    counts, _ = distribution.simulate("coupled", "model", {"temperature": 1.05})
    assert excess(counts, distribution.exact_joint({"temperature": 1.0})) > 6


def test_an_all_zero_residual_draws_from_p():
    p = torch.tensor([[0.25, 0.75, 0.0]]).double().expand(20_000, 3)
    keys = torch.arange(20_000)[:, None]
    tokens = sampling.resample(p, p.clone(), keys, 0)
    assert excess(torch.bincount(tokens, minlength=3), p[0]) < SIGMAS


def test_model_drafts_share_the_noise_and_are_accepted_far_more_often():
    """Two laws that differ little agree in most tokens when the noise is shared."""
    table = distribution.TABLE[0]
    near = table + 0.1 * CHANGE[0]
    keys = torch.arange(20_000)[:, None]
    token = sampling.draw(table.double().expand(20_000, -1), keys, 0)
    shared = sampling.draw(near.double().expand(20_000, -1), keys, 0)
    apart = sampling.draw(near.double().expand(20_000, -1), keys, 0, sampling.DRAFT)
    assert (token == shared).double().mean() > 0.9
    assert (token == apart).double().mean() < 0.6


# The same law through the engine


@pytest.mark.parametrize(
    ("cell", "options"), zip(ENGINE_CELLS, SHAPES[:2] + SHAPES[-2:], strict=True), ids=str
)
def test_the_engine_draws_from_the_exact_joint_law(cell, options):
    record = distribution.engine_cell(cell, options)
    assert record["sound"], record


@pytest.mark.slow
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ENGINE_CELLS, ids=str)
def test_the_engine_draws_from_the_exact_joint_law_in_every_cell(cell, options):
    test_the_engine_draws_from_the_exact_joint_law(cell, options)


def test_the_engine_fails_the_test_with_a_wrong_rule(monkeypatch):
    monkeypatch.setattr(sampling, "resample", from_p)
    record = distribution.engine_cell(("rejection", "lookup"), {})
    assert not record["sound"] and record["excess_sigmas"] > 6


def test_rejection_is_reproducible_by_seed():
    texts, (target, other) = [], distribution.models()
    for seed in (1, 1, 2):
        with Engine(target, drafter=other, draft_budget=3, verification="rejection") as engine:
            outputs = engine.generate(
                [PROMPT], do_sample=True, n=8, seed=seed, eos_token_id=[], max_new_tokens=8
            )
            texts.append([o.token_ids for o in outputs])
    assert texts[0] == texts[1] != texts[2]
