"""A drafter of your own: it knows phrases by heart and proposes their continuation.

    python examples/own_drafter.py [MODEL]

A drafter may be as wrong as it likes: what comes out is what the model would have said alone.
"""

import sys
from collections.abc import Sequence

import retort
from retort.decode.draft import DraftContext


class Phrases:
    """Where a text ends in the beginning of a phrase, draft the rest of it."""

    passes = False  # drafting costs no model pass

    def __init__(self, phrases: Sequence[Sequence[int]]) -> None:
        self._next = {
            tuple(phrase[i : i + 2]): list(phrase[i + 2 :])
            for phrase in phrases
            for i in range(len(phrase) - 2)
        }

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """At most ``limit`` tokens for each row; an empty list is fine."""
        return [self._next.get(tuple(c.tokens[-2:]), [])[: c.limit] for c in contexts]

    def release(self, request_id: str) -> None:
        """A request is finished; nothing was kept for it."""


def main(model: str = "smollm2-135m-instruct") -> None:
    question = (
        "Say exactly: we hold these truths to be self-evident, that all men are created equal"
    )
    prompt = [{"role": "user", "content": question}]
    with retort.Engine.from_pretrained(model) as engine:
        tokenizer = engine.tokenizer
        alone = engine.generate([prompt], max_new_tokens=32)[0]
    drafter = Phrases([tokenizer(text).input_ids for text in (question, alone.text)])
    with retort.Engine.from_pretrained(model, drafter=drafter, draft_budget=5) as engine:
        drafted = engine.generate([prompt], max_new_tokens=32)[0]
    print(drafted.text)
    print("equal:", drafted.token_ids == alone.token_ids, drafted.stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
