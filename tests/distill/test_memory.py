"""The memory plan against what small models really hold."""

import pytest
import torch
from transformers import LlamaConfig

from retort.distill.memory import Workload, on_meta, plan, rollout_cache, saved_bytes
from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM
from tests.distill.toys import llama

SIZES = {"layers": 4, "hidden_size": 64, "head_dim": 16, "intermediate_size": 160}


def retnet_config(**changes):
    values = {"vocab_size": 97, "hidden_size": 64, "query_key_dim": 32, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 2, "dense_block_layers": 2, "intermediate_v_select_scale": 8}
    return DenseRetNetConfig(**{**values, "intermediate_k_select_scale": 8, **changes})


def models(kind):
    """(a real model, its twin on the meta device)."""
    if kind == "llama":
        real = llama(1, **SIZES)
    else:
        real = DenseRetNetForCausalLM(retnet_config())
    return real, on_meta(real.config, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
def test_weights_gradients_and_moments_are_those_of_a_step(kind):
    real, meta = models(kind)
    optimizer = torch.optim.AdamW(real.parameters())
    real(input_ids=torch.randint(0, 90, (2, 8))).logits.sum().backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    made = plan(meta, None, Workload(2, 8))
    assert made.parameters == sum(p.nbytes for p in real.parameters())
    assert made.gradients == sum(p.grad.nbytes for p in real.parameters())
    assert made.optimizer == sum(v.nbytes for v in moments)
    assert made.teacher == made.rollout_copy == made.rollout_cache == made.gathered_layer == 0


@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
def test_activations_on_the_meta_device_are_those_of_a_real_forward(kind):
    real, meta = models(kind)
    real.train(), meta.train()
    for rows, tokens in ((1, 40), (3, 17)):
        measured = saved_bytes(real, rows, tokens)
        assert saved_bytes(meta, rows, tokens) == pytest.approx(measured, rel=0.15)
    ratio = saved_bytes(meta, 4, 32) / saved_bytes(meta, 2, 32)
    assert ratio == pytest.approx(2, rel=0.1)


def test_checkpointing_keeps_less():
    _, meta = models("llama")
    whole = plan(meta, None, Workload(2, 32, gradient_checkpointing=False)).activations
    kept = plan(meta, None, Workload(2, 32)).activations
    assert whole == saved_bytes(meta, 2, 32)
    assert whole / 4 < kept < whole / 2


def test_the_cache_of_a_rollout_is_what_the_model_holds():
    real, meta = models("llama")
    cache = real(input_ids=torch.randint(0, 90, (3, 20)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert rollout_cache(meta.config, Workload(1, 20, rollout_rows=3), 4) == held


def test_shares_and_the_copy_of_a_sharded_student():
    _, meta = models("llama")
    one, two = (plan(meta, meta, Workload(2, 8, rollout_rows=2, processes=n)) for n in (1, 2))
    assert two.parameters * 2 == one.parameters and two.optimizer * 2 == one.optimizer
    assert two.rollout_copy == two.teacher == one.teacher == one.parameters
    assert one.rollout_copy == 0 and two.gathered_layer > 0
    assert one.total == sum(vars(one).values())


def test_frozen_weights_have_no_gradient():
    _, meta = models("llama")
    meta.requires_grad_(False)
    meta.lm_head.weight.requires_grad_(True)
    made = plan(meta, None, Workload(1, 8))
    assert made.gradients == meta.lm_head.weight.nbytes and made.optimizer == 2 * made.gradients
    assert not meta.model.embed_tokens.weight.requires_grad


def test_thirteen_to_seven_billion_is_planned_without_allocating():
    sizes = {"num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11008}
    student = on_meta(LlamaConfig(num_hidden_layers=32, **sizes))
    made = plan(student, None, Workload(1, 256, processes=8, rollout_rows=4))
    assert all(p.is_meta for p in student.parameters())
    assert made.rollout_copy == pytest.approx(6.74e9 * 2, rel=0.01)  # Llama-2 7B has 6.74e9
    assert made.parameters == pytest.approx(made.rollout_copy / 8, rel=0.01)
