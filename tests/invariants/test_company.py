"""FAULTS D22: one request and seed, one text: in any company, with any drafts, with preemption."""

import pytest

from retort.decode.engine import Engine
from tests.decode.toys import toy
from tests.invariants.losslessness import VOCAB, model

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 14}
GREEDY = {"max_new_tokens": 14, "repetition_penalty": 1.2, "bad_words_ids": [[7], [5, 9]]}
TEXTS = [[5, 6, 7, 8] * 3, [9, 10] * 4, [11, 12, 13] * 5, [4] * 3, [20, 21, 22, 23, 24] * 2]


def drafters(name):
    """Nothing, lookup, the model itself, and a model that is another."""
    other = toy(seed=5, vocab_size=VOCAB, eos_token_id=None, hidden_size=32, num_hidden_layers=1)
    return [(None, 0), ("prompt-lookup", 4), (model(name, "float64"), 3), (other, 5)]


@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", ["llama", "dense_retnet", "dense_mamba"])
def test_one_seed_one_text_whatever_else_happens(name, options):
    options = {**options, "seed": 11, "eos_token_id": []}
    target = model(name, "float64")
    with Engine(target) as engine:
        alone = [engine.generate([t], **options)[0].token_ids for t in TEXTS]
    accepted = preempted = 0
    for drafter, k in drafters(name):
        for room, batch in ((None, 5), (52, 4), (34, 2)):
            with Engine(
                target,
                drafter=drafter,
                draft_budget=k,
                max_batch_size=batch,
                max_cached_tokens=room,
                max_prefill_tokens=7,
                debug=True,
            ) as engine:
                outputs = engine.generate(TEXTS, **options)
                assert [o.token_ids for o in outputs] == alone, (drafter, room)
                accepted += engine.stats.accepted_tokens
                preempted += engine.stats.preemptions
    assert accepted > 0 and preempted > 0


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
