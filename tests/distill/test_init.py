"""Students cut from a model or built around a teacher's embedding and head."""

import pytest
import torch

from retort.distill import builders, init
from retort.distill.config import DistillConfig
from retort.distill.influence import layer_influence, most_influential
from retort.errors import ConfigurationError
from tests.decode.toys import toy
from tests.distill.toys import llama

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def build(tmp_path, teacher=None, **values):
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, method="sft", **values)
    return init.build_student(config, teacher)


def test_layers_are_spread_evenly_with_both_ends():
    assert init.evenly_spaced(30, 4) == [0, 10, 19, 29]
    assert init.evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert init.evenly_spaced(4, 1) == [0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_cut_model_is_the_model_without_the_other_layers(name):
    model = toy(name)
    student = init.cut_layers(model, 2)
    layers = model.get_submodule("transformer.h" if name == "gpt2" else "model.layers")
    kept = [layers[0], layers[3]]
    expected = toy(name, num_hidden_layers=2, layer_types=kinds(model.config))
    expected.load_state_dict(student.state_dict())
    assert torch.equal(student(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    cut = student.get_submodule("transformer.h" if name == "gpt2" else "model.layers")
    for layer, source in zip(cut, kept, strict=True):
        for ours, theirs in zip(layer.parameters(), source.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours is not theirs
    assert torch.equal(student.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert student.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4


def kinds(config):
    """The kinds of attention of layers 0 and 3, where the architecture has kinds."""
    found = getattr(config, "layer_types", None)
    return None if found is None else [found[0], found[3]]


def test_a_cut_of_all_layers_is_the_same_model():
    model = llama(dtype=torch.float64)
    assert torch.equal(init.cut_layers(model, 2)(IDS).logits, model(IDS).logits)


def test_a_cut_keeps_dtype_and_tied_weights():
    model = llama(dtype=torch.bfloat16, tie_word_embeddings=True)
    student = init.cut_layers(model, 1)
    assert student.dtype == torch.bfloat16
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize("count", [0, 3])
def test_a_cut_needs_enough_layers(count):
    with pytest.raises(ConfigurationError, match="2 layers"):
        init.cut_layers(llama(), count)


def test_layers_may_be_named_and_wrong_ones_are_refused(tmp_path, tiny_llama):
    model = llama(layers=4)
    kept = init.keep_layers(model, [0, 1, 3])
    for ours, index in zip(kept.model.layers, (0, 1, 3), strict=True):
        for mine, theirs in zip(
            ours.parameters(), model.model.layers[index].parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)
    values = {"model_name_or_path": str(tiny_llama), "student_layer_indices": [1]}
    assert build(tmp_path, **values).config.num_hidden_layers == 1
    for wrong in ([], [1, 0], [0, 0], [0, 4], [-1, 2]):
        with pytest.raises(ConfigurationError, match="student_layer_indices"):
            init.keep_layers(model, wrong)
    for rival in ({"student_num_hidden_layers": 1}, {"student_type": "dense_retnet"}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(rival))} says otherwise"):
            build(tmp_path, **values, **rival)


def test_influence_finds_the_layer_that_does_nothing():
    model = llama(layers=4)
    idle = model.model.layers[2]
    for weight in (idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    found = layer_influence(model, [[5, 6, 7], [8, 9]])
    assert found[2] == pytest.approx(0, abs=1e-6) and min(found[:2] + found[3:]) > 1e-4
    assert most_influential(found, 3) == [0, 1, 3]
    states = model(torch.tensor([[8, 9]]), output_hidden_states=True).hidden_states
    by_hand = 1 - torch.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert layer_influence(model, [[8, 9]])[1] == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_retnet_student_has_the_teachers_embedding_head_and_norm(tied):
    teacher = llama(tie_word_embeddings=tied)
    student = builders.dense_retnet_student(teacher, 3)
    assert student.config.model_type == "dense_retnet" and student.config.num_hidden_layers == 3
    assert student.config.hidden_size == teacher.config.hidden_size
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    torch.testing.assert_close(student.model.norm.weight, 0.1 * teacher.model.norm.weight)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert student.lm_head.weight is not teacher.lm_head.weight
    assert student(IDS).logits.isfinite().all()


def test_a_student_is_built_as_the_configuration_says(tmp_path):
    values = {"student_type": "dense_retnet", "student_num_hidden_layers": 2}
    student = build(tmp_path, llama(), **values, student_config={"dense_block_layers": 1})
    assert student.config.dense_block_layers == 1 and student.config.num_hidden_layers == 2


def test_a_named_model_is_loaded_and_cut(tmp_path, tiny_llama):
    student = build(tmp_path, model_name_or_path=str(tiny_llama), student_num_hidden_layers=1)
    assert student.config.num_hidden_layers == 1 and student.dtype == torch.float32


def test_frozen_embeddings_take_no_gradient(tmp_path):
    student = build(tmp_path, llama(), student_type="dense_retnet", freeze_embeddings=True)
    student(input_ids=IDS, labels=IDS).loss.backward()
    assert student.model.embed_tokens.weight.grad is None and student.lm_head.weight.grad is None
    assert student.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no student"),
        ({"student_type": "dense_retnet"}, "teacher_model_name_or_path"),
        ({"student_type": "dense_retnet", "model_name_or_path": "x"}, "leave one"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, values, message):
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, None, **values)


@pytest.mark.parametrize("overrides", [{"widht": 3}, {"hidden_size": 64}])
def test_wrong_overrides_are_refused(overrides):
    with pytest.raises(ConfigurationError, match=next(iter(overrides))):
        builders.dense_retnet_student(llama(), 1, **overrides)


def test_dropout_is_switched_off_everywhere():
    model = toy("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    student = builders.dense_retnet_student(llama(), 2, dropout=0.5).train()
    for each in (model, student, llama(attention_dropout=0.5).train()):
        init.disable_dropout(each)
        assert torch.equal(each(IDS).logits, each(IDS).logits)
