"""No causal model of transformers is accepted and wrong: packed logits are the model's own."""

import pytest
import torch

from retort.decode.support import check_supported
from retort.errors import UnsupportedModelError
from retort.ops import native
from tests.decode.sweep import (
    ENCODERS,
    TYPES,
    config_of,
    own_logits,
    packed_logits,
    random_model,
)

LARGE = 3e7  # parameters of what transformers gives no small form by these names


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_a_model_is_refused_or_right(name, decoder):
    if decoder and name not in ENCODERS:
        pytest.skip("is always a decoder")
    try:
        config = config_of(name, is_decoder=True) if decoder else config_of(name)
    except Exception as error:
        pytest.skip(f"no small configuration: {type(error).__name__}")
    try:
        check_supported(config)
    except UnsupportedModelError:
        return
    _agree(config)


def _agree(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGE:
        pytest.skip(f"{size} parameters")
    model = random_model(config)
    want = own_logits(model)
    for backend in ("torch", "native") if native.available() else ("torch",):
        for got, row in zip(packed_logits(model, backend), want, strict=True):
            torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-4 * float(row.abs().max()))
