"""The rejection rule through the engine: drafts are judged, and the law is the target's."""

import pytest
import torch

import retort.decode.verify as verify_module
from retort.decode.engine import Engine
from tests.decode.toys import toy

PROMPT, DRAWS = [5, 9, 4], 2000
SHAPE = {"do_sample": True, "top_k": 4, "temperature": 0.5, "ignore_eos": True}


class Given:
    """Drafts that were not drawn: the target's most likely token (its q is one-hot)."""

    passes = False

    def __init__(self, model):
        self.best = lambda ids: int(_logits(model, ids).argmax())

    def propose(self, contexts):
        return [[self.best(list(c.tokens))] for c in contexts]

    def release(self, request_id):
        pass


def _near(model):
    """A drafter that is often, and not always, of the target's opinion."""
    near = toy(eos_token_id=None)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.5 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return near


DRAFTERS = pytest.mark.parametrize("make", [Given, _near], ids=["given", "drawn"])


@DRAFTERS
def test_two_tokens_follow_the_targets_joint_law(make):
    """2,000 rows, the second token drafted, against the exact law from the model's logits."""
    model = toy(eos_token_id=None)
    seen, outputs, stats = _drawn(model, make(model))
    assert {(o.finish_reason, o.error) for o in outputs} == {("length", None)}
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert _excess(seen, _joint(model)) < 6


@DRAFTERS
def test_a_rule_that_accepts_every_draft_fails_the_same_test(make, monkeypatch):
    monkeypatch.setattr(verify_module, "accepts", lambda p, q, draft, *_: draft >= 0)
    model = toy(eos_token_id=None)
    seen, _, stats = _drawn(model, make(model))
    assert stats.accepted_tokens == stats.draft_tokens > 0
    assert _excess(seen, _joint(model)) > 6


def _drawn(model, drafter):
    options = {"drafter": drafter, "draft_budget": 1, "verification": "rejection"}
    seen = torch.zeros(97, 97, dtype=torch.float64)
    with Engine(model, max_batch_size=64, **options) as engine:
        outputs = engine.generate(PROMPT, max_new_tokens=3, n=DRAWS, seed=1, **SHAPE)
    for out in outputs:
        seen[out.token_ids[0], out.token_ids[1]] += 1
    return seen, outputs, engine.stats


def _excess(seen, law):
    """Chi-square in standard deviations above its mean."""
    if seen[law == 0].sum():
        return float("inf")
    cells = law > 0
    want = law[cells] * DRAWS
    degrees = int(cells.sum()) - 1
    chi = float(((seen[cells] - want) ** 2 / want).sum())
    return (chi - degrees) / (2 * degrees) ** 0.5


def _joint(model):
    first, joint = _law(model, PROMPT), torch.zeros(97, 97, dtype=torch.float64)
    for token in first.nonzero()[:, 0].tolist():
        joint[token] = first[token] * _law(model, [*PROMPT, token])
    return joint


def _law(model, ids):
    logits = _logits(model, ids) / SHAPE["temperature"]
    kept = logits.topk(SHAPE["top_k"]).indices
    return torch.zeros_like(logits).scatter(0, kept, logits[kept].softmax(-1))


@torch.no_grad()
def _logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].double()
