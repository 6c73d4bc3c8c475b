"""LoRA students and quantised teachers from flags: the command trains, merges, resumes, refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from retort.distill import teachers
from retort.distill.adapters import with_adapter
from retort.distill.run import run
from retort.distill.teachers import AdapterOffTeacher, load_teacher
from retort.errors import ConfigurationError
from retort.models import zoo
from retort.train.arguments import resolved
from tests.distill.toys import ROWS, config, llama, tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, seed in (("teacher", 1), ("student", 2)):
        llama(seed).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def settings(parts, folder, **changes):
    values = {
        "model_name_or_path": str(parts / "student"),
        "teacher_model_name_or_path": str(parts / "teacher"),
        "dataset_name": str(parts / "rows.jsonl"),
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "down_proj"],
        "learning_rate": 1e-2,
    }
    return config(folder, **{**values, **changes})


def merged_by_hand(parts, adapter):
    """W + α/r · B A of every adapted weight."""
    facts = json.loads((adapter / "adapter_config.json").read_text())
    found = load_file(adapter / "adapter_model.safetensors")
    weights = dict(llama(2).named_parameters())
    for name, a in found.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            b = found[name.replace("lora_A", "lora_B")]
            weights[target] = weights[target] + facts["lora_alpha"] / facts["r"] * b @ a
    return weights


@pytest.mark.parametrize("method", ["kd", "mgsr"])
def test_the_command_trains_an_adapter_and_writes_a_whole_student(parts, tmp_path, method):
    folder = run(settings(parts, tmp_path, method=method))
    wanted, found = merged_by_hand(parts, folder / "adapter"), zoo.load_model(folder)
    moved = 0
    for name, value in found.named_parameters():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(value, dict(llama(2).named_parameters())[name])
    assert moved == 4  # two modules of two layers; everything else is the base's, bit for bit
    assert found(IDS).logits.isfinite().all()
    assert zoo.load_tokenizer(folder).eos_token_id == tokenizer().eos_token_id


def test_without_a_teacher_the_base_teaches_from_flags_too(parts, tmp_path, monkeypatch):
    seen = []
    original = AdapterOffTeacher.signal
    monkeypatch.setattr(AdapterOffTeacher, "signal", lambda *a: seen.append(1) or original(*a))
    made = settings(parts, tmp_path, method="kd", teacher_model_name_or_path=None)
    run(made)
    assert seen


@pytest.mark.parametrize("method", ["kd", "mgsr"])
def test_an_adapter_resumes_exactly(parts, tmp_path, method):
    def made(folder):
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "method": method}
        return settings(parts, folder, **changes)

    whole, again = run(made(tmp_path / "whole")), tmp_path / "again"
    again.mkdir()
    os.symlink(whole / "checkpoint-2", again / "checkpoint-2")
    run(made(again))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(again / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name


def test_yaml_and_flags_reach_the_adapter(parts, tmp_path):
    """The whole verb: a YAML file with a flag over it."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(resolved(settings(parts, tmp_path / "out", method="kd"))))
    command = [sys.executable, "-c", "from retort.cli import main; main()", "distill"]
    flags = ["--config", str(file), "--lora_r", "3", "--lora_target_modules", "v_proj", "o_proj"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert facts["r"] == 3 and sorted(facts["target_modules"]) == ["o_proj", "v_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0}, "lora_r"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"lora_dropout": 0.1, "method": "kd"}, "disable_dropout=False"),
        ({"student_type": "dense_retnet", "model_name_or_path": None}, "choose one"),
        ({"teacher_quantization": "2bit"}, "'8bit' or '4bit'"),
    ],
)
def test_what_contradicts_is_named(parts, tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        settings(parts, tmp_path, **changes)


@pytest.mark.parametrize(
    ("named", "adapted"),
    [("q_proj", 2), ("self_attn.q_proj", 2), ("all-linear", 14), (r".*\.1\..*[qk]_proj", 2)],
)
def test_a_single_name_is_a_modules_or_a_pattern(parts, tmp_path, named, adapted):
    """PEFT takes text, not a list, as a pattern of the whole name."""
    made = with_adapter(llama(2), settings(parts, tmp_path, lora_target_modules=[named]))
    assert (
        sum(name.endswith("lora_A.default.weight") for name, _ in made.named_parameters())
        == adapted
    )


def test_unknown_modules_and_a_missing_package_are_named(parts, tmp_path, monkeypatch):
    made = settings(parts, tmp_path / "a", method="kd", lora_target_modules=["q_prj"])
    with pytest.raises(ConfigurationError, match="q_prj"):
        run(made)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"retort-lm\[peft\]"):
        run(settings(parts, tmp_path / "b", method="kd"))


# Quantised teachers


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_teacher_needs_bitsandbytes(parts, tmp_path, monkeypatch, bits):
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    made = settings(parts, tmp_path / "run", method="kd", teacher_quantization=bits)
    with pytest.raises(ConfigurationError, match="pip install bitsandbytes") as caught:
        run(made)
    assert bits in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_teacher_teaches(parts, tmp_path, bits):
    """Near the unquantised teacher, not equal to it, and small in memory."""
    exact = llama(1, hidden_size=64, intermediate_size=128, head_dim=32)  # bitsandbytes blocks
    exact.save_pretrained(tmp_path / "exact")
    tokenizer().save_pretrained(tmp_path / "exact")
    changes = {"use_peft": False, "lora_r": 16, "lora_target_modules": None}
    changes |= {"teacher_model_name_or_path": str(tmp_path / "exact")}
    made = settings(parts, tmp_path / "run", method="kd", teacher_quantization=bits, **changes)
    teacher = load_teacher(made)
    kinds = {type(module).__name__ for module in teacher.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}, kinds
    with torch.no_grad():
        apart = (teacher(IDS).logits.float() - exact(IDS).logits).abs().max().item()
    assert 0 < apart < 0.5 * exact(IDS).logits.abs().max().item()
    before = [p.detach().clone() for p in teacher.parameters()]
    trained = teachers.Teacher(teacher)
    assert trained.model is teacher and not any(p.requires_grad for p in teacher.parameters())
    run(made)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
