"""A third state-space model on the dense connection: gated linear attention in one short file.

S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = q_t (S_t + a_t ⊙ Σ_{i≤m} S_t^{l−i}) (arXiv 2312.06635,
with the dense readout of DenseMamba): its features are its states, of shape [B, T, d_k, d_v].
"""

import torch
import torch.nn.functional as F
from torch import nn

from retort.models.dense import FeatureWindow, HiddenFusion, RMSNorm
from retort.ops import reference


class DenseGLALayer(nn.Module):
    def __init__(self, hidden, key_dim, dense):
        super().__init__()
        self.norm = RMSNorm(hidden, 1e-6)
        self.q, self.k, self.alpha = (nn.Linear(hidden, key_dim, bias=False) for _ in range(3))
        self.v, self.gate, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.select = HiddenFusion(hidden, hidden, hidden // 2) if dense else None

    def forward(self, hidden, *earlier):
        x = self.norm(hidden)
        decay = torch.sigmoid(self.alpha(x)).unsqueeze(-1)
        added = self.k(x).unsqueeze(-1) * self.v(x).unsqueeze(-2)
        states = [added[:, 0]]
        for t in range(1, x.shape[1]):
            states.append(decay[:, t] * states[-1] + added[:, t])
        own = torch.stack(states, 1)
        fused = self.select(x.unsqueeze(-2), own, earlier) if self.select and earlier else own
        y = (self.q(x).unsqueeze(-2) @ fused).squeeze(-2)
        return hidden + self.out(y * F.silu(self.gate(x))), own


class DenseGLA(nn.Module):
    def __init__(self, hidden=12, key_dim=5, layers=4, m=2):
        super().__init__()
        self.layers = nn.ModuleList(DenseGLALayer(hidden, key_dim, i and m) for i in range(layers))
        self.m = m

    def forward(self, hidden):
        window = FeatureWindow(self.m)
        for layer in self.layers:
            hidden, states = layer(hidden, *window.flat())
            window.push(states)
        return hidden


def test_a_closed_gate_gives_the_base_model_and_an_open_one_does_not():
    torch.manual_seed(0)
    base, dense = DenseGLA(m=0).double(), DenseGLA(m=2).double()
    dense.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert not torch.allclose(dense(x), base(x))
    for layer in dense.layers[1:]:
        nn.init.zeros_(layer.select.fc2.weight)
    assert torch.equal(dense(x), base(x))
    dense(x).sum().backward()  # a closed gate opens by itself
    assert all(layer.select.fc2.weight.grad.any() for layer in dense.layers[1:])


def test_each_layer_reads_what_the_formula_says():
    torch.manual_seed(0)
    model = DenseGLA().double()
    x = hidden = torch.randn(1, 9, 12, dtype=torch.float64)
    seen = []
    for layer in model.layers:
        normed = layer.norm(hidden)[0]
        own = layer(hidden)[1][0]
        gate = layer.select.gate(normed) if layer.select else torch.zeros_like(normed)
        y = reference.dense_readout(layer.q(normed), own, gate, seen[-2:])
        hidden = hidden + layer.out(y * F.silu(layer.gate(normed)))
        seen.append(own)
    torch.testing.assert_close(model(x), hidden, atol=1e-12, rtol=0)
