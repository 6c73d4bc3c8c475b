"""The trainer: terms, normalisation, sources, log, evaluation and its refusals."""

import json

import pytest
import torch
from transformers import TrainerCallback

from retort import report
from retort.distill.builders import dense_retnet_student
from retort.distill.hidden import HeadlessModel
from retort.distill.losses import IGNORED
from retort.distill.presets import PRESETS
from retort.distill.sequences.replay import ReplayBuffer
from retort.distill.sequences.sources import Sources
from retort.errors import ConfigurationError, RetortError
from tests.decode.toys import toy
from tests.distill.toys import (
    FULL_BUFFER,
    ROWS,
    config,
    llama,
    record_accepted,
    record_texts,
    tokenizer,
    trainer,
    weights,
)


def logged(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def first_batch(run, index=0):
    """One batch of the data loader, as the student's step would see it."""
    batches = iter(run.get_train_dataloader())
    window, _ = run.get_batch_samples(batches, 1, run.args.device)
    return window[0]


def logits(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.double()


# Losses


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


# Models


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


# Sources


def test_lmbda_is_the_share_that_the_student_writes(tmp_path):
    chosen = Sources(recipe("kd", lmbda=0.3), None, seed=5)
    import random

    drawn = [chosen._choose(random.Random(f"{step}")) for step in range(2000)]
    assert drawn.count("student") / len(drawn) == pytest.approx(0.3, abs=0.04)
    assert set(drawn) == {"student", "dataset"}


def test_the_choice_depends_on_seed_step_and_row_alone(tmp_path):
    mixed = {"method": "kd", "lmbda": 0.5, "per_device_train_batch_size": 8}
    runs = [trainer(tmp_path, seed=seed, **mixed) for seed in (1, 1, 2)]
    torch.rand(3)  # other users of randomness do not matter
    batches = [first_batch(run) for run in runs]
    assert torch.equal(batches[0]["targets"], batches[1]["targets"])
    sources = [run.meter.sums["source/student"] for run in runs]
    assert 0 < sources[0] < 8


def test_replay_uses_what_the_student_wrote_before(tmp_path):
    run = trainer(tmp_path, method="rkl", replay_buffer_size=100, replay_share=0.7, max_steps=6)
    run.train()
    shares = [r.get("source/replay", 0) for r in logged(tmp_path)]
    assert shares[0] == 0 and max(shares) > 0
    assert len(run.rollouts.sources.buffer) == sum(
        r.get("rollout/texts", 0) for r in logged(tmp_path)
    )


def test_a_full_buffer_forgets_the_oldest():
    buffer = ReplayBuffer(2)
    for n in range(5):
        buffer.add([n], [n])
    assert buffer.state_dict()["pairs"] == [[[3], [3]], [[4], [4]]]


def test_revision_starts_after_the_warm_up(tmp_path):
    run = trainer(tmp_path, scrg_warmup_steps=2)
    run.train()
    corrected = [r.get("scrg/corrected", 0) for r in logged(tmp_path) if "loss" in r]
    assert corrected[:2] == [0, 0] and min(corrected[2:]) > 0


@pytest.mark.parametrize("choices", [{"rollout_temperature": 0.05}, {"do_sample": False}])
def test_drafts_do_not_change_what_the_student_writes(tmp_path, monkeypatch, choices):
    """Every token of every step, drawn or likeliest, and so every weight, to the bit."""
    texts, accepted = record_texts(monkeypatch), record_accepted(monkeypatch)
    ends, sizes = [], {"max_completion_length": 32, "max_length": 128}
    for drafter in ("none", "prompt-lookup"):
        made = {"method": "rkl", "rollout_drafter": drafter, **sizes, **choices}
        run = trainer(tmp_path / drafter, **made)
        run.train()
        ends.append(weights(run.model))
        assert bool(accepted) == (drafter != "none")
    assert texts[:4] == texts[4:] and len(texts) == 8 and all(map(len, texts))
    assert sum(accepted) > 0
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


# Records


def test_every_promised_name_is_logged_and_the_report_reads_it(tmp_path):
    run = trainer(tmp_path, eval_dataset=ROWS[:3], eval_strategy="steps", eval_steps=2)
    run.train()
    record = [r for r in logged(tmp_path) if "loss" in r][-1]
    names = [
        "sft",
        "dac",
        "acceptance",
        "span/pairs",
        "source/student",
        "dac/dual",
        "rollout/tokens",
    ]
    names += ["time/rollout", "time/teacher", "time/train"]
    names += [f"dac/{n}" for n in ("coverage", "width", "lower", "upper", "hidden_share")]
    names += ["scrg/corrected", "scrg/regenerated_tokens", "scrg/share_without_error"]
    names += ["scrg/nll_before", "scrg/nll_after", "scrg/nll_change", "scrg/nll_change_low"]
    assert set(names) <= set(record)
    assert record["dac/upper"] - record["dac/lower"] == pytest.approx(record["dac/width"])
    assert (
        record["scrg/per_1000_tokens"]
        == 1000 * record["scrg/corrected"] / (record["rollout/tokens"])
    )
    assert any("span" in r for r in logged(tmp_path))
    held_out = next(r for r in logged(tmp_path) if "eval_loss" in r)
    assert {"eval_sft", "eval_dac", "eval_acceptance"} <= set(held_out)
    records = report.load(tmp_path)
    assert len(records.corrections) == sum(r.get("scrg/corrected", 0) for r in logged(tmp_path))
    assert records.provenance.arguments["method"] == "mgsr"
    assert any(correction.regenerated for correction in records.corrections)


def test_evaluation_weighs_tokens_and_not_batches(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c" * 40}]
    ends = [
        trainer(tmp_path, method="sft", eval_dataset=rows, per_device_eval_batch_size=n).evaluate()
        for n in (1, 2)
    ]
    assert ends[0]["eval_sft"] == pytest.approx(ends[1]["eval_sft"], rel=1e-5)
    assert ends[0]["eval_loss"] == ends[0]["eval_sft"]


def test_acceptance_is_evaluated_for_sft_too_where_a_teacher_is_given(tmp_path):
    run = trainer(tmp_path, method="sft", eval_dataset=ROWS)
    assert 0 < run.evaluate()["eval_acceptance"] < 1


def test_several_evaluation_sets_are_named(tmp_path):
    sets = {"short": ROWS[:2], "long": ROWS[2:]}
    run = trainer(tmp_path, method="sft", eval_dataset=sets)
    assert {"eval_short_sft", "eval_long_sft"} <= set(run.evaluate())


def test_phases_are_timed_and_take_no_longer_than_the_run(tmp_path):
    run = trainer(tmp_path)
    ended = run.train()
    spent = sum(v for r in logged(tmp_path) for k, v in r.items() if k.startswith("time/"))
    assert 0 < spent <= ended.metrics["train_runtime"]
    for record in (r for r in logged(tmp_path) if "loss" in r):
        assert min(record[f"time/{phase}"] for phase in ("rollout", "teacher", "train")) > 0


# Refusals


class Poison(TrainerCallback):
    """Breaks a weight before the third step."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight[7] = float("nan")


def test_a_nan_loss_stops_before_the_optimiser_moves(tmp_path):
    run = trainer(tmp_path, method="sft", callbacks=[Poison()], save_strategy="steps", save_steps=1)
    with pytest.raises(RetortError, match=r"'sft' is nan at step 3") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all(int(s["step"]) == 2 for s in saved["state"].values())
    states = run.optimizer.state_dict()["state"].values()
    assert all(int(s["step"]) == 2 for s in states)
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_nan_gradient_stops_before_the_optimiser_moves(tmp_path):
    run = trainer(tmp_path, method="sft")
    run.model.lm_head.weight.register_hook(lambda g: g * float("nan"))
    before = weights(run.model)
    with pytest.raises(RetortError, match="gradient's norm is nan at step 1"):
        run.train()
    for name, value in weights(run.model).items():
        assert torch.equal(value, before[name])


def test_a_method_that_needs_a_teacher_says_so(tmp_path):
    from retort.distill.trainer import DistillTrainer

    with pytest.raises(ConfigurationError, match="teacher_model_name_or_path"):
        DistillTrainer(
            model=llama(2), args=config(tmp_path), train_dataset=ROWS, processing_class=tokenizer()
        )


def test_bad_rows_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="train_dataset, row 2: column 'completion'"):
        trainer(tmp_path, rows=[ROWS[0], {"prompt": "a", "completion": ""}])


def recipe(method, **changes):
    from dataclasses import replace

    return replace(PRESETS[method], **changes)


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_a_prompt_beyond_either_models_context_is_refused(tmp_path, short):
    models = {short: llama(3, max_position_embeddings=16)}
    rows = [{"prompt": "x" * 20, "completion": "y"}]
    with pytest.raises(ConfigurationError, match=r"the prompt has 20 tokens .* is 16"):
        trainer(tmp_path, rows=rows, **models)


def test_sequences_stay_within_the_shorter_context(tmp_path):
    made = trainer(tmp_path, teacher=llama(3, max_position_embeddings=40))
    assert made.max_length == 40
    assert made.rollouts.sources.writer.limit([1] * 36) == 4
