"""Linear layers of a module tree swapped for packed ones and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.packing import PackedLinear, pack_linears

needs_core = pytest.mark.skipif(not native.available(), reason="no native core")
pytestmark = needs_core


def tiny(kind="llama", tied=True):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=24, n_layer=2, n_head=2)).eval()
    config = LlamaConfig(
        vocab_size=70, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(12).view(1, -1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_logits_stay_and_restore_puts_everything_back(kind):
    model = tiny(kind)
    before, tree = model(IDS).logits, dict(model.named_modules())
    names = list(model.state_dict())
    handle = pack_linears(model)
    assert len(handle.packed) == (15 if kind == "llama" else 9)
    assert list(model.state_dict()) == names
    assert list(dict(model.named_modules())) == list(tree)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    handle.restore()
    assert dict(model.named_modules()) == tree
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_release_frees_all_but_the_tied_embedding_and_restore_unpacks(tied):
    model = tiny(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = pack_linears(model, release=True)
    head = model.lm_head.weight
    assert head.is_meta is not tied
    assert all(m.weight.is_meta for n, m in handle.packed.items() if n != "lm_head")
    logits = model(IDS).logits
    handle.restore()
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert all(p.requires_grad for p in model.parameters())


def test_two_packed_layers_that_share_a_weight_share_it_again_after_restore():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    handle = pack_linears(model, release=True)
    assert model[0].weight.is_meta and model[1].weight is model[0].weight
    handle.restore()
    assert model[1].weight is model[0].weight and not model[0].weight.is_meta


def test_one_module_in_two_places_is_packed_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    handle = pack_linears(model)
    assert model[0] is model[1] and isinstance(model[0], PackedLinear)
    handle.restore()
    assert model[0] is layer and model[1] is layer


@torch.no_grad()
def test_refresh_follows_a_weight_update():
    model = tiny()
    handle = pack_linears(model)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    handle.refresh()
    got = model(IDS).logits
    handle.restore()
    torch.testing.assert_close(got, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_original_weights():
    model = tiny()
    handle = pack_linears(model)
    model(IDS, labels=IDS).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    handle.restore()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for a, b in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


def test_released_weights_refuse_gradients_and_refresh():
    model = nn.Sequential(nn.Linear(4, 4))
    handle = pack_linears(model, release=True)
    with pytest.raises(ConfigurationError, match="released"):
        model(torch.randn(1, 4, requires_grad=True))
    with pytest.raises(ConfigurationError, match="released"):
        handle.refresh()


def test_layers_that_are_not_plain_are_named_and_left():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    model.experts = nn.Parameter(torch.zeros(2, 4, 4))
    handle = pack_linears(model)
    assert set(handle.skipped) == {"0", "1", "experts"}
    assert set(handle.packed) == {"2"}
    assert handle.nbytes == 32 * 4 * 4
