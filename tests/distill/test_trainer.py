"""The trainer: the papers' losses, normalised alike whatever the batch, and the models it takes."""

import pytest
import torch

from retort.distill.builders import dense_retnet_student
from retort.distill.hidden import HeadlessModel
from retort.distill.losses import IGNORED
from retort.distill.presets import PRESETS
from tests.decode.toys import toy
from tests.distill.toys import FULL_BUFFER, ROWS, first_batch, llama, logged, trainer, weights


def logits(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.double()


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_the_loss_is_the_papers_formula(tmp_path, method):
    run = trainer(tmp_path, method=method, loss_chunk_size=3)
    batch = first_batch(run)
    loss = run.compute_loss(run.model, batch).item()
    counted = batch["targets"] != IGNORED
    q = logits(run.model, batch)[counted].log_softmax(-1)
    if method == "sft":
        expected = -q.gather(1, batch["targets"][counted][:, None]).mean()
    else:
        p = logits(run.teacher.model, batch)[counted].log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_on_policy_reverse_kl_reads_what_the_student_writes(tmp_path):
    run = trainer(tmp_path, method="rkl", do_sample=False)
    batch = first_batch(run)
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        ids, new = batch["input_ids"][row, :length], int((batch["targets"][row] != IGNORED).sum())
        prompt = ids[None, : length - new]
        written = run.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        assert written[0].tolist() == ids.tolist()
    counted = batch["targets"] != IGNORED
    p, q = (logits(m, batch)[counted].log_softmax(-1) for m in (run.teacher.model, run.model))
    expected = (q.exp() * (q - p)).sum(-1).mean().item()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_mgsr_trains_on_the_dataset_and_on_revised_student_text(tmp_path):
    run = trainer(tmp_path)
    batch = first_batch(run)
    assert batch["supervised"].tolist() == [True, False] * 2
    assert batch["distilled"].tolist() == [False, True] * 2
    assert run.meter.sums["scrg.corrected"] == 2
    counts = run.objective.counts(batch)
    assert counts["sft"] == int((batch["targets"][[0, 2]] != IGNORED).sum())
    assert counts["dac"] == int((batch["targets"][[1, 3]] != IGNORED).sum())


@pytest.mark.parametrize("method", [*PRESETS, "distillm with a full buffer"])
def test_batch_and_accumulation_are_one_thing(tmp_path, method):
    """2 × 4 equals 8 × 1 and 1 × 8 in loss, gradient norm and weights after the last step."""
    changes = FULL_BUFFER if "buffer" in method else {"method": method}
    made = [one_run(tmp_path / str(n), n, **changes) for n in (8, 2, 1)]
    if "buffer" in method:
        sources = [{k for k in r if k.startswith("source/")} for r in logged(tmp_path / "1")]
        assert sources[0] == {"source/student"} and {"source/replay"} in sources
    (loss, norm, end), *others = made
    for other_loss, other_norm, other_end in others:
        assert other_loss == pytest.approx(loss, rel=2e-5)
        assert other_norm == pytest.approx(norm, rel=2e-4)
        for name, value in end.items():
            torch.testing.assert_close(other_end[name], value, rtol=1e-4, atol=2e-5)


def one_run(folder, batch_size, **changes):
    student = llama(2, dtype=torch.float64)
    run = trainer(
        folder,
        student,
        llama(1, dtype=torch.float64),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        **{"max_steps": 2, **changes},
    )
    run.train()
    losses = [(r["loss"], r["grad_norm"]) for r in logged(folder) if "loss" in r]
    return [x for x, _ in losses], [x for _, x in losses], weights(run.model)


def test_methods_differ(tmp_path):
    ends = [one_run(tmp_path / name, 8, method=name)[0][-1] for name in PRESETS]
    assert len({round(loss, 6) for loss in ends}) == len(PRESETS)


def test_training_brings_the_student_closer_to_its_teacher(tmp_path):
    run = trainer(tmp_path, method="kd", max_steps=30, learning_rate=5e-3, eval_dataset=ROWS)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_forward_kl"] < 0.7 * before["eval_forward_kl"]
    assert after["eval_acceptance"] > before["eval_acceptance"]


def test_a_dense_retnet_student_trains_by_mgsr(tmp_path):
    teacher = llama(1)
    torch.manual_seed(0)
    student = dense_retnet_student(teacher, 2)
    before = weights(student)
    run = trainer(tmp_path, student, teacher)
    run.train()
    assert sum(r.get("scrg/corrected", 0) for r in logged(tmp_path)) > 0
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, before[n])]
    assert any("self_attn" in n for n in moved)
    assert torch.equal(teacher.lm_head.weight, llama(1).lm_head.weight)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_vocabularies_may_be_padded_differently(tmp_path, wider):
    sizes = {"teacher": 258, "student": 258} | {wider: 264}
    student, teacher = llama(2, vocab_size=sizes["student"]), llama(1, vocab_size=sizes["teacher"])
    run = trainer(tmp_path, student, teacher, max_steps=2)
    run.train()
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in logged(tmp_path) if "loss" in r)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "cohere"])
def test_hidden_states_and_head_make_the_models_logits(name):
    model = toy(name, **({"logits_scaling": 2.0} if name == "granite" else {}))
    headless = HeadlessModel(model)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ours = headless.head(headless.hidden(ids, mask))
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-12, atol=1e-12)
    assert headless.plain == (name in ("llama", "gpt2"))  # the others scale or cap their logits


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = trainer(tmp_path / "a"), trainer(tmp_path / "b", gradient_checkpointing=True)
    plain.train()
    saving.train()
    for name, value in weights(plain.model).items():
        assert torch.allclose(weights(saving.model)[name], value, atol=1e-6), name


def test_dropout_is_off_unless_asked_for(tmp_path):
    assert (
        trainer(tmp_path, llama(2, attention_dropout=0.5))
        .model.model.layers[0]
        .self_attn.attention_dropout
        == 0
    )
    kept = trainer(tmp_path, llama(2, attention_dropout=0.5), disable_dropout=False)
    assert kept.model.model.layers[0].self_attn.attention_dropout == 0.5
