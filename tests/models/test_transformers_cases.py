"""Cases in which transformers' own state-space models are wrong, and ours exact.

The table of docs/papers/dense_ssm.md. Each test first shows that transformers is still wrong (if
that fails, upstream was repaired: change the table), then that ours is right: with Mamba's own
weights (float32, 2e-5), and as DenseMamba and DenseRetNet against the naive recurrence (float64).
"""

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from retort.models.dense_mamba import DenseMambaForCausalLM
from tests.models import mambas, retnets

VOCAB, LENGTH, CUT = 31, 40, 25
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.1}
JAMBA = {
    "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 1, "mamba_d_state": 8,
    "mamba_dt_rank": 2, "use_mamba_kernels": False, "pad_token_id": 0,
}  # fmt: skip
THEIRS = {
    "Mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=8)),
    "FalconMamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SIZES, state_size=8)),
    "Jamba": lambda: JambaForCausalLM(JambaConfig(**SIZES, **JAMBA)),
}


def made(name):
    """A toy of transformers whose states weigh as in a trained model."""
    torch.manual_seed(3)
    model = THEIRS[name]().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("x_proj.weight"):
                weight.mul_(3)
            if key.endswith("dt_proj.bias"):
                weight.add_(2)
    return model


def ours():
    """Name, model, what each row of `TOKENS` should give, tolerance."""
    theirs = made("Mamba")
    for m in (0, 2):
        model = DenseMambaForCausalLM.from_mamba(theirs, dense_block_layers=m)
        yield f"Mamba's weights, m={m}", model, theirs(TOKENS, use_cache=False).logits, 2e-5
    for kind in (mambas, retnets):
        model = kind.tiny()
        rows = torch.stack([kind.naive_logits(model, row) for row in TOKENS])
        yield model.config.model_type, model, rows, 1e-10


TOKENS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    OURS = {name: rest for name, *rest in ours()}


@pytest.fixture(params=THEIRS, scope="module")
def theirs(request):
    """A model of transformers, and its own logits of a whole pass."""
    model = made(request.param)
    with torch.no_grad():
        return model, model(TOKENS, use_cache=False).logits


def state(output):
    """Its cache, under the name that the model takes."""
    name = "cache_params" if "cache_params" in output else "past_key_values"
    return {name: getattr(output, name)}


def close(got, want, tolerance):
    scale = max(1.0, float(want.abs().max()) / 5)
    torch.testing.assert_close(got, want, atol=tolerance * scale, rtol=0)


def wrong(got, want):
    """Differs far beyond rounding (float32)."""
    return float((got - want).abs().max()) > 1e-3 * float(want.abs().max())


def right(got, want):
    return not wrong(got, want)


@torch.no_grad()
def test_several_tokens_after_a_state(theirs):
    model, want = theirs
    one = model(TOKENS[:, CUT : CUT + 1], **state(model(TOKENS[:, :CUT], use_cache=True))).logits
    assert right(one, want[:, CUT : CUT + 1])  # one token is fine: the case is what it says
    got = model(TOKENS[:, CUT:], **state(model(TOKENS[:, :CUT], use_cache=True))).logits
    assert wrong(got, want[:, CUT:])


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
def test_right_padding_then_more(theirs, with_mask):
    model, want = theirs
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, CUT:] = 0
    past = state(model(TOKENS, attention_mask=mask, use_cache=True))
    if with_mask:
        past["attention_mask"] = torch.cat([mask, mask.new_ones(2, 1)], 1)
    got = model(TOKENS[:, CUT : CUT + 1], **past).logits
    assert wrong(got[0], want[0, CUT : CUT + 1])


@torch.no_grad()
def test_packed_sequences(theirs):
    model, _ = theirs
    parts = TOKENS[:1].split((13, 27), 1)
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    got = model(TOKENS[:1], position_ids=positions, use_cache=False).logits
    assert right(got[:, :13], alone[:, :13]) and wrong(got[:, 13:], alone[:, 13:])


@torch.no_grad()
def test_crop(theirs):
    model, want = theirs
    past = state(model(TOKENS, use_cache=True))
    with pytest.raises(RuntimeError, match="does not track past states"):
        next(iter(past.values())).crop(-9)
    past = state(model(TOKENS[:, :1], use_cache=True))
    (cache,) = past.values()
    cache.activate_past_recording()  # it then crops the convolution's inputs only
    for token in TOKENS[:, 1:].split(1, 1):
        model(token, **past)
    cache.crop(-9)
    assert wrong(model(TOKENS[:, 31:32], **past).logits, want[:, 31:32])


@pytest.fixture(params=OURS)
def mine(request):
    return OURS[request.param]


@torch.no_grad()
def test_ours_is_exact_in_all_of_them(mine):
    model, want, tolerance = mine
    cache = model(TOKENS[:, :CUT], use_cache=True).past_key_values
    close(model(TOKENS[:, CUT:], past_key_values=cache).logits, want[:, CUT:], tolerance)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, CUT:] = 0
    cache = model(TOKENS, attention_mask=mask, use_cache=True).past_key_values
    close(model(TOKENS[:, CUT:], past_key_values=cache).logits[0], want[0, CUT:], tolerance)
    cache = model(TOKENS, use_cache=True).past_key_values
    cache.crop(-9)
    close(model(TOKENS[:, 31:], past_key_values=cache).logits, want[:, 31:], tolerance)
    cache.crop(torch.tensor([30, 35]))
    more = torch.stack([TOKENS[0, 30:35], TOKENS[1, 35:40]])
    got = model(more, past_key_values=cache).logits
    close(got, torch.stack([want[0, 30:35], want[1, 35:40]]), tolerance)
    row = model(TOKENS[:1], use_cache=False).logits
    double = torch.cat([TOKENS[:1], TOKENS[:1, :13]], 1)
    positions = torch.cat([torch.arange(LENGTH), torch.arange(13)])[None]
    got = model(double, position_ids=positions, use_cache=False).logits
    close(got, torch.cat([row, row[:, :13]], 1), tolerance)
    close(row[0], want[0], tolerance)
