"""Teachers: the student's own base behind a switched-off adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.captured import build_teacher
from retort.distill.teachers import AdapterOffTeacher, Teacher
from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer, weights

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def lora(base, targets=("q_proj", "v_proj"), **changes):
    torch.manual_seed(0)
    made = get_peft_model(base, LoraConfig(r=2, target_modules=list(targets), **changes))
    for name, value in made.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would change nothing
            torch.nn.init.normal_(value, std=0.5)
    return made


def student_trainer(folder, student, **changes):
    return DistillTrainer(
        student, config(folder, **changes), None, ROWS, processing_class=tokenizer()
    )


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_the_adapter_off_gives_the_bases_signal(targets):
    student = lora(llama(), targets, lora_dropout=0.5).train()
    sequence = TrainingSequence([5, 6, 7], [8, 9, 10], False, True)
    batch = build_batch([sequence], 0)
    mask = stream_mask(batch, "distilled")
    ours, base = AdapterOffTeacher(student), Teacher(llama())
    found, wanted = (t.signal(batch, mask).rows(0, 3).logits for t in (ours, base))
    assert torch.equal(found, wanted)
    assert student.training and student.active_adapters == ["default"]
    assert any(p.requires_grad for p in student.parameters())


def test_lora_learns_from_its_base_and_leaves_it_as_it_was(tmp_path):
    base, student = weights(llama()), lora(llama())
    before = {n: p.detach().clone() for n, p in student.named_parameters() if "lora" in n}
    run = student_trainer(tmp_path, student, method="kd")
    assert isinstance(run.teacher, AdapterOffTeacher)
    run.train()
    after = dict(student.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in before.items())
    kept = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in after.items()
    }
    for name, value in base.items():
        assert torch.equal(kept[name], value), name
    with student.disable_adapter(), torch.no_grad():
        assert torch.equal(student.eval()(IDS).logits, llama().eval()(IDS).logits)
    losses = [r["loss"] for r in run.state.log_history if "loss" in r]
    assert losses[-1] < losses[0]  # the adapter, made random above, is drawn back to its base


def test_a_base_that_teaches_cannot_revise(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot write"):
        student_trainer(tmp_path, lora(llama()), method="mgsr")


def test_a_named_teacher_comes_before_the_base(tmp_path):
    run = trainer(tmp_path, lora(llama()), llama(3), method="mgsr", scrg_warmup_steps=0)
    assert type(run.teacher) is Teacher
    run.train()


def test_methods_without_a_teacher_have_none(tmp_path):
    assert build_teacher(config(tmp_path, method="sft"), None, llama()) is None
