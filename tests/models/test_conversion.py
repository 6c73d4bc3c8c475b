"""Published checkpoints: Auto classes, names, what may be missing and what may not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    FalconMambaConfig,
    MambaConfig,
    MambaForCausalLM,
)

import retort  # noqa: F401  registers with the Auto classes
from retort import cli
from retort.errors import ConfigurationError, RetortError
from retort.manifest import MANIFEST, sha256
from retort.models import zoo
from retort.models.conversion import convert
from retort.models.dense_mamba import DenseMambaConfig, DenseMambaForCausalLM
from retort.models.dense_retnet import DenseRetNetForCausalLM
from tests.models import mambas
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


@pytest.fixture
def mamba(tmp_path):
    """A folder of transformers' Mamba with a tokenizer file beside it, and the model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "mamba")
    (tmp_path / "mamba" / "tokenizer.json").write_text("{}")
    return tmp_path / "mamba", model


@torch.no_grad()
def test_convert_writes_a_published_checkpoint_as_dense_retnet(published, tmp_path):
    folder, model = published
    facts = convert(folder, tmp_path / "new" / "ours")
    assert facts["model_type"] == "dense_retnet"
    assert facts["parameters"] == model.num_parameters()
    config = json.loads((tmp_path / "new" / "ours" / "config.json").read_text())
    assert (config["model_type"], config["use_cache"]) == ("dense_retnet", True)
    loaded = zoo.load_model(tmp_path / "new" / "ours", dtype="auto")  # the manifest is checked
    assert type(loaded) is DenseRetNetForCausalLM
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(ids(1, 9)).logits, model(ids(1, 9)).logits)


@torch.no_grad()
def test_convert_makes_a_dense_mamba_that_is_the_mamba(mamba, tmp_path):
    folder, model = mamba
    target = tmp_path / "ours"
    target.mkdir()
    facts = convert(folder, target, "bfloat16", dense_block_layers=1)
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["source"]["model_type"] == "mamba"
    assert manifest["source"]["sha256"]["model.safetensors"] == sha256(folder / "model.safetensors")
    assert manifest["provenance"]["versions"]["torch"]
    assert manifest["changes"] == facts["changes"] == {"dense_block_layers": 1}
    assert (target / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert type(loaded) is DenseMambaForCausalLM and loaded.dtype == torch.bfloat16
    assert loaded.config.dense_block_layers == 1
    tokens, exact = ids(2, 20), model.to(torch.bfloat16).float()
    got = loaded.float()(tokens, use_cache=False).logits
    torch.testing.assert_close(got, exact(tokens).logits, atol=2e-5, rtol=0)
    gates = [w for n, w in loaded.named_parameters() if "fc2" in n]
    assert len(gates) == 2 and not any(w.any() for w in gates)


def test_a_failed_conversion_leaves_nothing(mamba, tmp_path, monkeypatch):
    folder, _ = mamba
    before = sorted(tmp_path.iterdir())

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("retort.models.conversion.write_manifest", fails)
    with pytest.raises(OSError, match="no space"):
        convert(folder, tmp_path / "ours")
    assert sorted(tmp_path.iterdir()) == before


def test_convert_names_what_it_cannot_do(mamba, published, tiny_llama, tmp_path):
    folder, _ = mamba
    with pytest.raises(ConfigurationError, match="exists and is not an empty folder"):
        convert(folder, folder)
    with pytest.raises(ConfigurationError, match=r"holds a 'llama'; convert knows DenseGau"):
        convert(tiny_llama, tmp_path / "a")
    with pytest.raises(ConfigurationError, match="dense_block_layers cannot change"):
        convert(published[0], tmp_path / "a", dense_block_layers=1)
    with pytest.raises(ConfigurationError, match="unknown dtype 'fp7'"):
        convert(folder, tmp_path / "a", "fp7")
    convert(folder, tmp_path / "done")
    with pytest.raises(ConfigurationError, match="holds a dense_mamba already"):
        convert(tmp_path / "done", tmp_path / "a")
    change(folder, backbone__norm_f__weight=None, backbone__surprise=torch.ones(2))
    with pytest.raises(ConfigurationError, match=r"missing: backbone.norm_f.*unexpected: backb"):
        convert(folder, tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(RetortError, match="damaged or not safetensors"):
        convert(folder, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_verb_prints_the_folder_or_json(mamba, tmp_path, capsys):
    folder, _ = mamba
    assert cli.run(["convert", str(folder), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    arguments = ["convert", str(folder), str(tmp_path / "b"), "--dense-block-layers", "4", "--json"]
    assert cli.run(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(tmp_path / "b") and facts["changes"] == {"dense_block_layers": 4}
    assert cli.run(["convert", str(folder), str(tmp_path / "b")]) == 2
    assert "name another target" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["retnet", "mamba"])
def test_our_own_checkpoints_must_be_whole(family, tmp_path):
    """transformers would fill in random numbers; a base model may leave the head unread."""
    model = {"retnet": tiny, "mamba": mambas.tiny}[family]()
    model.save_pretrained(tmp_path)
    gate = "k_select.fc1" if family == "retnet" else "mixer.select.fc1"
    name = next(n for n in model.state_dict() if f"layers.2.{gate}" in n or gate in n)
    change(tmp_path, **{name: None, "surprise": torch.ones(1)})
    with pytest.raises(ConfigurationError, match=r"num_hidden_layers=3.*missing.*unexpected: sur"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    change(tmp_path, **{name: model.state_dict()[name], "surprise": None})
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 3
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 3
    with pytest.raises(ConfigurationError, match="num_hidden_layers=4"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4)


def test_falcon_mamba_is_not_mamba():
    with pytest.raises(
        ConfigurationError, match="a 'falcon_mamba' model; DenseMamba reads 'mamba'"
    ):
        DenseMambaConfig(**FalconMambaConfig(hidden_size=16, num_hidden_layers=1).to_dict())


@pytest.mark.parametrize("family", ["published", "dense_retnet", "dense_mamba"])
def test_a_foreign_configuration_executes_nothing(family, published, tmp_path):
    folder = published[0]
    if family != "published":
        folder = tmp_path / family
        {"dense_retnet": tiny, "dense_mamba": mambas.tiny}[family]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(model, DenseRetNetForCausalLM | DenseMambaForCausalLM)
    zoo.load_model(folder)
    assert not (tmp_path / "canary").exists()
