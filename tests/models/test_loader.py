"""The central loader: what a foreign folder may not do."""

import json
import shutil

import pytest
import torch

from retort.errors import ConfigurationError, RetortError
from retort.manifest import write_manifest
from retort.models import zoo


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def refused(folder, pattern, error=RetortError):
    with pytest.raises(error, match=pattern) as caught:
        zoo.load_model(folder)
    assert "\n" not in str(caught.value)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
        ("auto", torch.float32),
    ],
)
def test_dtype(folder, dtype, expected):
    model = zoo.load_model(folder, dtype=dtype)
    assert model.dtype == expected
    assert not model.training


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ({"foo": 1}, r"keywords \{'foo': 1\}: .*'foo'"),
        ({"attn_implementation": 5}, r"keywords \{'attn_implementation': 5\}"),
        ({"max_position_embeddings": "x"}, "'max_position_embeddings' expected int"),
        ({"dtype": 5}, "unknown dtype 5"),
    ],
)
def test_a_keyword_that_fits_nothing_is_the_callers_error(folder, keyword, said):
    with pytest.raises(RetortError, match=said) as caught:
        zoo.load_model(folder, **keyword)
    assert "\n" not in str(caught.value)


def test_an_outline_says_what_the_model_would(folder):
    model, outline = zoo.load_model(folder), zoo.load_outline(folder)
    assert outline.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert outline.config.to_dict().keys() == model.config.to_dict().keys()
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    for made in (zoo.load_model(folder), zoo.load_outline(folder)):
        assert made.generation_config.eos_token_id == [5, 6]
    assert zoo.load_outline(folder, max_position_embeddings=7).config.max_position_embeddings == 7


def test_a_model_at_hand_is_one_that_nothing_is_fetched_for(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "cache"))
    assert zoo.is_at_hand(str(folder))
    assert not any(map(zoo.is_at_hand, ("", "nobody/nothing", "no such folder")))


def test_unknown_dtype(folder):
    with pytest.raises(ConfigurationError, match=r"unknown dtype 'fp7'; one of auto, float32"):
        zoo.load_model(folder, dtype="fp7")


def test_pickles_are_refused_and_not_run(folder, tmp_path):
    canary = tmp_path / "canary"

    class Run:
        def __reduce__(self):
            return (canary.touch, ())

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Run()}, folder / "pytorch_model.bin")
    refused(folder, r"only pickled weights \(pytorch_model.bin\)")
    assert not canary.exists()


def test_link_out_of_the_folder_is_refused(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "link out of its folder")


def test_link_inside_the_folder_is_fine(folder):
    weights = folder / "model.safetensors"
    before = zoo.load_model(folder).state_dict()
    weights.rename(folder / "blob")
    weights.symlink_to("blob")
    for name, weight in zoo.load_model(folder).state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(folder, "damaged or not safetensors")


@pytest.mark.parametrize("position", [0, 3, 9])
def test_flipped_bit_in_the_header(folder, position):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[position] ^= 0x20
    weights.write_bytes(data)
    refused(folder, "damaged or not safetensors|cannot load|lacks")


def test_flipped_bit_in_a_weight_is_found_by_the_manifest(folder):
    write_manifest(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(folder, "model.safetensors does not have the hash of its manifest")


def test_auto_map_runs_nothing(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    change_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    refused(folder, "cannot load the model")
    assert not canary.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_config_cannot_name_a_kernel(folder, key):
    change_config(folder, **{key: "someone/kernel"})
    refused(folder, "asks to run code from 'someone/kernel'")
    change_config(folder, **{key: None}, text_config={"_experts_implementation": "someone/else"})
    refused(folder, "asks to run code from 'someone/else'")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "missing.safetensors"])
def test_index_that_leaves_the_folder(folder, shard):
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "which is not in its folder")


def test_index_that_is_none(folder):
    (folder / "model.safetensors.index.json").write_text("[1]")
    refused(folder, "not a safetensors index")


def test_missing_weights_are_an_error_not_random_numbers(folder):
    change_config(folder, num_hidden_layers=3)
    refused(folder, r"lacks \d+ weights that the model needs, model.layers.2")


def test_wrong_sizes(folder):
    change_config(folder, intermediate_size=48)
    refused(folder, "cannot load the model")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff"])
def test_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_config_loads_without_weights_being_read(folder, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    assert zoo.load_config(folder).num_hidden_layers == 2
    change_config(folder, model_type="no_such_type")
    with pytest.raises(RetortError, match="no_such_type") as caught:
        zoo.load_config(folder)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(folder):
    with pytest.raises(RetortError, match="cannot load the tokenizer") as caught:
        zoo.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
