"""FAULTS D21: after a rewind, what a row holds equals a fresh run over the accepted prefix.

Recurrent states, convolution inputs and tapes are compared directly; the dense connection by every
layer's hidden states of the tokens that follow, since features live in the pass itself.
"""

import random

import pytest
import torch

from tests.models import mambas, retnets

MODELS = {
    f"{kind} m={m}": (maker, m)
    for kind, maker in (("retnet", retnets.tiny), ("mamba", mambas.tiny))
    for m in (0, 2)
}


def feed(model, cache, row, tokens):
    """One packed pass over a row; every layer's hidden states ``[layers + 1, n, hidden]``."""
    layout = cache.begin([row], [len(tokens)])
    output = model(
        torch.tensor([tokens]),
        position_ids=layout.position_ids(),
        past_key_values=cache,
        output_hidden_states=True,
    )
    cache.end()
    return torch.cat(output.hidden_states)


def held(cache, row):
    """What the next pass of ``row`` starts from: states, then inputs or tape."""
    length = cache.length(row)
    cache.begin([row], [1])  # rewinds are made good here, all rows and layers at once
    if hasattr(cache, "history"):  # Mamba
        layers = range(cache.shape.layers)
        states = [x for layer in layers for x in cache.resume(layer, slice(0, 1))]
        states += [cache.history(layer, slice(0, 1)) for layer in layers]
    else:
        anchor, block = cache._anchor[row], cache.block
        states = [torch.tensor(anchor)] + [cache.states[:, row]] * (anchor > 1)
        for place in range(max(0, (anchor - 1) * block), length):
            page = cache.tape.find(row, place // block)
            states += [tape[:, page, :, place % block] for tape in (cache.tape.keys,
                                                                    cache.tape.values)]  # fmt: skip
    states = [x.clone() for x in states]
    cache.cancel()
    return states


@torch.no_grad()
@pytest.mark.parametrize("tape", ["draft", "completion"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rewound_row_holds_what_a_fresh_one_does(name, tape):
    maker, m = MODELS[name]
    model, dice = maker(dense_block_layers=m, num_hidden_layers=4), random.Random(name)
    cache = model.new_row_cache(tape, max_draft=6)
    rows = {cache.add_row(): [dice.randrange(31) for _ in range(n)] for n in (3, 17, 40)}
    for row, tokens in rows.items():
        feed(model, cache, row, tokens)
    for step in range(12):
        row = dice.choice(list(rows))
        draft = [dice.randrange(31) for _ in range(dice.randint(1, 7))]
        feed(model, cache, row, draft)
        kept = dice.randint(max(0, len(draft) - 6), len(draft))
        rows[row] += draft[:kept]
        cache.rewind(row, len(rows[row]))
        if step % 5 == 4:  # a row leaves, its storage is recycled
            gone = dice.choice(list(rows))
            cache.free_row(gone)
            del rows[gone]
            new = cache.add_row()
            rows[new] = [dice.randrange(31) for _ in range(dice.randint(1, 30))]
            cache.poison()
            feed(model, cache, new, rows[new])
        cache.check()
        cache.poison()
        fresh = model.new_row_cache(tape, max_draft=6)
        fresh.add_row()
        feed(model, fresh, 0, rows[row])
        for got, want in zip(held(cache, row), held(fresh, 0), strict=True):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
        more = [1, 2, 3]
        got = feed(model, cache, row, more)
        whole = model(
            torch.tensor([rows[row] + more]), use_cache=False, output_hidden_states=True
        ).hidden_states
        torch.testing.assert_close(got, torch.cat(whole)[:, -3:], atol=1e-10, rtol=0)
        cache.rewind(row, len(rows[row]))
