"""DenseMamba's weights: Mamba's checkpoints, its own, and where they start."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from retort.models.dense_mamba import DenseMambaConfig, DenseMambaForCausalLM, DenseMambaModel
from tests.models.mambas import VOCAB, close, ids, tiny


def mamba(**changes):
    """transformers' own Mamba at toy size, with decided logits."""
    torch.manual_seed(3)
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=4, **changes
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(5)
        for layer in model.backbone.layers:
            layer.mixer.x_proj.weight.mul_(4)  # states weigh as in a trained model
            layer.mixer.dt_proj.bias.add_(2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_mamba_checkpoint_keeps_its_logits(m, tied, tmp_path):
    """From a model in memory, from its folder, and loaded by the class itself."""
    theirs, tokens = mamba(tie_word_embeddings=tied, use_bias=not tied), ids(2, 70)
    want = theirs(tokens, use_cache=False).logits
    theirs.save_pretrained(tmp_path)
    models = [
        DenseMambaForCausalLM.from_mamba(theirs, dense_block_layers=m),
        DenseMambaForCausalLM.from_mamba(tmp_path, dense_block_layers=m),
        DenseMambaForCausalLM.from_pretrained(tmp_path, dense_block_layers=m),
    ]
    for ours in models:
        assert ours.config.dense_block_layers == m and ours.config.model_type == "dense_mamba"
        for form in ("chunked", "rescan", "recurrent"):
            ours.config.scan_form = form
            close(ours(tokens, use_cache=False).logits, want, 2e-5)
        close(ours(tokens, use_cache=True).logits, want, 2e-5)
    assert want.abs().max() > 2


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    model, tokens = tiny(tie_word_embeddings=tied, chunk_size=9), ids(2, 12)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DenseMambaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base = DenseMambaModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.backbone(tokens).last_hidden_state)
    loaded.resize_token_embeddings(VOCAB + 5)
    assert loaded(tokens).logits.shape[-1] == VOCAB + 5


def test_initial_weights_are_mambas_and_the_gate_is_zero():
    torch.manual_seed(0)
    config = {"vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 3}
    ours = DenseMambaForCausalLM(DenseMambaConfig(**config))
    theirs = dict(MambaForCausalLM(MambaConfig(**config)).named_parameters())
    for name, weight in ours.named_parameters():
        if "fc2" in name:
            assert not weight.any()
        elif "fc1" not in name:
            close(weight.mean(), theirs[name].mean(), 0.3)
            close(weight.norm(), theirs[name].norm(), 0.1 * theirs[name].norm().item())
