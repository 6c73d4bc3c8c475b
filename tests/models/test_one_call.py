"""All layers in one native call: the bits of separate calls, the numbers of the naive model."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from retort.cli.env import inspect_model
from retort.decode.packed import PackedModel
from retort.models import dense_mamba, dense_retnet, mamba_native, retnet_native
from retort.ops import native
from tests.models import mambas, retnets

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

RETNETS = {
    "m=0": {"dense_block_layers": 0},
    "norms alone": {"dense_block_layers": 0, "dense_norms": True},
    "m=2": {},
    "no gate": {"dense_gate": False},
    "m beyond the layers": {"dense_block_layers": 5, "num_hidden_layers": 5},
    "one layer": {"num_hidden_layers": 1},
    "odd, with an MLP": {
        "hidden_size": 45, "query_key_dim": 30, "num_attention_heads": 3, "v_factor": 1,
        "mlp_intermediate_size": 37, "intermediate_k_select_scale": 4,
    },
    "wider than a stripe": {"hidden_size": 70, "num_attention_heads": 1, "v_factor": 4},
}  # fmt: skip
MAMBAS = {
    "m=0": {"dense_block_layers": 0},
    "m=2": {},
    "no gate": {"dense_gate": False},
    "m beyond the layers": {"dense_block_layers": 5, "num_hidden_layers": 5},
    "one layer": {"num_hidden_layers": 1},
    "odd, biases": {
        "hidden_size": 45, "state_size": 17, "conv_kernel": 3, "use_bias": True,
        "intermediate_select_scale": 4,
    },
    "more channels than a unit, no bias": {
        "hidden_size": 67, "state_size": 33, "use_conv_bias": False, "residual_in_fp32": False,
    },
    "one tap": {"conv_kernel": 1, "tie_word_embeddings": False},
}  # fmt: skip
FAMILIES = {
    "retnet": (retnets, dense_retnet, retnet_native),
    "mamba": (mambas, dense_mamba, mamba_native),
}
MODELS = [("retnet", name) for name in RETNETS] + [("mamba", name) for name in MAMBAS]


def new_model(family, name):
    changes = {"retnet": RETNETS, "mamba": MAMBAS}[family][name]
    return FAMILIES[family][0].tiny(dtype=torch.float32, **changes)


COUNTS = (1, 2, 5, 17, 40)


def passes(packed, seed):
    """Random passes of four rows, with rejections; logits, states and tapes after each."""
    dice = random.Random(seed)
    rows = [packed.add_row() for _ in range(4)]
    for _ in range(9):
        some = dice.sample(rows, dice.randint(1, 4))
        feeds = [
            (row, [dice.randrange(retnets.VOCAB) for _ in range(dice.choice(COUNTS))])
            for row in some
        ]
        packed.cache.poison()
        logits = packed.forward(feeds, [len(tokens) for _, tokens in feeds])
        yield logits, [packed.cache._copy_out(row)[1:] for row in rows]
        for row, tokens in feeds:
            packed.rewind(row, packed.length(row) - dice.randint(0, min(4, len(tokens))))


def same(a, b):
    """Equal bits, except in pages that hold NaN poison beyond a row's end on both sides."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(("family", "name"), MODELS)
def test_it_has_the_bits_of_separate_calls(family, name, isa, monkeypatch):
    if isa not in native.supported_isas():
        pytest.skip(f"no {isa} here")
    model, module = new_model(family, name), FAMILIES[family][1]
    calls = []
    run = module.run_layers
    monkeypatch.setattr(module, "run_layers", lambda *a: calls.append(1) or run(*a))
    with native.use_isa(isa):
        got = list(passes(packed := PackedModel(model, cpu_backend="native"), 1))
        packed.close()
        assert len(calls) >= len(got)
        monkeypatch.setattr(module, "native_layers", lambda *_: None)
        want = list(passes(packed := PackedModel(model, cpu_backend="native"), 1))
        packed.close()
    for (a, kept_a), (b, kept_b) in zip(got, want, strict=True):
        assert torch.equal(a, b)
        for (state_a, tape_a), (state_b, tape_b) in zip(kept_a, kept_b, strict=True):
            assert same(state_a, state_b)
            assert tape_a.blocks == tape_b.blocks
            assert same(tape_a.keys, tape_b.keys)
            assert same(tape_a.values, tape_b.values)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_say_that_a_step_is_one_call(family, training):
    """Also of a model in training mode: a packed pass evaluates."""
    model = new_model(family, "m=2").train(training)
    for backend, expected in (("native", True), ("torch", False)):
        packed = PackedModel(model, cpu_backend=backend)
        assert packed.backend.facts()["one_call_a_step"] is expected
        packed.close()
        assert not packed.backend.facts()["one_call_a_step"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_line_says_so_too(family, tmp_path):
    new_model(family, "m=2").save_pretrained(tmp_path)
    facts = inspect_model(str(tmp_path))
    assert facts["one_call_a_step"] and facts["variant_modules"] == facts["linears_in_torch"] == {}


def test_another_activation_is_no_one_call():
    model = mambas.tiny(dtype=torch.float32, hidden_act="gelu")
    packed = PackedModel(model, cpu_backend="native")
    assert not packed.backend.facts()["one_call_a_step"]
    packed.close()


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_bits_ignore_the_number_of_threads(family, name):
    model = new_model(family, name)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packed = PackedModel(model, cpu_backend="native")
            results.append(torch.cat([logits for logits, _ in passes(packed, 2)]))
            packed.close()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_it_equals_the_naive_model_in_float64(family, name):
    """Prefill in odd pieces beside another row, then single tokens."""
    model, tokens = new_model(family, name), retnets.ids(61)
    packed = PackedModel(model, cpu_backend="native")
    row, other = packed.add_row(), packed.add_row()
    got = []
    for part in tokens.split([1, 30, 2, 17, *[1] * 11]):
        packed.cache.poison()
        feeds = [(other, [3, 1, 4]), (row, part.tolist())]
        got.append(packed.forward(feeds, [0, len(part)]))
    packed.close()
    want = FAMILIES[family][0].naive_logits(model.double(), tokens).detach()
    scale = 5 / float(want.abs().max())
    torch.testing.assert_close(
        torch.cat(got).double() * scale, want * scale, atol=2e-4, rtol=0
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_change_are_seen(family):
    """Weights packed anew, parameters of other value or storage, a hook on a layer, the end."""
    model, calls = new_model(family, "m=2"), FAMILIES[family][2]._calls
    body = model.base_model
    first, norm = body.layers[0], body.norm if family == "retnet" else body.norm_f
    inner = first.self_attn.group_norm.weight if family == "retnet" else first.mixer.A_log
    linear = first.self_attn.o_proj if family == "retnet" else first.mixer.out_proj
    packed = PackedModel(model, cpu_backend="native")
    seen = []

    def logits():
        seen.append(packed.forward([(packed.add_row(), [1, 2, 3])], [3]))
        return seen[-1]

    logits()
    assert len(calls) == 1
    with torch.no_grad():
        linear.weight.mul_(-1)
        assert torch.equal(logits(), seen[0])  # packed weights are copies
        packed.backend.refresh()
        assert not torch.equal(logits(), seen[1])
        inner.mul_(1.5)
        assert not torch.equal(logits(), seen[2])
    norm.weight.data = norm.weight.data * 2
    assert not torch.equal(logits(), seen[3])
    hooked = []
    hook = first.register_forward_hook(lambda *_: hooked.append(1))
    assert torch.equal(logits(), seen[4])
    hook.remove()
    assert hooked
    packed.close()
    gc.collect()
    assert len(calls) == 0


@pytest.mark.parametrize("change", ["module", "hook", "nothing is packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_core_does_not_know_stays_in_separate_calls(family, change, monkeypatch):
    """A linear layer of another class, a hook inside a layer, generation of a plain model."""
    monkeypatch.setattr(FAMILIES[family][1], "run_layers", None)
    model = new_model(family, "m=2")
    if change == "nothing is packed":
        assert model.generate(retnets.ids(2, 5), max_new_tokens=3).shape == (2, 8)
        return
    layer = model.base_model.layers[1]
    mixer, last = (
        (layer.self_attn, "o_proj") if family == "retnet" else (layer.mixer, "out_proj")
    )  # fmt: skip
    if change == "module":
        other = type("Other", (torch.nn.Linear,), {})
        setattr(mixer, last, other(getattr(mixer, last).in_features, 16, bias=False))
    else:
        mixer.register_forward_hook(lambda *_: None)
    packed = PackedModel(model, cpu_backend="native")
    assert not packed.backend.facts()["one_call_a_step"]
    assert packed.forward([(packed.add_row(), [1, 2, 3])], [1]).isfinite().all()
    packed.close()


@torch.no_grad()
@pytest.mark.parametrize(
    "keep", [0, 1, 3, torch.tensor([4, 0]), torch.tensor([], dtype=torch.long)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_logits_are_those_of_the_whole_pass(family, keep):
    """Values of the toys fill whole panels: the last layer leaves out what nobody wants."""
    model, tokens = new_model(family, "m=2"), retnets.ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1] * 6])
    packed = PackedModel(model, cpu_backend="native")
    whole = model(tokens, attention_mask=mask)
    kept = model(tokens, attention_mask=mask, logits_to_keep=keep)
    more = [model(tokens, past_key_values=x.past_key_values).logits for x in (whole, kept)]
    packed.close()
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    real = mask[:, columns].bool()
    assert torch.equal(kept.logits[real], whole.logits[:, columns][real])
    assert torch.equal(*more)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_rectangles_are_the_same(family):
    model = new_model(family, "m=2")
    packed = PackedModel(model, cpu_backend="native")
    tokens, mask = retnets.ids(2, 6), torch.tensor([[0, 1, 1, 0, 1, 1], [1] * 6])
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask)
        seen = model(tokens, attention_mask=mask, output_hidden_states=True)
        padding = model(tokens[:, :2], attention_mask=torch.zeros(2, 2), use_cache=True)
    packed.close()
    assert len(seen.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(whole.logits[mask.bool()], seen.logits[mask.bool()])
    assert padding.logits.isfinite().all()
