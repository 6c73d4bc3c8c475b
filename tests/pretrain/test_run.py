"""`retort pretrain`: recipes, exact resume, evaluation that counts every token."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from retort.cli.flags import parse_flags
from retort.errors import ConfigurationError
from retort.models import zoo
from retort.pretrain.config import PretrainConfig
from retort.pretrain.run import build_trainer, run
from retort.train import checkpoint
from retort.train.arguments import resolved
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
COMMAND = [sys.executable, "-c", "from retort.cli import main; main()", "pretrain", "--config"]
TEXT = "the old house in the street where a cat sat on the mat and we know it is green"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) + f" {i}." for i in range(24)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def config(folder, texts, **changes):
    values = {
        "output_dir": str(folder),
        "model_type": "dense_retnet",
        "model_config": {
            **{"hidden_size": 16, "num_hidden_layers": 3, "intermediate_v_select_scale": 4},
            **{"dense_block_layers": 1, "dropout": 0.1},
        },
        "tokenizer_vocab_size": 280,
        "dataset_name": str(texts),
        "eval_dataset_name": str(texts),
        "max_eval_rows": 5,
        "block_size": 17,
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return PretrainConfig(**{**values, **changes})


def final(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    """Records of losses, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    timed = ("tokens_per", "eta", "train_", "eval_runtime", "eval_samples", "eval_steps")
    return [
        {k: v for k, v in line.items() if not k.startswith(timed)}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]


def assert_equal_weights(left, right):
    ours, theirs = final(left), final(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_trains(recipe, texts, tmp_path):
    small = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--block_size", "16"]
    small += ["--tokenizer_vocab_size", "270", "--dataset_name", str(texts), "--use_cpu", "true"]
    small += ["--output_dir", str(tmp_path), "--eval_dataset_name", str(texts)]
    small += ["--warmup_steps", "1", "--disable_tqdm", "true", "--logging_steps", "1"]
    made = parse_flags(PretrainConfig, ["--config", str(recipe), *small], "retort pretrain")
    full = dict(made.model_config)
    made.model_config = {**full, "hidden_size": 32, "num_hidden_layers": 2}
    folder = run(made)
    model = zoo.load_model(str(folder))
    assert model.config.dense_block_layers == full["dense_block_layers"]
    records = log(folder)
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert math.isfinite(records[-1]["eval_perplexity"])


def test_a_pair_of_recipes_has_models_of_equal_size():
    from transformers import AutoConfig, AutoModelForCausalLM

    for family in ("retnet", "mamba"):
        sizes = []
        for name in (family, f"dense_{family}"):
            recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
            with torch.device("meta"):
                found = AutoConfig.for_model(
                    recipe["model_type"],
                    **{**recipe["model_config"], "vocab_size": recipe["tokenizer_vocab_size"]},
                )
                model = AutoModelForCausalLM.from_config(found)
            sizes.append(sum(p.numel() for p in model.parameters()))
        assert abs(sizes[0] / sizes[1] - 1) < 0.02, (family, sizes)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_stopped_goes_on_exactly(texts, tmp_path, step):
    whole = run(config(tmp_path / "whole", texts))
    again = tmp_path / "again"
    again.mkdir()
    (again / f"checkpoint-{step}").symlink_to(whole / f"checkpoint-{step}")
    run(config(again, texts))
    assert_equal_weights(whole, again)
    assert log(again)[-1] == log(whole)[-1]


def test_the_command_killed_in_the_middle_goes_on_exactly(texts, tmp_path):
    changes = {"max_steps": 30, "save_steps": 3}
    changes |= {"model_type": "dense_mamba", "model_config": {"hidden_size": 8, "state_size": 2}}
    changes["model_config"] |= {"num_hidden_layers": 3}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(resolved(config(broken, texts, **changes))))
    command = [*COMMAND, str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ends = time.monotonic() + 280
    while not (broken / "checkpoint-6").is_dir():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (broken / "model.safetensors").exists()
    assert checkpoint.step_of(checkpoint.newest(broken)) < 30
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(broken)
    run(config(whole, texts, **changes))
    assert_equal_weights(whole, broken)
    assert log(whole) == log(broken)


def test_evaluation_counts_every_token_once(texts, tmp_path):
    """Against one pass over each block by hand, with a last block that is short."""
    made = config(tmp_path, texts, max_steps=1, per_device_eval_batch_size=3)
    trainer = build_trainer(made)
    found = trainer.evaluate()
    trainer.model.eval()
    total, count = 0.0, 0
    for i in range(len(trainer.eval_dataset)):
        ids = torch.from_numpy(trainer.eval_dataset[i]["input_ids"]).long()[None]
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits.double(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert len(ids[0]) < made.block_size  # the last one
    assert found["eval_tokens"] == count == len(trainer.eval_dataset.stream) - 1
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()][:5]
    size = sum(len(row) for row in rows)
    assert found["eval_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    words = sum(len(row.split()) for row in rows)
    assert found["eval_word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)


def test_a_batch_in_one_and_in_pieces_train_alike(texts, tmp_path):
    plain = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_v_select_scale": 4}
    changes = {"model_config": plain, "max_steps": 3, "save_strategy": "no"}
    one, pieces = tmp_path / "one", tmp_path / "pieces"
    run(config(one, texts, **changes, per_device_train_batch_size=4, gradient_accumulation_steps=1))
    run(
        config(
            pieces, texts, **changes, per_device_train_batch_size=1, gradient_accumulation_steps=4
        )
    )
    ours, theirs = final(one), final(pieces)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_another_causal_model_of_transformers_and_then_on(texts, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    first = run(config(tmp_path / "a", texts, model_type="llama", model_config=sizes, max_steps=2))
    further = {"model_type": None, "model_config": None, "tokenizer_vocab_size": None}
    made = config(tmp_path / "b", texts, **further, model_name_or_path=str(first), max_steps=2)
    trainer = build_trainer(made)
    for name, value in trainer.model.state_dict().items():
        if name in final(first):
            assert torch.equal(value, final(first)[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None, "model_config": None}, "set model_type"),
        ({"model_name_or_path": "x"}, "set model_type"),
        ({"model_type": "no_such"}, "model_type='no_such' is unknown"),
        ({"model_config": {"hiden_size": 3}}, "has no 'hiden_size'"),
        ({"model_config": {"hidden_size": 15}}, "query_key_dim"),
        ({"model_config": {"vocab_size": 100}}, "less than the tokenizer's"),
        ({"tokenizer_vocab_size": None}, "no tokenizer"),
        ({"tokenizer_vocab_size": 100}, "at least 257"),
        ({"tokenizer_name_or_path": "x"}, "tokenizer_vocab_size trains one"),
        ({"block_size": 1}, "block_size=1 is wrong"),
        ({"block_size": 100_000}, "less than block_size"),
        ({"dataset_name": None}, "no data"),
        ({"dataset_name": "none.jsonl"}, "no file none.jsonl"),
        ({"eval_dataset_name": None, "eval_strategy": "steps"}, "has no data"),
        ({"max_train_rows": 0}, "max_train_rows=0 is wrong"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(texts, tmp_path, changes, message):
    folder = tmp_path / "run"
    with pytest.raises(ConfigurationError, match=message):
        run(config(folder, texts, **changes))
    assert not folder.exists()


def test_an_unknown_key_of_a_recipe_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("modle_type: llama\n")
    with pytest.raises(ConfigurationError, match="unknown key 'modle_type'; did you mean"):
        parse_flags(PretrainConfig, ["--config", str(tmp_path / "a.yaml")], "retort pretrain")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 7),
        ("block_size", 9),
        ("learning_rate", 0.5),
        ("max_steps", 9),
        ("weight_decay", 0.5),
    ],
)
def test_going_on_as_another_run_is_refused(texts, tmp_path, name, value):
    run(config(tmp_path, texts, max_steps=2))
    with pytest.raises(ConfigurationError, match=f"made with {name}"):
        run(
            config(
                tmp_path,
                texts,
                **{"max_steps": 4, name: value} | ({"max_steps": 2} if name != "max_steps" else {}),
            )
        )


def test_other_texts_are_refused(texts, tmp_path):
    run(config(tmp_path, texts, max_steps=2))
    with pytest.raises(ConfigurationError, match="made with data"):
        run(config(tmp_path, texts, max_steps=2, max_train_rows=20))


def test_a_loss_that_is_not_finite_ends_the_run(texts, tmp_path):
    from retort.errors import RetortError

    trainer = build_trainer(config(tmp_path, texts))
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RetortError, match="the loss is nan at step 1"):
        trainer.train()


def test_decay_spares_vectors_and_mambas_a(texts, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "state_size": 2}
    trainer = build_trainer(config(tmp_path, texts, model_type="dense_mamba", model_config=sizes))
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    kept = {n for n, _ in trainer.model.named_parameters()} - decayed
    assert any(n.endswith("A_log") for n in kept)
    assert any(n.endswith("in_proj.weight") for n in decayed)
    for name, parameter in trainer.model.named_parameters():
        assert (name in kept) == (parameter.ndim < 2 or name.endswith("A_log")), name


def test_another_runs_unfinished_checkpoint_is_not_cleaned_away(texts, tmp_path):
    code = "import sys, time; from pathlib import Path; from retort.train.checkpoint import alone"
    hold = "with alone(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", f"{code}\n{hold}", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        (tmp_path / ".checkpoint.partial").mkdir()
        with pytest.raises(ConfigurationError, match="another run is writing to"):
            run(config(tmp_path, texts))
        assert (tmp_path / ".checkpoint.partial").is_dir()
        other.kill()
