"""Toy DenseRetNets, and their naive forward pass token by token."""

import torch
import torch.nn.functional as F

from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM
from retort.ops import reference
from retort.ops.retention import log_decay

VOCAB = 31


def tiny(seed=0, dtype=torch.float64, **changes):
    """A toy model in evaluation mode whose every weight matters (norms and gates perturbed)."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "query_key_dim": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_k_select_scale": 2,
        "intermediate_v_select_scale": 8,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model = DenseRetNetForCausalLM(DenseRetNetConfig(**(sizes | changes))).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
    return model.eval()


def ids(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def naive_logits(model, tokens):
    """Logits ``[T, V]`` of one sequence, from the formulas and the weights alone."""
    config, weights = model.config, dict(model.named_parameters())
    h = weights["model.embed_tokens.weight"][tokens]
    features = []
    for layer in range(config.num_hidden_layers):
        w = {
            name.removeprefix(f"model.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        out, k, v = naive_block(config, w, norm(h, w["input_layernorm.weight"]), features)
        features.append((k, v))
        h = h + out
        if "mlp.up_proj.weight" in w:
            x = norm(h, w["post_attention_layernorm.weight"])
            up = F.silu(x @ w["mlp.gate_proj.weight"].T) * (x @ w["mlp.up_proj.weight"].T)
            h = h + up @ w["mlp.down_proj.weight"].T
    return norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def naive_block(config, w, x, features):
    w = {name.removeprefix("self_attn."): weight for name, weight in w.items()}
    heads = config.num_attention_heads
    q, k = F.silu(x @ w["q_proj.weight"].T), F.silu(x @ w["k_proj.weight"].T)
    k = k / (k.shape[1] // heads) ** 0.5
    v, g = F.silu(x @ w["vg_proj.weight"].T).chunk(2, -1)
    own = {"k": k, "v": v}
    earlier = features[-config.dense_block_layers :] if config.dense_block_layers else []
    fused = dict(own)
    for i, name in enumerate("kv"):
        if earlier and not config.dense_gate:
            fused[name] = own[name] + sum(f[i] for f in earlier)
        elif earlier:
            gate = w[f"{name}_select.fc1.weight"], w[f"{name}_select.fc2.weight"]
            fused[name] = reference.hidden_fusion(x, own[name], [f[i] for f in earlier], *gate)
        if f"{name}_norm.weight" in w:
            fused[name] = norm(fused[name], w[f"{name}_norm.weight"])
    q, k = (turn(t.unflatten(-1, (heads, -1))) for t in (q, fused["k"]))
    gamma = log_decay(heads, x.dtype).exp().tolist()
    o = reference.retention_sum(q, k, fused["v"].unflatten(-1, (heads, -1)), gamma)
    y = norm(o, w["group_norm.weight"]).flatten(1) * g
    return y @ w["o_proj.weight"].T, own["k"], own["v"]


def norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x):
    """Interleaved rotary of ``[T, H, d]``, token by token."""
    dim = x.shape[-1]
    rows = []
    for t in range(len(x)):
        row = x[t].clone()
        for i in range(dim // 2):
            angle = torch.tensor(t, dtype=x.dtype) * 10000 ** (-i / max(dim // 2 - 1, 1))
            even, odd = x[t, :, 2 * i], x[t, :, 2 * i + 1]
            row[:, 2 * i] = even * angle.cos() - odd * angle.sin()
            row[:, 2 * i + 1] = odd * angle.cos() + even * angle.sin()
        rows.append(row)
    return torch.stack(rows)
