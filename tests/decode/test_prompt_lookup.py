"""Prompt lookup alone: which continuation of a row's end it drafts."""

import random

from retort.decode.draft import DraftContext
from retort.decode.drafter import PromptLookupDrafter


def _naive_lookup(tokens, sizes, limit):
    for size in sizes:
        suffix = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == suffix:
                return tokens[end : end + limit]
    return []


def test_prompt_lookup_finds_the_longest_and_most_recent_match():
    rng = random.Random(0)
    drafter = PromptLookupDrafter()
    for row in range(20):
        tokens = [rng.randrange(4) for _ in range(6)]
        for _ in range(40):
            got = drafter.propose([DraftContext(str(row), tokens, 5)])[0]
            assert got.tokens == _naive_lookup(tokens, (4, 3, 2), 5)
            assert got.match >= 2 * bool(got.tokens)
            tokens = tokens + [rng.randrange(4) for _ in range(rng.randrange(1, 4))]


def test_prompt_lookup_notices_that_a_row_was_rewound():
    drafter = PromptLookupDrafter()
    drafter.propose([DraftContext("a", [1, 2, 3, 4, 1, 2, 9, 9, 9, 9], 4)])
    assert drafter.propose([DraftContext("a", [1, 2, 3, 4, 1, 2], 2)])[0].tokens == [3, 4]
