"""Rotary scalings: exact where positions alone decide, within the original length where not."""

import pytest

from retort.decode.engine import Engine
from retort.errors import ConfigurationError
from tests.decode.toys import prompts, reference, toy

NEW, ORIGINAL = 20, 64
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
BOUNDED = ("dynamic", "longrope")


def scaled(kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
    return toy(rope_parameters=rope, num_hidden_layers=2, eos_token_id=None)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_positions_equal_generate_on_ragged_batches(kind):
    model = scaled(kind)
    longest = (5, 11, 3, 20) if kind in BOUNDED else (5, 11, 3, 50)
    texts = prompts(longest)
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    with Engine(model, drafter="prompt-lookup", draft_budget=4, max_batch_size=3) as engine:
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW)] == expected
        assert engine.stats.accepted_tokens > 0


@pytest.mark.parametrize("kind", BOUNDED)
def test_scalings_that_look_at_the_longest_row_end_at_the_original_length(kind):
    with Engine(scaled(kind)) as engine:
        with pytest.raises(ConfigurationError, match=f"context is {ORIGINAL}"):
            engine.generate([[5] * ORIGINAL])
        (out,) = engine.generate([[5] * (ORIGINAL - 4)], max_new_tokens=50)
        assert (len(out.token_ids), out.finish_reason) == (4, "length")
