"""Native decoder layers against the layers' own forward, over families, passes and rejections."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from retort.decode.packed import PackedModel
from retort.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

SIZES = {
    "vocab_size": 70,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def run(packed):
    """Logits of passes with prefill, drafts, a rejection and rows in changing company."""
    rows = [packed.add_row() for _ in range(2)]
    outs = [packed.forward([(rows[0], range(30)), (rows[1], range(7, 10))], [30, 3])]
    outs.append(packed.forward([(rows[1], [5]), (rows[0], [6, 7, 8])], [1, 3]))
    packed.rewind(rows[0], 31)
    outs.append(packed.forward([(rows[0], [9, 1])], [2]))
    return torch.cat(outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_fused_and_gives_the_models_own_logits(family):
    model = build(FAMILIES[family])
    want = run(PackedModel(model, cpu_backend="torch"))
    packed = PackedModel(model, cpu_backend="native")
    assert len(packed.backend.packing.layers.fused) == 2, packed.backend.packing.layers.skipped
    assert packed.backend.packing.stack is not None, packed.backend.packing.layers.skipped
    torch.testing.assert_close(run(packed), want, atol=1e-4, rtol=1e-4)
    packed.close()
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert torch.equal(run(PackedModel(model, cpu_backend="torch")), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_logits_alone_in_company_and_chunked(family):
    packed = PackedModel(build(FAMILIES[family]), cpu_backend="native")
    tokens = [torch.randint(70, (25,)).tolist() for _ in range(5)]
    alone = []
    for row_tokens in tokens:
        row = packed.add_row()
        alone.append(torch.cat([packed.forward([(row, [t])], [1]) for t in row_tokens]))
        packed.free_row(row)
    rows = [packed.add_row() for _ in tokens]
    chunks = [(0, 20), (20, 21), (21, 25)]
    got = [[] for _ in rows]
    for lo, hi in chunks:
        feeds = [(row, t[lo:hi]) for row, t in zip(rows, tokens, strict=True)]
        outs = packed.forward(feeds, [hi - lo] * len(rows)).split(hi - lo)
        for row, out in zip(rows, outs, strict=True):
            got[row].append(out)
    for parts, want in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(parts), want)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.5)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")),
    ],
    ids=["granite", "gemma2", "llama-gelu"],
)
def test_layers_that_compute_something_else_keep_their_forward(make):
    model = build(make)
    want = run(PackedModel(model, cpu_backend="torch"))
    packed = PackedModel(model, cpu_backend="native")
    assert not packed.backend.packing.layers.fused
    torch.testing.assert_close(run(packed), want, atol=1e-4, rtol=1e-4)


def test_one_native_call_runs_all_layers_of_a_step(monkeypatch):
    packed, calls = PackedModel(build(FAMILIES["qwen3"]), cpu_backend="native"), []
    for name in ("retort_stack", "retort_decoder", "retort_linear", "retort_linear_dense"):
        monkeypatch.setattr(native.library(), name, spy(name, calls))
    run(packed)
    assert calls == ["retort_stack", "retort_linear_dense"] * 3


def spy(name, calls):
    entry = getattr(native.library(), name)

    def call(*args):
        calls.append(name)
        return entry(*args)

    return call


@pytest.mark.parametrize("change", ["a layer", "the body"])
def test_a_body_that_does_something_else_keeps_its_forward(change):
    model = build(FAMILIES["llama"])
    if change == "a layer":
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    else:
        scaled = lambda module, args, out: 3 * out  # noqa: E731
        model.model.norm.register_forward_hook(scaled)
    want = run(PackedModel(model, cpu_backend="torch"))
    packed = PackedModel(model, cpu_backend="native")
    assert packed.backend.packing.stack is None
    assert packed.backend.packing.layers.skipped["model"]
    torch.testing.assert_close(run(packed), want, atol=1e-4, rtol=1e-4)


def test_rows_that_grow_leave_and_return_move_their_buffers():
    """The stack keeps addresses between passes: every way a buffer can move is followed."""
    packed = PackedModel(build(FAMILIES["llama"]), cpu_backend="native")
    tokens = torch.randint(70, (3, 60)).tolist()
    alone = []
    for row_tokens in tokens:
        row = packed.add_row()
        alone.append(packed.forward([(row, row_tokens)], [60]))
        packed.free_row(row)
    rows = [packed.add_row() for _ in tokens]
    for at in range(0, 40, 4):
        feeds = [(row, t[at : at + 4]) for row, t in zip(rows, tokens, strict=True)]
        outs = packed.forward(feeds, [4] * 3).split(4)
        for out, want in zip(outs, alone, strict=True):
            assert torch.equal(out, want[at : at + 4])
    packed.free_row(rows[0])
    rows[0] = packed.add_row()
    packed.forward([(rows[0], tokens[0][:40])], [0])
    packed.cache.select([2, 0, 1])
    order = [tokens[2], tokens[0], tokens[1]], [alone[2], alone[0], alone[1]]
    feeds = [(row, t[40:]) for row, t in enumerate(order[0])]
    for out, want in zip(packed.forward(feeds, [20] * 3).split(20), order[1], strict=True):
        assert torch.equal(out, want[40:])


def test_outside_a_pass_and_with_gradients_the_own_forward_runs():
    model = build(FAMILIES["llama"])
    ids = torch.arange(9)[None]
    with torch.no_grad():
        want = model(ids).logits
    packed = PackedModel(model, cpu_backend="native")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    packed.close()


def test_refresh_follows_new_weights():
    model = build(FAMILIES["qwen3"])
    packed = PackedModel(model, cpu_backend="native")
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    packed.backend.refresh()
    got = run(packed)
    packed.close()
    want = run(PackedModel(model, cpu_backend="torch"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
