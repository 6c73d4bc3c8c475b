"""Published checkpoints: Auto classes, names, what may be missing and what may not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import retort  # noqa: F401  registers with the Auto classes
from retort.errors import ConfigurationError
from retort.models.dense_retnet import DenseRetNetForCausalLM
from tests.models.retnets import ids, tiny


@pytest.fixture
def published(tmp_path):
    """A checkpoint in the authors' layout, written from one of our models."""
    model = tiny()
    names = {".vg_proj.": ".to_hidden.0.", ".o_proj.": ".to_out.0."}
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = weight.clone()
    for part in ("k_norm.weight", "v_norm.weight", "k_select.fc1.weight", "v_select.fc2.weight"):
        weights[f"model.layers.0.self_attn.{part}"] = torch.ones(3, 3)
    weights["model.retnet_rel_pos.angle"] = torch.ones(2)
    weights["model.retnet_rel_pos.decay"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "model_type": "DenseGauRetNet",
        "architectures": ["DenseGauRetNetForCausalLM"],
        "retnorm": False,
        "use_cache": False,
        "deepnorm": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, model


def change(folder, **changes):
    """Replace weights by name with ``__`` for a dot; None removes."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in changes.items():
        name = name.replace("__", ".")
        weights.pop(name, None)
        if weight is not None:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_loads_through_the_auto_classes_and_saves_as_dense_retnet(published, tmp_path):
    folder, model = published
    assert AutoConfig.from_pretrained(folder).model_type == "DenseGauRetNet"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = ids(2, 20)
    assert loaded.generation_config.use_cache and loaded.config.use_cache
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "dense_retnet"
    assert config["architectures"] == ["DenseRetNetForCausalLM"]
    assert set(load_file(saved / "model.safetensors")) == set(model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert type(again) is DenseRetNetForCausalLM
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


def test_missing_and_unknown_weights_are_errors(published):
    folder, _ = published
    change(folder, model__layers__1__self_attn__k_norm__weight=None)
    with pytest.raises(ConfigurationError, match=r"missing: model\.layers\.1\.self_attn\.k_norm"):
        AutoModelForCausalLM.from_pretrained(folder)
    shutil.copy(folder / "model.safetensors", folder / "kept")
    change(
        folder,
        model__layers__1__self_attn__k_norm__weight=torch.ones(8),
        model__layers__1__surprise=torch.ones(2),
    )
    with pytest.raises(ConfigurationError, match=r"unexpected: model\.layers\.1\.surprise"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_foreign_configuration_executes_nothing(published, tmp_path):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(model, DenseRetNetForCausalLM) and not (tmp_path / "canary").exists()
