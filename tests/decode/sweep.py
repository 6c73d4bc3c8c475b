"""Every causal model of transformers that can be made small: a configuration, and its logits."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retort.decode.packed import PackedModel

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ENCODERS = (  # see both ways unless their configuration says `is_decoder`
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl"),
)
_VOCAB = 64
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim",), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("sliding_window", "window_size"), 5),
    **{"vocab_size": _VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "rotary_dim": 8},
    **{"decoder_layers": 2, "num_key_value_heads": 2},
}
_WITHOUT = ((), ("head_dim",), ("sliding_window",), ("head_dim", "sliding_window"))
_ROWS = (3, 9, 14)  # tokens, so that windows of 5 end within two of them


def config_of(name: str, **changes):
    """The first small configuration that transformers takes.

    Raises:
        Exception: it takes none.
    """
    own = CONFIG_MAPPING[name]()
    known = {k: v for k, v in _SIZES.items() if hasattr(own, k)}
    for leave in _WITHOUT:
        try:
            sizes = {k: v for k, v in known.items() if k not in leave}
            return CONFIG_MAPPING[name](**{**sizes, **changes})
        except Exception as found:
            error = found
    raise error


def random_model(config):
    """A model with weights so large that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model


@torch.no_grad()
def own_logits(model):
    """Of each row alone, without a cache, at positions from 0 on as `generate` counts them."""
    return [
        model(
            input_ids=torch.tensor([row]),
            position_ids=torch.arange(len(row))[None],
            use_cache=False,
        ).logits[0]
        for row in rows()
    ]


def packed_logits(model, backend: str):
    """Of all rows together, in two packed passes."""
    target = PackedModel(model, cpu_backend=backend)
    ids = [target.add_row() for _ in rows()]
    passes = [[r[:2] for r in rows()], [r[2:] for r in rows()]]
    parts = []
    for texts in passes:
        counts = [len(t) for t in texts]
        logits = target.forward(list(zip(ids, texts, strict=True)), counts)
        parts.append(logits.split(counts))
    target.close()
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


def rows():
    """Token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in _ROWS]
