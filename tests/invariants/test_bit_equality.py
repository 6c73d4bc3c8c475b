"""A row's logits are the same bits in any company, and no product of a step is PyTorch's.

Alone and token by token against batches of 2 to 32 rows, prompts cut anywhere, 0 to 8 wrong drafts
verified and taken back in the same passes. Sizes are odd, so that every kernel has remainders.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from retort.cli.env import inspect_model
from retort.decode.engine import Engine
from retort.decode.invariance import variant_modules
from retort.decode.packed import PackedModel
from retort.ops import native
from tests.decode.toys import toy

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

ROWS, LENGTH, VOCAB = 32, 18, 97
ODD = {"hidden_size": 40, "intermediate_size": 72, "head_dim": 14, "num_hidden_layers": 2}
FAMILIES = {
    "llama": ODD,
    "qwen3": ODD,
    "gpt2": {"n_embd": 60, "n_inner": 100, "n_layer": 2},
    "opt": {"hidden_size": 60, "ffn_dim": 100, "word_embed_proj_dim": 60, "num_hidden_layers": 2},
    "gemma2": {**ODD, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "attention", "convolution")


def build(family):
    return toy(family, dtype=torch.float32, **FAMILIES[family])


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request):
    """A packed model, 32 rows of tokens, and each row's logits read alone, token by token."""
    packed = PackedModel(build(request.param), cpu_backend="native")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator).tolist()
    logits = []
    for row_tokens in tokens:
        row = packed.add_row()
        logits.append(torch.cat([packed.forward([(row, [t])], [1]) for t in row_tokens]))
        packed.free_row(row)
    yield packed, tokens, logits
    packed.close()


def steps(data, left):
    """What each row with tokens left brings to a pass: true tokens, then wrong drafts."""
    some = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
    return [(row, data.draw(st.integers(1, 12)), data.draw(st.integers(0, 8))) for row in some]


def layouts(examples):
    def decorate(test):
        return settings(max_examples=examples, deadline=None)(given(data=st.data())(test))

    return decorate


@layouts(5)
def test_logits_in_any_layout_are_the_bits_of_the_row_alone(alone, data):
    read_in_a_drawn_layout(alone, data)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@layouts(60)
def test_logits_in_many_layouts_are_the_bits_of_the_row_alone(alone, threads, data):
    with num_threads(threads):
        read_in_a_drawn_layout(alone, data)


@contextmanager
def num_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_in_a_drawn_layout(alone, data):
    packed, tokens, want = alone
    batch = data.draw(st.integers(2, ROWS))
    rows = {i: packed.add_row() for i in range(batch)}
    try:
        while left := {i for i, row in rows.items() if packed.length(row) < LENGTH}:
            one_pass(packed, rows, tokens, want, steps(data, left))
    finally:
        for row in rows.values():
            packed.free_row(row)


def one_pass(packed, rows, tokens, want, layout):
    feeds, keep, spans = [], [], []
    for i, count, drafts in layout:
        at = packed.length(rows[i])
        true = tokens[i][at : at + count]
        wrong = [(t + 1) % VOCAB for t in range(at, at + drafts)]
        feeds.append((rows[i], [*true, *wrong]))
        keep.append(len(feeds[-1][1]))
        spans.append((i, at, len(true)))
    for (i, at, n), got in zip(spans, packed.forward(feeds, keep).split(keep), strict=True):
        assert torch.equal(got[:n], want[i][at : at + n]), (i, at, n, layout)
        packed.rewind(rows[i], at + n)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "olmo2", "starcoder2"])
def test_no_module_is_named(family, threads):
    odd = {"hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 2}
    model = build(family) if family in FAMILIES else toy(family, dtype=torch.float32, **odd)
    packed = PackedModel(model, cpu_backend="native")
    with num_threads(threads):
        assert variant_modules(packed) == {}


def test_modules_that_depend_on_their_company_are_named():
    packed = PackedModel(toy("mixtral", dtype=torch.float32, num_hidden_layers=2))
    named = variant_modules(packed)
    assert "model.layers.0.mlp.gate" in named, named
    assert not packed.cache.rows and not any(m._forward_hooks for m in packed.model.modules())

    class Company(torch.nn.Module):
        """Adds the mean of everything in the pass."""

        def forward(self, x):
            return x + x.mean()

    model = build("gpt2")
    model.transformer.h[1].mlp.act = Company()
    packed = PackedModel(model, cpu_backend="native")
    assert variant_modules(packed) == {"transformer.h.1.mlp.act": "Company"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_command_line_says_what_runs_natively_and_what_does_not(family, tmp_path):
    model = toy(family, dtype=torch.float32, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    facts = inspect_model(str(tmp_path))
    assert facts["cpu_backend"] == "native" and facts["packed_linears"] > 8
    if family == "llama":
        assert facts["fused_layers"] == 2 and facts["one_call_a_step"]
        assert facts["variant_modules"] == facts["linears_in_torch"] == {}
    else:
        assert any("expert" in name for name in facts["linears_in_torch"])
        assert facts["variant_modules"]["model.layers.0.mlp.gate"] == "MixtralTopKRouter"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_of_a_decode_step_is_pytorchs(family):
    with Engine(build(family), cpu_backend="native", drafter="prompt-lookup") as engine:
        for prompt in ([5, 6, 7, 5, 6], [8, 9, 10, 8, 9, 10, 8], [11]):
            engine.add_request(prompt)
        engine.step()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(3):
                engine.step()
        names = {event.key for event in seen.key_averages()}
    assert any(name.startswith("aten::") for name in names)
    assert not {n for n in names if any(n.endswith(p) for p in PRODUCTS)}
