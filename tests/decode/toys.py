"""Tiny random models of real architectures, and the reference that the engine must equal."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **MOE},
    "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "smollm3": {},
    "stablelm": {},
    "cohere": {},
    "mixtral": MOE,
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "rope_parameters": None, **MOE},
}
FLOAT32_ONLY = {"qwen2_moe", "mixtral", "gpt_oss"}  # transformers' grouped experts


def toy(name: str = "llama", seed: int = 1, dtype=None, **changes):
    """A random model; weights are enlarged so that next tokens are decided, not nearly tied."""
    options = {**BASE, **ARCHITECTURES[name], **changes}
    config = AutoConfig.for_model(name, **{k: v for k, v in options.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    default = torch.float32 if name in FLOAT32_ONLY else torch.float64
    return model.to(dtype or default)


def prompts(sizes=(5, 11, 3, 14, 7), seed=0):
    """Random prompts, each written twice so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() * 2 for n in sizes]


def reference(model, prompt, **options):
    """transformers' own greedy generate at batch 1."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()
