"""The configuration: presets, overrides, and errors that name the key."""

import importlib.util
from dataclasses import MISSING, fields

import pytest
import yaml
from transformers import HfArgumentParser

from retort.distill.config import DistillConfig
from retort.distill.options.uses import USES, unread
from retort.distill.presets import PRESETS, Preset
from retort.errors import ConfigurationError
from retort.train.arguments import resolved


def build(tmp_path, **values):
    return DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_recipe_of_its_method(tmp_path, name):
    made = build(tmp_path, method=name, eval_strategy="steps", eval_steps=5)
    assert made.recipe == PRESETS[name]


def test_presets_mix_the_streams_that_their_papers_describe():
    sft, kd, rkl, mgsr = (PRESETS[name] for name in ("sft", "kd", "rkl", "mgsr"))
    assert (sft.sft_weight, sft.distils, sft.writes) == (1, False, False)
    assert (kd.divergence, kd.sft_weight, kd.writes, kd.reads_dataset) == (
        "forward_kl",
        0,
        False,
        True,
    )
    assert (rkl.divergence, rkl.lmbda, rkl.reads_dataset, rkl.scrg) == (
        "reverse_kl",
        1,
        False,
        False,
    )
    assert (mgsr.sft_weight, mgsr.divergence_weight, mgsr.span_weight) == (1, 1, 1)
    assert (mgsr.divergence, mgsr.lmbda, mgsr.scrg) == ("dac", 1, True)


def test_a_flag_wins_over_the_method(tmp_path):
    recipe = build(
        tmp_path, method="kd", lmbda=0.5, divergence="jsd", beta=0.3, sft_weight=0.1
    ).recipe
    assert recipe == Preset(
        PRESETS["kd"].source, 0.1, divergence="jsd", divergence_weight=1.0, lmbda=0.5
    )
    zero = build(tmp_path, method="mgsr", span_weight=0).recipe
    assert zero.span_weight == 0 and zero.divergence_weight == 1


def test_the_papers_constants_are_the_defaults(tmp_path):
    made = build(tmp_path)
    settings = made.dac_settings()
    assert (settings.top_k, settings.tau, settings.coverage, settings.mode) == (
        64,
        0.02,
        0.95,
        "learned",
    )
    assert (made.scrg_rounds, made.temperature, made.max_completion_length) == (1, 1.0, 512)
    assert made.report_to == [] and made.remove_unused_columns is False


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "mgrs"}, "method"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"beta": -0.1, "divergence": "jsd"}, "beta"),
        ({"temperature": 0}, "temperature"),
        ({"divergence": "kl"}, "divergence"),
        ({"span_distance": "l3"}, "span_distance"),
        ({"dac_mode": "loose"}, "dac mode"),
        ({"dac_top_k": 0}, "top_k"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"sft_weight": -1}, "sft_weight"),
        ({"replay_share": 0.5}, "replay_share"),
        ({"student_type": "mamba9"}, "student_type"),
        ({"method": "sft", "lmbda": 0.5}, "lmbda"),
        ({"method": "kd", "scrg": True}, "lmbda"),
        ({"method": "kd", "beta": 0.5}, "beta"),
        ({"method": "sft", "sft_weight": 0.0}, "every loss weight"),
        ({"divergence_parameters": {"alpha": 1}}, "alpha"),
        ({"max_length": None}, "max_length=None"),
        ({"student_config": "{bad"}, "student_config"),
        ({"student_config": "[1]"}, "student_config"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"model_init_kwargs": {"trust_remote_code": True}}, "model_init_kwargs"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(tmp_path, values, named):
    with pytest.raises(ConfigurationError, match=named) as caught:
        build(tmp_path, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dac_mode": "fixed", "dac_lower": 0.9, "dac_upper": 0.1}, "dac_lower=0.9 lies above"),
        ({"dac_mode": "fixed", "dac_upper": -1}, "dac_upper=-1"),
        ({"dac_lower": 0.1}, "dac_lower=0.1 contradicts method='mgsr' as it is set: only"),
        ({"dac_lower": 0.1}, "dac_mode='fixed'"),
        ({"dac_mode": "fixed", "dac_coverage": 0.9}, "dac_mode='learned'"),
        ({"dac_mode": "fixed", "dac_learning_rate": 0.1}, "dac_learning_rate=0.1"),
        ({"method": "kd", "dac_mode": "fixed"}, "only divergence='dac' reads it"),
        (
            {"method": "kd", "rollout_drafter": "prompt-lookup"},
            "only text that student or",
        ),
        ({"method": "gkd", "rollout_draft_budget": 9}, "only a rollout_drafter"),
        ({"rollout_temperature": 0.5}, "do_sample=True"),
        ({"method": "kd", "scrg_rounds": 3}, "only scrg=True reads it"),
        ({"scrg": False, "scrg_rounds": 3, "scrg_warmup_steps": 0}, "scrg_rounds=3, scrg_warmup"),
        ({"method": "kd", "span_distance": "kl"}, "only a span_weight above 0 reads it"),
        ({"span_weight": 0, "span_chunker": "random"}, "span_chunker='random'"),
        ({"method": "gkd", "replay_buffer_size": 9}, "replay_share above 0"),
        ({"method": "kd", "teacher_text_file": "a.jsonl"}, "completions='teacher'"),
        ({"method": "sft", "lora_r": 8}, "use_peft=True"),
        ({"method": "kd", "student_config": {"v_factor": 1}}, "student_type"),
    ],
)
def test_what_nothing_reads_is_refused_naming_who_would(tmp_path, values, said):
    with pytest.raises(ConfigurationError) as caught:
        build(tmp_path, **values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "kd", "max_completion_length": 9, "rollout_batch_size": 2},
        {"method": "kd", "divergence": "dac", "dac_mode": "fixed", "dac_upper": 0.5},
        {"method": "kd", "lmbda": 0.5, "scrg": True, "scrg_rounds": 2},
        {"method": "kd", "span_weight": 1, "span_distance": "kl"},
        {"method": "seqkd", "rollout_drafter": "prompt-lookup", "rollout_draft_budget": 2},
        {"method": "kd", "rollout_drafter": "none"},
        {"dac_mode": "literal", "dac_learning_rate": 0.1},
    ],
)
def test_limits_and_what_a_mix_reads_are_fine(tmp_path, values):
    made = build(tmp_path, **values)
    assert unread(made) is None
    assert {**resolved(made), **values} == resolved(made)


def test_every_use_names_options(tmp_path):
    known = {field.name: field.default for field in fields(DistillConfig)}
    assert all(known[key] is not MISSING for use in USES for key in use.keys)


def test_a_reporter_that_is_not_installed_is_named_in_one_line(tmp_path):
    if importlib.util.find_spec("clearml"):
        pytest.skip("clearml is installed")
    with pytest.raises(ConfigurationError, match=r"(?i)clearml") as caught:
        build(tmp_path, report_to="clearml")
    assert "\n" not in str(caught.value)


def test_warm_up_counts_steps_or_a_share(tmp_path):
    assert build(tmp_path, scrg_warmup_steps=0.25).scrg_start(200) == 50
    assert build(tmp_path, scrg_warmup_steps=30).scrg_start(200) == 30
    assert build(tmp_path, scrg_warmup_steps=0).scrg_start(200) == 0


def test_flags_parse_with_json_values(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--method", "kd", "--max_length", "99"]
    flags += ["--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--lmbda", "0.25"]
    (made,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(flags)
    assert made.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert (made.recipe.lmbda, made.max_length) == (0.25, 99)


def test_resolved_arguments_give_the_same_configuration_back(tmp_path):
    made = build(
        tmp_path,
        method="kd",
        lmbda=0.5,
        student_type="dense_retnet",
        student_config={"v_factor": 1},
        hub_token="s3cret",
    )
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(resolved(made)))
    (again,) = HfArgumentParser(DistillConfig).parse_yaml_file(str(path))
    assert resolved(again) == resolved(made)
    assert "s3cret" not in path.read_text() and "hub_token" not in path.read_text()


def test_an_unknown_key_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="lambda_"):
        HfArgumentParser(DistillConfig).parse_dict({"output_dir": str(tmp_path), "lambda_": 1})
