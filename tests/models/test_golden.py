"""The authors' own answers, in float64, by every form."""

import pytest
import torch
from safetensors.torch import load_file

from retort.models.conversion import DenseGauRetNetForCausalLM

CASES = ["dense_retnet_m1", "dense_retnet_m2"]


@pytest.fixture(params=CASES)
def case(request, golden):
    model = DenseGauRetNetForCausalLM.from_pretrained(golden / request.param, dtype=torch.float64)
    return model.eval(), load_file(golden / request.param / "expected.safetensors")


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_every_form_gives_the_recurrent_answer(case):
    model, expected = case
    tokens = expected["input_ids"]
    whole = tokens.shape[1]
    for form in ("parallel", "recurrent", "chunkwise"):
        for size in (1, 7, 64, whole) if form == "chunkwise" else (64,):
            model.config.retention_form, model.config.chunk_size = form, size
            close(
                model(expected["input_ids"], use_cache=False).logits, expected["logits_recurrent"]
            )


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 5, 64])
def test_continuation_gives_the_recurrent_answer(case, piece):
    model, expected = case
    cache, logits = model.new_row_cache(), []
    for tokens in expected["input_ids"].split(piece, 1):
        logits.append(model(tokens, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(logits, 1), expected["logits_recurrent"])


@torch.no_grad()
def test_the_clamped_form_gives_the_parallel_answer(case):
    model, expected = case
    model.config.retention_form = "clamped"
    got = model(expected["input_ids"], use_cache=False).logits
    close(got, expected["logits_parallel"])
    assert (got - expected["logits_recurrent"]).abs().max() > 1e-6


@torch.no_grad()
def test_padding_changes_nothing(case):
    """Left, right and in holes, with and without a cache."""
    model, expected = case
    tokens, want = expected["input_ids"], expected["logits_recurrent"]
    batch, length = tokens.shape
    places = torch.arange(length)
    layouts = [places + 9, places, places + places // 5]
    width = max(int(p[-1]) for p in layouts) + 4
    padded = torch.full((batch, width), 3)
    mask = torch.zeros(batch, width, dtype=torch.long)
    for b in range(batch):
        padded[b, layouts[b]], mask[b, layouts[b]] = tokens[b], 1
    for use_cache in (False, True):
        got = model(padded, attention_mask=mask, use_cache=use_cache).logits
        for b in range(batch):
            close(got[b, layouts[b]], want[b])


@torch.no_grad()
def test_half_precision_keeps_decay_and_angles(case):
    """In bfloat16 only the activations round: every position stays near the exact answer."""
    model, expected = case
    got = model.to(torch.bfloat16)(expected["input_ids"], use_cache=False).logits.double()
    assert (got - expected["logits_recurrent"]).abs().mean() < 0.05 * got.std()
