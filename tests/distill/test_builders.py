"""Students built around a teacher: narrower embeddings, warm starts, DenseMamba."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from retort.distill import builders, init
from retort.distill.config import DistillConfig
from retort.errors import ConfigurationError
from tests.decode.toys import toy
from tests.distill.toys import llama, trainer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_narrower_student_has_the_best_embedding_of_its_rank(tied):
    teacher = llama(tie_word_embeddings=tied, dtype=torch.float64)
    student = builders.dense_retnet_student(teacher, 2, hidden_size=20)
    assert student.config.hidden_size == 20
    both = [teacher.get_input_embeddings().weight, teacher.lm_head.weight]
    basis = builders.leading_directions(both, 20)
    torch.testing.assert_close(basis.T @ basis, torch.eye(20, dtype=torch.float64))
    lost = sum((w - w @ basis @ basis.T).square().sum() for w in both)
    left_out = torch.linalg.svdvals(torch.cat(both))[20:].square().sum()
    torch.testing.assert_close(lost, left_out)
    torch.testing.assert_close(student.lm_head.weight.double(), both[1] @ basis)
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tied
    assert student(IDS).logits.isfinite().all()


def test_the_narrowed_norm_keeps_lengths():
    """States inside the kept directions give the teacher's logits through the narrow head."""
    teacher = llama(dtype=torch.float64)
    basis = builders.leading_directions([teacher.lm_head.weight], 8)
    narrow = torch.randn(3, 8, dtype=torch.float64)
    wide = narrow @ basis.T
    head, weight = teacher.lm_head.weight, torch.full((32,), 1.7, dtype=torch.float64)
    rms = [x / x.square().mean(-1, keepdim=True).sqrt() for x in (wide, narrow)]
    ours = (rms[1] * builders._narrowed_norm(weight, basis)) @ (head @ basis).T
    torch.testing.assert_close(ours, (rms[0] * weight) @ head.T)


def retention_matches(attention, retention, heads=4):
    """Our mixer's queries, keys and values against attention's own, element by element."""
    x = torch.randn(3, 32)
    d = 8
    for ours, theirs in (retention.q_proj, attention.q_proj), (retention.k_proj, attention.k_proj):
        mine, own = ours(x).view(3, heads, d), theirs(x).view(3, -1, d)
        for head in range(heads):
            shared = own[:, head * own.shape[1] // heads]
            for i in range(d // 2):
                torch.testing.assert_close(mine[:, head, 2 * i], shared[:, i])
                torch.testing.assert_close(mine[:, head, 2 * i + 1], shared[:, i + d // 2])
    values, own = retention.vg_proj(x)[:, :32].view(3, heads, d), attention.v_proj(x).view(3, -1, d)
    for head in range(heads):
        torch.testing.assert_close(values[:, head], own[:, head * own.shape[1] // heads])
    assert torch.equal(retention.o_proj.weight, attention.o_proj.weight)


def test_a_warm_start_takes_attention_mlp_and_norms_of_evenly_spaced_layers():
    teacher = llama(layers=4)
    student = builders.dense_retnet_student(teacher, 2, warm_start=True)
    for new, old in zip(student.model.layers, (0, 3), strict=True):
        layer = teacher.model.layers[old]
        retention_matches(layer.self_attn, new.self_attn)
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            pairs = zip(
                getattr(new, name).parameters(), getattr(layer, name).parameters(), strict=True
            )
            assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    fused = student.model.layers[1].self_attn
    assert not fused.k_select.fc2.weight.any() and not fused.v_select.fc2.weight.any()
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight)


def test_a_warm_student_with_silent_retention_is_the_teachers_mlps():
    """With W_o at zero only the MLPs are left, and they are those of the teacher."""
    teacher = llama(layers=3, dtype=torch.float64)
    student = builders.dense_retnet_student(teacher, 3, warm_start=True)
    for layer in (*teacher.model.layers, *student.model.layers):
        layer.self_attn.o_proj.weight.data.zero_()
    torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_warm_start_refuses_what_is_not_like_llama(name):
    with pytest.raises(ConfigurationError, match="warm_start"):
        builders.dense_retnet_student(toy(name), 2, warm_start=True)


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=3, eos_token_id=0)
    ).eval()


def test_a_dense_mamba_student_has_the_teachers_embedding_and_head():
    teacher = llama()
    student = builders.dense_mamba_student(teacher, 2, state_size=4)
    assert student.config.model_type == "dense_mamba" and student.config.num_hidden_layers == 2
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    torch.testing.assert_close(student.backbone.norm_f.weight, 0.1 * teacher.model.norm.weight)


def test_a_dense_mamba_started_from_all_layers_of_a_mamba_is_that_mamba():
    teacher = mamba()
    student = builders.dense_mamba_student(teacher, 3, warm_start=True, dense_block_layers=2)
    torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=2e-5, atol=2e-5)
    cut = builders.dense_mamba_student(teacher, 2, warm_start=True)
    ours, theirs = cut.backbone.layers[1].mixer, teacher.backbone.layers[2].mixer
    assert torch.equal(ours.in_proj.weight, theirs.in_proj.weight)


def test_a_dense_mamba_cannot_start_from_a_transformer():
    with pytest.raises(ConfigurationError, match="starts from a Mamba"):
        builders.dense_mamba_student(llama(), 2, warm_start=True)


@pytest.mark.parametrize("values", [{"student_type": "rwkv"}, {"warm_start": True}])
def test_a_wrong_kind_of_student_is_refused(tmp_path, values):
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values)


@pytest.mark.parametrize("kind", ["dense_mamba", "dense_retnet"])
def test_a_built_student_is_distilled(tmp_path, kind):
    settings = {"student_type": kind, "student_num_hidden_layers": 2, "method": "mgsr"}
    more = {"warm_start": kind == "dense_retnet"}
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, **settings, **more)
    run = trainer(tmp_path, init.build_student(config, llama()), max_steps=2, method="mgsr")
    run.train()
    assert run.state.global_step == 2
