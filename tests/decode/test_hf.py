"""`custom_generate=retort.speculative(...)` equals plain generate, row by row."""

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList

from retort.decode.engine import Engine
from retort.decode.hf import speculative
from retort.errors import ConfigurationError, RetortError
from tests.decode.toys import prompts, reference, toy

NEW = 16
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model():
    return toy(dtype=torch.float32, head_dim=16, **SMALL)


def _padded(texts):
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    return {"input_ids": ids, "attention_mask": mask}


def _equal_rows(model, drafter="prompt-lookup", **options):
    """The padded batch through the engine equals each row alone; returns the callable."""
    texts = prompts()
    run = speculative(drafter, draft_budget=4)
    ids = model.generate(**_padded(texts), max_new_tokens=NEW, custom_generate=run, **options)
    width = max(map(len, texts))
    for row, text in zip(ids, texts, strict=True):
        expected = reference(model, text, max_new_tokens=NEW, **options)
        assert row[width : width + len(expected)].tolist() == expected
        assert set(row[width + len(expected) :].tolist()) <= {0}
    return run


CONFIGURATIONS = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[9], 2.0], [[8, 4], -3.0]]},
    {"min_new_tokens": 9},
    {"min_length": 20},
    {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7, 30]},
    {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": (4, 1.5)},
    {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    {"eos_token_id": [2, 17, 40], "remove_invalid_values": True, "renormalize_logits": True},
    {"max_time": 1e9},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_a_left_padded_batch_equals_batch_one_generate(model, options):
    assert _equal_rows(model, drafter=model, **options).stats.accepted_tokens > 0


def test_with_prompt_lookup(model):
    assert _equal_rows(model).stats.accepted_tokens > 0


def test_a_model_drafts_through_the_same_processors(model):
    options = {"repetition_penalty": 1.5, "min_new_tokens": NEW, "suppress_tokens": [5, 9]}
    stats = _equal_rows(model, drafter=model, **options).stats
    assert stats.draft_tokens == stats.accepted_tokens > 0


class Parity(LogitsProcessor):
    """After an even token comes an odd one; counts what it was shown."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, int(input_ids[0, -1]) % 2 :: 2] = -torch.inf
        return scores


class Sum(StoppingCriteria):
    """Ends a row whose tokens sum to a multiple of seven."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(-1) % 7 == 0


def _shown(model, extra):
    """Text lengths that a processor is shown, row by row in transformers and by us at once."""
    texts, seen = prompts(), extra["logits_processor"][0].lengths
    seen.clear()
    for text in texts:
        reference(model, text, max_new_tokens=NEW, **extra)
    alone, ours = Counter(seen), speculative("prompt-lookup", draft_budget=4)
    seen.clear()
    model.generate(**_padded(texts), max_new_tokens=NEW, custom_generate=ours, **extra)
    assert ours.stats.accepted_tokens > 0
    return alone, Counter(seen)


def test_own_processors_see_each_row_unpadded_and_every_token_once(model):
    extra = {"logits_processor": LogitsProcessorList([Parity()]), "eos_token_id": None}
    _equal_rows(model, **extra)
    alone, ours = _shown(model, extra)
    assert ours == alone and alone.total() == NEW * len(prompts())


def test_own_criteria_end_a_row_and_its_processors_see_nothing_behind_it(model):
    extra = {
        "logits_processor": LogitsProcessorList([Parity()]),
        "stopping_criteria": StoppingCriteriaList([Sum()]),
        "eos_token_id": None,
    }
    _equal_rows(model, **extra)
    alone, ours = _shown(model, extra)
    assert ours == alone and alone.total() < NEW * len(prompts())


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 2},
        {"forced_bos_token_id": 3},
        {"exponential_decay_length_penalty": (4, 1.5), "suppress_tokens": [60, 61]},
    ],
    ids=str,
)
def test_processors_keep_their_order_beside_allowed_tokens(model, options):
    """A forced token counts though no allowed one is left: it is forced behind that."""

    def allowed(_, ids):
        return [(7 * int(ids[-1]) + 11 * i) % 90 + 4 for i in range(20)]

    run = _equal_rows(model, prefix_allowed_tokens_fn=allowed, **options)
    assert run.stats.generated_tokens > NEW


def test_allowed_tokens_by_row(model):
    texts = prompts()

    def allowed(row, ids):
        return [10 * row + i for i in range(3, 9)]

    run = speculative("prompt-lookup", draft_budget=4)
    options = {"max_new_tokens": NEW, "prefix_allowed_tokens_fn": allowed, "eos_token_id": None}
    ids = model.generate(**_padded(texts), custom_generate=run, **options)
    for i, row in enumerate(ids):
        assert set(row[max(map(len, texts)) :].tolist()) <= set(allowed(i, None))


def test_the_outputs_object_with_scores_and_logits(model):
    texts = prompts((6, 3))
    options = {
        "max_new_tokens": NEW,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    run = speculative("prompt-lookup", draft_budget=4)
    got = model.generate(**_padded(texts), custom_generate=run, **options)
    assert run.stats.accepted_tokens > 0
    steps = got.sequences.shape[1] - len(texts[0])
    assert len(got.scores) == len(got.logits) == steps
    for i, text in enumerate(texts):
        alone = model.generate(torch.tensor([text]), do_sample=False, **options)
        ours, theirs = got.sequences[i, len(texts[0]) - len(text) :], alone.sequences[0]
        assert ours[: len(theirs)].tolist() == theirs.tolist()
        assert not ours[len(theirs) :].any()  # padding
        for name in ("scores", "logits"):
            for ours, theirs in zip(getattr(got, name), getattr(alone, name), strict=False):
                torch.testing.assert_close(ours[i], theirs[0], atol=1e-4, rtol=1e-4)
        for step in range(len(alone.scores), steps):
            assert not got.scores[step][i].any()


def test_num_return_sequences_and_seeds(model):
    texts = prompts((6, 3))
    options = {"do_sample": True, "top_k": 20, "temperature": 0.9, "max_new_tokens": NEW}
    run = speculative("prompt-lookup", draft_budget=4, seed=5)
    many = {"num_return_sequences": 3, "eos_token_id": None, **options}
    ids = model.generate(**_padded(texts), custom_generate=run, **many)
    assert ids.shape[0] == 6 and len({tuple(row.tolist()) for row in ids}) == 6
    again = model.generate(**_padded(texts), custom_generate=speculative(None, seed=5), **many)
    assert torch.equal(ids, again)
    with Engine(model) as engine:
        params = {**options, "n": 3, "seed": 5, "eos_token_id": []}
        outputs = engine.generate([texts[0]], **params)
    assert [o.token_ids for o in outputs] == ids[:3, len(texts[0]) :].tolist()


class Streamer:
    """Collects what it is given."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_get_prompt_and_tokens_of_their_row(model):
    texts, streamers = prompts((6, 4)), [Streamer(), Streamer()]
    run = speculative("prompt-lookup", streamer=streamers)
    ids = model.generate(**_padded(texts), max_new_tokens=NEW, custom_generate=run)
    for row, text, streamer in zip(ids.tolist(), texts, streamers, strict=True):
        new = row[len(texts[0]) :]
        assert streamer.got[: len(text)] == text and streamer.ended
        assert streamer.got[len(text) :] == new[: len(streamer.got) - len(text)]
        assert set(new[len(streamer.got) - len(text) :]) <= {0}
    with pytest.raises(ConfigurationError, match="1 streamer for a batch of 2"):
        model.generate(**_padded(texts), custom_generate=speculative(streamer=Streamer()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("guidance_scale", {"guidance_scale": 2.0}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_what_is_not_handled_is_refused_by_name(model, name, options):
    with pytest.raises(ConfigurationError, match=name):
        model.generate(
            **_padded(prompts((6,))), max_new_tokens=2, custom_generate=speculative(), **options
        )


def test_a_faulty_criterion_ends_its_row_alone(model):
    def faulty(tokens):
        raise ValueError("boom")

    with Engine(model) as engine:
        options = {"max_new_tokens": 4, "eos_token_id": []}
        fine = engine.generate([[5, 6]], **options)
        bad = engine.generate([[5, 6]], stopping_criteria=[faulty], **options)
    assert fine[0].finish_reason == "length"
    assert (bad[0].finish_reason, bad[0].error) == ("error", "ValueError: boom")


def test_a_processor_that_fails_is_an_error_and_no_short_text(model):
    class Faulty(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 12:
                raise KeyError("lexicon")
            return scores

    with pytest.raises(RetortError, match=r"row 1 .*lexicon"):
        model.generate(
            **_padded(prompts()),
            max_new_tokens=NEW,
            custom_generate=speculative(),
            logits_processor=LogitsProcessorList([Faulty()]),
        )


def test_rows_that_end_at_the_context_are_told_of():
    small = toy(max_position_embeddings=32, eos_token_id=None, dtype=torch.float32, **SMALL)
    texts = prompts((6, 3))
    with pytest.warns(UserWarning, match=r"rows 0 .*context of 32"):
        ids = small.generate(**_padded(texts), max_new_tokens=22, custom_generate=speculative())
    assert ids.shape == (2, 12 + 22)  # the shorter row has room for them
    assert ids[0, :32].tolist() == texts[0] + reference(small, texts[0], max_new_tokens=20)


def test_rows_within_the_context_are_not_warned_of(model, recwarn):
    model.generate(**_padded(prompts()), max_new_tokens=NEW, custom_generate=speculative())
    assert not [w for w in recwarn if "context" in str(w.message)]
