"""Toy DenseMambas, and their naive forward pass token by token."""

import torch
import torch.nn.functional as F

from retort.models.dense_mamba import DenseMambaConfig, DenseMambaForCausalLM
from retort.ops import reference

VOCAB = 31
FORMS = [(form, size) for form in ("chunked", "rescan", "recurrent") for size in (1, 7, 64, 4096)]


def tiny(seed=0, dtype=torch.float64, **changes):
    """A toy model in evaluation mode whose every weight matters (gates and norms perturbed)."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 3,
        "intermediate_select_scale": 2,
        "initializer_range": 0.3,
        "time_step_max": 2.0,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = DenseMambaForCausalLM(DenseMambaConfig(**(sizes | changes))).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith((".D", ".bias", "A_log", "fc2.weight")):
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


def ids(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def naive_logits(model, tokens):
    """Logits ``[T, V]`` of one sequence, from the formulas and the weights alone."""
    config, weights = model.config, dict(model.named_parameters())
    h = weights["backbone.embeddings.weight"][tokens]
    states = []
    for layer in range(config.num_hidden_layers):
        w = {
            name.removeprefix(f"backbone.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"backbone.layers.{layer}.")
        }
        m = config.dense_block_layers
        out, own = naive_mixer(config, w, norm(h, w["norm.weight"]), states[-m:] if m else [])
        states.append(own)
        h = h + out
    head = weights.get("lm_head.weight", weights["backbone.embeddings.weight"])
    return norm(h, weights["backbone.norm_f.weight"]) @ head.T


def naive_mixer(config, w, x, earlier):
    w = {name.removeprefix("mixer."): weight for name, weight in w.items()}
    rank, n = config.time_step_rank, config.state_size
    u, z = (x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)).chunk(2, -1)
    bias = w.get("conv1d.bias", torch.zeros_like(w["D"]))
    u = F.silu(reference.causal_convolution(u, w["conv1d.weight"][:, 0], bias))
    dt, b, c = (u @ w["x_proj.weight"].T).split([rank, n, n], -1)
    dt = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    own = reference.selective_states(-w["A_log"].exp().T, dt, b, u)
    gate = torch.zeros_like(u) if config.dense_gate else torch.ones_like(u)
    if earlier and config.dense_gate:
        gate = F.silu(F.silu(x @ w["select.fc1.weight"].T) @ w["select.fc2.weight"].T)
    y = reference.dense_readout(c, own, gate, earlier) + w["D"] * u
    return (y * F.silu(z)) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0), own


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
