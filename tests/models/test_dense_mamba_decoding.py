"""DenseMamba in the engine, as the target and as the drafter: plain greedy decoding, always."""

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, reference
from tests.models.mambas import tiny

NEW = 24
SIZES = (5, 11, 3, 14, 7, 2, 9, 6)


def toy(**changes):
    return tiny(vocab_size=97, num_hidden_layers=4, chunk_size=8, **changes)


@pytest.fixture(scope="module")
def answers():
    """Each prompt of SIZES with its greedy continuation at batch 1."""
    model, texts = toy(), prompts(SIZES)
    return texts, [reference(model, p, max_new_tokens=NEW, pad_token_id=0) for p in texts]


@pytest.mark.parametrize("kind", ["right", "wrong", "random, sometimes none"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_any_draft_pattern_gives_the_same_tokens(kind, batch, k, answers):
    """Ragged batches; with 3 places for 8 prompts rows join, leave and are recycled."""
    texts, expected = answers
    drafter = ScriptedDrafter(kind, [p + e + [0] * k for p, e in zip(texts, expected, strict=True)])
    with Engine(toy(), drafter=drafter, draft_budget=k, max_batch_size=batch) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
    assert [o.token_ids for o in outputs] == expected
    stats = engine.stats
    assert stats.draft_tokens > 0
    assert (stats.accepted_tokens == 0) == (kind == "wrong")


@pytest.mark.parametrize("m", [0, 2])
def test_lookup_itself_and_others_draft_losslessly(m):
    model, texts = toy(dense_block_layers=m), prompts(SIZES)
    expected = [reference(model, p, max_new_tokens=NEW, pad_token_id=0) for p in texts]
    drafters = {"none": (None, 0), "lookup": ("prompt-lookup", 5), "itself": (model, 3)}
    drafters["another"] = (toy(seed=1, dense_block_layers=m), 4)
    for name, (drafter, budget) in drafters.items():
        with Engine(model, drafter=drafter, draft_budget=budget, max_batch_size=3) as engine:
            outputs = engine.generate(texts, max_new_tokens=NEW)
        assert [o.token_ids for o in outputs] == expected, name
        assert (engine.stats.accepted_tokens > 0) >= (name in ("lookup", "itself"))
        assert (engine.stats.draft_tokens > 0) == (drafter is not None)


def test_it_drafts_for_a_transformer():
    from tests.decode.toys import toy as transformer

    target, texts = transformer("llama"), prompts()
    expected = [reference(target, p, max_new_tokens=NEW) for p in texts]
    with Engine(target, drafter=toy(), draft_budget=4, max_batch_size=3) as engine:
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW)] == expected
        assert engine.stats.draft_tokens > 0


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_prefill_changes_nothing(chunk, answers):
    texts, expected = answers
    with Engine(toy(), max_prefill_tokens=chunk, drafter="prompt-lookup") as engine:
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW)] == expected


def test_float32_on_the_default_backend(answers):
    texts, expected = answers
    with Engine(toy().float(), drafter="prompt-lookup", draft_budget=5) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
    assert [o.token_ids for o in outputs] == expected
    assert engine.stats.accepted_tokens > 0


def test_states_after_rejections_equal_those_of_the_accepted_text():
    """Recurrent and convolution states and the dense readout, after every draft's end."""
    model, texts = toy(), prompts(SIZES)
    packed = PackedModel(model, max_draft=5)
    rows = [packed.add_row() for _ in texts]
    packed.forward([(r, t) for r, t in zip(rows, texts, strict=True)], [0] * len(rows))
    for step in range(6):
        drafted = rows[step % 2 :: 2]  # the others take a plain step
        feeds = [(r, [3 + r, 5, 7, 11, 13][: 5 if r in drafted else 1]) for r in rows]
        packed.forward(feeds, [0] * len(rows))
        for r in drafted:
            packed.rewind(r, packed.length(r) - (r + step) % 5)
        for r, fed in feeds:
            texts[r] = (texts[r] + fed)[: packed.length(r)]
        got = packed.forward([(r, [1]) for r in rows], [1] * len(rows))
        for r in rows:
            packed.rewind(r, packed.length(r) - 1)
            want = model(torch.tensor([[*texts[r], 1]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(got[r], want, atol=1e-12, rtol=0)
    packed.close()


def test_a_held_row_goes_back_anywhere_in_its_completion(answers):
    """What sequence correction does: back to a token, another in its place, and on."""
    texts, expected = answers
    model = toy()
    with Engine(model, tape="completion") as engine:
        ids = [engine.add_request(p, engine_params(), hold=True) for p in texts[:3]]
        while engine.has_unfinished():
            engine.step()
        for i, (rid, length) in enumerate(zip(ids, (2, 9, 20), strict=True)):
            before = engine.target.forward_tokens
            keep = len(texts[i]) + length
            engine.rewind(rid, keep, append=[50], max_new_tokens=4)
            while engine.has_unfinished():
                (output,) = engine.step() or [None]
            again = texts[i] + expected[i][:length] + [50]
            want = reference(model, again, max_new_tokens=4, pad_token_id=0)
            assert output.token_ids[length + 1 :] == want
            assert engine.target.forward_tokens - before == 4
            engine.release(rid)


def engine_params():
    from retort.decode.params import SamplingParams

    return SamplingParams(max_new_tokens=NEW)
