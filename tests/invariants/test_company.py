"""FAULTS D22: one request and seed, one text: in any company, with any drafts, with preemption."""

import pytest

from retort.decode.engine import Engine
from tests.decode.toys import toy
from tests.invariants.losslessness import VOCAB, model

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 14}
GREEDY = {"max_new_tokens": 14, "repetition_penalty": 1.2, "bad_words_ids": [[7], [5, 9]]}
TEXTS = [[5, 6, 7, 8] * 3, [9, 10] * 4, [11, 12, 13] * 5, [4] * 3, [20, 21, 22, 23, 24] * 2]


ROOMS = ((None, 5), (52, 4), (34, 2))  # cached tokens, rows at once


class Replay:
    """Knows the texts and drafts them, with every fifth token another one."""

    passes = False

    def __init__(self, texts):
        self.texts = [p + t for p, t in zip(TEXTS, texts, strict=True)]

    def propose(self, contexts):
        return [self._draft(list(c.tokens), c.limit) for c in contexts]

    def release(self, request_id):
        pass

    def _draft(self, tokens, limit):
        text = next(t for t in self.texts if t[: len(tokens)] == tokens)
        places = range(len(tokens), min(len(tokens) + limit, len(text)))
        return [(text[i] + (i % 5 == 0)) % VOCAB for i in places]


def drafters(name, texts):
    """Nothing; texts with mistakes, lookup, the model itself, and a model that is another."""
    other = toy(seed=5, vocab_size=VOCAB, eos_token_id=None, hidden_size=32, num_hidden_layers=1)
    itself = model(name, "float64")
    made = {"replay": Replay(texts), "lookup": "prompt-lookup", "itself": itself, "other": other}
    return {"none": None, **made}


def check_drafts(drafter, drafted, accepted):
    """Drafts were made, accepted by those who know, and rejected of those who do not."""
    assert (drafted > 0) == (drafter != "none"), drafter
    if drafter in ("replay", "itself"):
        assert accepted > 0, drafter
    if drafter in ("replay", "lookup", "other"):
        assert accepted < drafted, drafter


def decode(name, options, room=None, batch=16, **engine_options):
    """Texts of `TEXTS` under these circumstances, and the engine's counters."""
    with Engine(
        model(name, "float64"),
        max_batch_size=batch,
        max_cached_tokens=room,
        max_prefill_tokens=7,
        debug=True,
        **engine_options,
    ) as engine:
        outputs = engine.generate(TEXTS, **options, seed=11, eos_token_id=[])
        return [o.token_ids for o in outputs], engine.stats


def alone(name, options):
    """Each text by itself, without drafts."""
    with Engine(model(name, "float64")) as engine:
        each = {**options, "seed": 11, "eos_token_id": []}
        return [engine.generate([t], **each)[0].token_ids for t in TEXTS]


@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", ["llama", "dense_retnet", "dense_mamba"])
def test_one_seed_one_text_whatever_else_happens(name, options):
    expected, preempted = alone(name, options), 0
    for drafter, built in drafters(name, expected).items():
        drafted = accepted = 0
        for k, (room, batch) in zip((1, 4, "auto"), ROOMS, strict=True):
            texts, stats = decode(name, options, room, batch, drafter=built, draft_budget=k)
            assert texts == expected, (drafter, k, room)
            drafted, accepted = drafted + stats.draft_tokens, accepted + stats.accepted_tokens
            preempted += stats.preemptions
        check_drafts(drafter, drafted, accepted)
    assert preempted > 0


@pytest.mark.parametrize("drafter", ["replay", "lookup", "itself", "other"])
@pytest.mark.parametrize("k", [1, 3, 8, "counts", "auto"])
@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_every_draft_length_gives_that_text(options, drafter, k):
    expected = alone("llama", options)
    built = drafters("llama", expected)[drafter]
    texts, stats = decode("llama", options, drafter=built, draft_budget=k)
    assert texts == expected
    if k != "auto":  # there the clock has a say in whether anything is drafted
        check_drafts(drafter, stats.draft_tokens, stats.accepted_tokens)


@pytest.mark.parametrize("drafter", ["replay", "itself"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_greedy_rows_do_not_know_the_rule(drafter, k):
    expected = alone("llama", GREEDY)
    built = drafters("llama", expected)[drafter]
    options = {"drafter": built, "draft_budget": k, "verification": "rejection"}
    texts, stats = decode("llama", GREEDY, **options)
    assert texts == expected
    check_drafts(drafter, stats.draft_tokens, stats.accepted_tokens)


@pytest.mark.parametrize("name", ["llama", "dense_mamba"])
def test_rejection_without_drafts_gives_one_text_in_any_company(name):
    expected = alone(name, SAMPLED)
    for room, batch in ROOMS:
        assert decode(name, SAMPLED, room, batch, verification="rejection")[0] == expected


def test_preempted_rows_score_their_prompt_once():
    target = model("llama", "float64")
    options = {"max_new_tokens": 9, "prompt_logprobs": 1, "logprobs": 1, "eos_token_id": []}
    with Engine(target) as engine:
        alone = engine.generate(TEXTS, **options)
    with Engine(target, max_cached_tokens=30, max_prefill_tokens=5) as engine:
        tight = engine.generate(TEXTS, **options)
        assert engine.stats.preemptions > 0
    for a, b in zip(alone, tight, strict=True):
        assert len(b.prompt_logprobs) == len(b.prompt_token_ids) - 1
        assert [list(x) for x in a.prompt_logprobs] == [list(x) for x in b.prompt_logprobs]
        assert [list(x) for x in a.logprobs] == [list(x) for x in b.logprobs]


def test_recurrent_rows_are_not_computed_again():
    """Copies go out and in: no token of a preempted row passes through the model twice."""
    computed = {}
    for name in ("llama", "dense_retnet", "dense_mamba"):
        target = model(name, "float64")
        for room in (None, 34):
            with Engine(target, max_cached_tokens=room) as engine:
                engine.generate(TEXTS, max_new_tokens=14, eos_token_id=[])
                computed[name, room] = engine.target.forward_tokens
                assert (engine.stats.preemptions > 0) == (room is not None)
    assert computed["dense_retnet", 34] == computed["dense_retnet", None]
    assert computed["dense_mamba", 34] == computed["dense_mamba", None]
    assert computed["llama", 34] > computed["llama", None]


def test_n_samples_have_noise_of_their_own_and_do_not_depend_on_each_other():
    target = model("llama", "float64")
    options = {"do_sample": True, "max_new_tokens": 10, "seed": 3, "eos_token_id": []}
    with Engine(target, drafter="prompt-lookup", draft_budget=3) as engine:
        outputs = engine.generate(TEXTS[:2], n=4, **options)
        single = engine.generate(TEXTS[:2], **options)
    assert [o.sample for o in outputs] == [0, 1, 2, 3] * 2
    assert [o.prompt_token_ids for o in outputs] == [TEXTS[0]] * 4 + [TEXTS[1]] * 4
    assert len({tuple(o.token_ids) for o in outputs}) == 8
    assert [outputs[0].token_ids, outputs[4].token_ids] == [o.token_ids for o in single]
