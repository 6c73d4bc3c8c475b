"""Every cell of the sampling table (FAULTS D20), and the command that fills it:

    OMP_NUM_THREADS=1 python -m tests.invariants.distribution

Verification rule × drafts × processor: what is sampled must follow the exact joint law of two
tokens. At the verification function 10⁵ draws a cell, through the engine 2,000; a cell's *excess*
says by how many standard deviations its χ² lies above expectation. Drafts must have been accepted.
The result is written to docs/results/d20.json.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from pathlib import Path

import torch

from retort.decode import sampling
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.decode.processors import shape_scores
from retort.provenance import Provenance, write_json
from tests.decode.toys import toy
from tests.invariants.naive import SHAPES, excess, naive_probs

RESULT = Path(__file__).resolve().parents[2] / "docs" / "results" / "d20.json"

VOCAB, DRAWS, SIGMAS = 7, 100_000, 4.5
ENGINE_DRAWS = 2000
PROMPT = [2, 5]
RULES = ["coupled", "rejection"]
DRAFTS = ["lookup", "model", "impossible"]
TABLE, CHANGE = torch.randn(2, VOCAB, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.3
OTHER = TABLE + 0.7 * CHANGE
FUNCTION_CELLS = list(itertools.product(RULES, DRAFTS))
ENGINE_CELLS = list(itertools.product(RULES, ["lookup", "model"]))


# At the verification function


def function_cell(cell, options) -> dict:
    """A cell at the verification function; see `_record`."""
    counts, accepted = simulate(*cell, options)
    return _record("function", cell, options, excess(counts, exact_joint(options)), accepted)


def simulate(rule, drafts, options):
    """Counts ``[V, V]`` of both tokens over 10⁵ keys, and how many drafts were accepted."""
    keys = torch.arange(DRAWS)[:, None]
    (first, second), (draft_first, draft_second) = (two_steps(t, options) for t in (TABLE, OTHER))
    everyone = (DRAWS, VOCAB)
    one, good = decide(rule, drafts, first.expand(everyone), draft_first.expand(everyone), keys, 0)
    two, also = decide(rule, drafts, second[one], draft_second[one], keys, 1)
    counts = torch.bincount(one * VOCAB + two, minlength=VOCAB**2)
    return counts.view(VOCAB, VOCAB), int(good.sum() + also.sum())


def two_steps(table, options):
    """Scores of the first token ``[V]`` and of the second after each first ``[V, V]``."""
    params = SamplingParams(do_sample=True, **options)
    eos = {options["eos_token_id"]} if "eos_token_id" in options else set()
    first = shape_scores(table[PROMPT[-1]], params, PROMPT, [], eos)
    second = [shape_scores(table[t], params, PROMPT, [t], eos) for t in range(VOCAB)]
    return first, torch.stack(second)


def exact_joint(options):
    """The law of both tokens ``[V, V]``, by the processors' definitions."""
    first = naive_probs(TABLE[PROMPT[-1]], options, PROMPT, [])
    after = [naive_probs(TABLE[t], options, PROMPT, [t]) for t in range(VOCAB)]
    return first[:, None] * torch.stack(after)


def decide(rule, drafts, scores, other, keys, index):
    """One position of all rows at once: their tokens, and which drafts were accepted."""
    guess = other.argmax(-1, keepdim=True)  # "lookup": given and not drawn
    if drafts == "impossible":  # a draft that the target takes least, or never
        guess = scores.argmin(-1, keepdim=True)
    q = sampling.one_hot(guess, scores)
    if drafts == "model":
        stream = sampling.TOKEN if rule == "coupled" else sampling.DRAFT
        guess, q = sampling.draw(other, keys, index, stream)[:, None], other.softmax(-1)
    if rule == "coupled":
        tokens = sampling.draw(scores, keys, index)
    else:
        tokens = sampling.judge(scores, q, guess, keys, index)
    return tokens, tokens == guess[:, 0]


# Through the engine


def engine_cell(cell, options) -> dict:
    """A cell through the engine; see `_record`."""
    rule, drafts = cell
    target, other = models()
    drafter = Fixed() if drafts == "lookup" else other
    counts, accepted = engine_counts(target, drafter, rule, options)
    return _record("engine", cell, options, excess(counts, engine_joint(target, options)), accepted)


@cache
def models():
    """The target and a drafter that is another model."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options = {"vocab_size": VOCAB, "eos_token_id": None, **sizes}
    return toy(**options), toy(seed=9, **options)


class Fixed:
    """Bare tokens, as prompt lookup gives them, whatever the text."""

    passes = False

    def propose(self, contexts):
        return [[3, 1][: c.limit] for c in contexts]

    def release(self, request_id):
        pass


@torch.no_grad()
def engine_joint(model, options):
    """The law of the second and third token ``[V + 1, V + 1]``; the last place says: none."""
    eos, law = options.get("eos_token_id"), torch.zeros(VOCAB + 1, VOCAB + 1).double()

    def spread(output, mass):
        if len(output) == 3 or (output and output[-1] == eos):
            law[tuple([*output, VOCAB, VOCAB][1:3])] += mass
            return
        logits = model(torch.tensor([PROMPT + output])).logits[0, -1]
        for token, p in enumerate(naive_probs(logits, options, PROMPT, output).tolist()):
            if p > 0:
                spread([*output, token], mass * p)

    spread([], 1.0)
    return law


def engine_counts(model, drafter, rule, options, draws=ENGINE_DRAWS):
    """Counts of the second and third token over ``n`` samples, and accepted drafts."""
    with Engine(
        model, drafter=drafter, draft_budget=2, verification=rule, max_batch_size=64
    ) as engine:
        params = {"eos_token_id": [], "max_new_tokens": 4, "logprobs": 1, **options}
        outputs = engine.generate([PROMPT], do_sample=True, n=draws, seed=1, **params)
        accepted = engine.stats.accepted_tokens
    counts = torch.zeros(VOCAB + 1, VOCAB + 1)
    for output in outputs:
        assert output.finish_reason != "error", output.error
        assert len(output.logprobs) == len(output.token_ids)
        counts[tuple([*output.token_ids, VOCAB, VOCAB][1:3])] += 1
    return counts, accepted


# The table


def _record(place, cell, options, sigmas, accepted) -> dict:
    """What a cell found; it is sound when its law fits and drafts were accepted."""
    rule, drafts = cell
    return {
        "place": place,
        "rule": rule,
        "drafts": drafts,
        "processor": options,
        "excess_sigmas": round(sigmas, 3),
        "accepted_tokens": accepted,
        "sound": sigmas < SIGMAS and (accepted > 0 or drafts == "impossible"),
    }


def main() -> int:
    """Run every cell, write the result after each; exit code 1 where one is not sound."""
    runs = [(function_cell, FUNCTION_CELLS), (engine_cell, ENGINE_CELLS)]
    cells = [(run, *c) for run, places in runs for c in itertools.product(places, SHAPES)]
    head = {
        "provenance": Provenance.collect(seeds={"table": 4, "samples": 1}).to_dict(),
        "draws": {"function": DRAWS, "engine": ENGINE_DRAWS},
        "limit_sigmas": SIGMAS,
        "cells": len(cells),
    }
    records: list[dict] = []
    for run, cell, options in cells:
        records.append(run(cell, options))
        failed = [r for r in records if not r["sound"]]
        write_json(RESULT, {**head, "run": len(records), "failed": failed, "records": records})
        print(f"\r{len(records)} of {len(cells)}", end="", file=sys.stderr)
    print(f"\n{len(records)} cells, {len(failed)} failed: {RESULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
