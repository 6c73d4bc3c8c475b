"""Tiny real models for the tests of this folder."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def tiny_llama(seed: int, vocab_size: int = 31) -> LlamaForCausalLM:
    """A random Llama in float64 with logits of useful size."""
    return _random(LlamaForCausalLM, LlamaConfig(vocab_size=vocab_size, **_SIZES), seed)


def tiny_gemma2(seed: int) -> Gemma2ForCausalLM:
    """A random Gemma 2, whose logits are soft-capped after the head."""
    config = Gemma2Config(vocab_size=31, head_dim=8, final_logit_softcapping=0.5, **_SIZES)
    return _random(Gemma2ForCausalLM, config, seed)


def _random(cls, config, seed):
    torch.manual_seed(seed)
    model = cls(config).double()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.7)
    return model
