"""What a trainer refuses before it starts, and what stops it before the optimiser moves."""

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError, RetortError
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer, weights


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


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_a_prompt_beyond_either_models_context_is_refused(tmp_path, short):
    models = {short: llama(3, max_position_embeddings=16)}
    rows = [{"prompt": "x" * 20, "completion": "y"}]
    with pytest.raises(ConfigurationError, match=r"the prompt has 20 tokens .* is 16"):
        trainer(tmp_path, rows=rows, **models)


def test_a_token_beyond_the_students_embeddings_is_refused(tmp_path):
    """It may stand in the tokenizer: only rows that use it cannot be learned."""
    own = tokenizer()
    own.add_tokens(["<new>"])
    given = {"model": llama(2), "teacher_model": llama(3, vocab_size=259)}
    given |= {"args": config(tmp_path), "processing_class": own}
    assert len(DistillTrainer(train_dataset=ROWS, **given).prepared.train) == len(ROWS)
    with pytest.raises(ConfigurationError, match=r"row 9: the token '<new>' has the id 258"):
        DistillTrainer(train_dataset=[*ROWS, {"prompt": "a", "completion": "<new>"}], **given)


def test_sequences_stay_within_the_shorter_context(tmp_path):
    made = trainer(tmp_path, teacher=llama(3, max_position_embeddings=40))
    assert made.max_length == 40
    assert made.rollouts.sources.writer.limit([1] * 36) == 4


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("compute_metrics", "predict_with_generate"),
        ("compute_loss_func", "set method"),
        ("data_collator", "does not read data_collator"),
        ("peft_config", "use_peft"),
        ("tokenizer", "processing_class"),
    ],
)
def test_keywords_of_other_trainers_are_refused(tmp_path, keyword, said):
    """transformers' would be taken and passed over."""
    with pytest.raises(ConfigurationError, match=said):
        DistillTrainer(
            llama(2),
            config(tmp_path),
            llama(1),
            ROWS,
            processing_class=tokenizer(),
            **{keyword: print},
        )


def test_other_arguments_and_one_model_for_both_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="args is a TrainingArguments"):
        DistillTrainer(
            llama(2),
            TrainingArguments(str(tmp_path), use_cpu=True),
            llama(1),
            ROWS,
            processing_class=tokenizer(),
        )
    model = llama(1)
    with pytest.raises(ConfigurationError, match="are one object"):
        trainer(tmp_path, model, model, method="kd")
