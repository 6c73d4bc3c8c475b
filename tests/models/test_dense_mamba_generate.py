"""`generate` of a DenseMamba: with and without cache, from a cache, in chunks."""

import pytest
import torch

from retort.errors import ConfigurationError
from tests.models.mambas import ids, tiny


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=["greedy", "sampling", "beams", "beam sampling"],
)
def test_generate_with_and_without_cache(how):
    model = tiny()
    tokens, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[1, 4:6] = 0, 0
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=25, use_cache=use_cache,
                pad_token_id=0, **how,
            )
        )  # fmt: skip
    assert torch.equal(*outputs) and outputs[0].shape == (3, 45)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_generate_equals_single_rows_and_continues_a_cache(name):
    model = tiny()
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=20, pad_token_id=0)
    single = model.generate(tokens[:1, 7:], max_new_tokens=20, pad_token_id=0)
    assert torch.equal(batch[0, 20:], single[0, 13:])
    cache = {name: model.new_row_cache()}
    half = model.generate(tokens, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **cache)
    assert cache[name].get_seq_length() == 28
    mask = torch.cat([mask, mask.new_ones(2, 9)], 1)
    rest = model.generate(half, attention_mask=mask, max_new_tokens=11, pad_token_id=0, **cache)
    assert torch.equal(rest, batch)
    embeds = model.get_input_embeddings()(tokens[1:])
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(from_embeds[0], batch[1, 20:])


@torch.no_grad()
def test_generation_prefills_in_chunks_and_refuses_other_caches():
    model, tokens = tiny(), ids(2, 21)
    plain = model.generate(tokens, max_new_tokens=8, pad_token_id=0)
    chunked = model.generate(tokens, max_new_tokens=8, pad_token_id=0, prefill_chunk_size=8)
    assert torch.equal(chunked, plain)
    with pytest.raises(ConfigurationError, match="cache_implementation='static'"):
        model.generate(tokens, max_new_tokens=2, pad_token_id=0, cache_implementation="static")
