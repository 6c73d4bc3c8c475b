"""bench/peers/to_gguf.py: what transformers reads back is the model that was written."""

import importlib.util

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from retort.errors import ConfigurationError
from tests.conftest import ROOT

SIZES = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 7,
    "rms_norm_eps": 2**-18,  # a number of float32, as the file keeps it
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("to_gguf", ROOT / "bench/peers/to_gguf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_the_file_is_the_model(script, tmp_path, tied):
    ours = model(tie_word_embeddings=tied)
    script.write(ours, tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(theirs.config, name) == getattr(ours.config, name)
    assert theirs.config.rope_parameters["rope_theta"] == 5e4
    read = theirs.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in ours.state_dict().items())
    ids = torch.arange(9)[None]
    assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_the_file_says_what_llama_cpp_reads(script, tmp_path):
    script.write(model(), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    wanted = {"llama.vocab_size": 40, "tokenizer.ggml.model": "none"}
    wanted |= {"tokenizer.ggml.eos_token_id": 7, "llama.rope.dimension_count": 8}
    assert {name: fields[name].contents() for name in wanted} == wanted


def test_rows_that_rotate_together_become_neighbours(script):
    rows = torch.arange(8.0)[:, None]  # two heads of four rows
    assert script.in_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_the_file_cannot_say_is_refused(script, tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    with pytest.raises(ConfigurationError, match="linear rotary"):
        script.write(model(rope_parameters=scaled), tmp_path / "m.gguf")
    with pytest.raises(ConfigurationError, match=r"\[1, 2\]"):
        script.write(model(eos_token_id=[1, 2]), tmp_path / "m.gguf")
