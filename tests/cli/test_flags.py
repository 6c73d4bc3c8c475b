"""Flags of training verbs: YAML gives defaults, flags win, what is unknown is an error."""

from dataclasses import dataclass, field, fields
from typing import Literal

import pytest

from retort import cli
from retort.cli.flags import parse_flags
from retort.distill.config import DistillConfig
from retort.distill.options.elsewhere import FLAGS
from retort.errors import ConfigurationError


@dataclass
class Settings:
    output_dir: str
    learning_rate: float = 1.0
    steps: int = 3
    method: Literal["kd", "mgsr"] = "kd"
    bf16: bool = False
    names: list[str] = field(default_factory=list)
    note: str | None = None


def parse(*arguments):
    return parse_flags(Settings, arguments, "verb")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        file = tmp_path / "settings.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def test_yaml_gives_defaults_and_flags_win(yaml_file):
    file = yaml_file("output_dir: run\nlearning_rate: 1e-4\nsteps: 5\nbf16: true\nnames: [a, b]\n")
    settings = parse("--steps", "7", "--config", file)
    assert settings == Settings("run", 1e-4, 7, "kd", True, ["a", "b"])
    assert parse(f"--config={file}").steps == 5


def test_dashes_and_underscores_mean_the_same():
    assert parse("--output-dir", "x", "--learning_rate", "2").learning_rate == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "x", "--lerning_rate", "2"], "did you mean 'learning_rate'"),
        (["--output_dir", "x", "--step", "2"], "unknown argument '--step'"),
        (["--output_dir", "x", "--steps", "many"], "invalid int value: 'many'"),
        (["--output_dir", "x", "--method", "none"], "invalid choice"),
        (["--output_dir", "x", "stray"], "unknown argument 'stray'"),
        ([], "output_dir"),
        (["--config"], "--config needs a YAML file"),
        (["--config", "no-such.yaml"], "No such file"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\nlerning_rate: 2\n", "unknown key 'lerning_rate'; did you mean"),
        ("output_dir: x\nsteps: many\n", "steps: 'many' is wrong"),
        ("output_dir: x\nmethod: none\n", "method: 'none' is wrong"),
        ("output_dir: x\nlearning_rate: [1, 2]\n", r"learning_rate: \[1, 2\] is wrong"),
        ("output_dir: x\nbf16: perhaps\n", "bf16: 'perhaps' is wrong"),
        ("- a list\n", "must map names"),
        ("", "must map names"),
        ("a: [", "is not YAML"),
        ("output_dir: x\nsteps: 1\nsteps: 2\n", "key 'steps' twice, line 3"),
    ],
)
def test_bad_yaml(yaml_file, text, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse("--config", yaml_file(text))
    assert "\n" not in str(caught.value)


def test_distill_names_an_unknown_yaml_key_and_exits_2(capsys, yaml_file):
    file = yaml_file("metod: mgsr\n")
    assert cli.run(["distill", "--config", file]) == 2
    assert f"{file}: unknown key 'metod'; did you mean 'method'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FLAGS])
def test_distill_says_where_a_flag_of_trl_is(name, capsys, yaml_file):
    assert name not in {field.name for field in fields(DistillConfig)}
    file = yaml_file(f"{name}: 1\n")
    for given in ["--config", file], [f"--{name}=1"]:
        assert cli.run(["distill", *given]) == 2
        assert FLAGS[name] in capsys.readouterr().err


def test_distill_hands_the_configuration_to_the_run(capsys, monkeypatch, tmp_path, yaml_file):
    seen = []
    monkeypatch.setattr("retort.distill.run.run", lambda config, _: seen.append(config) or tmp_path)
    file = yaml_file(f"method: kd\noutput_dir: {tmp_path}\nmax_steps: 5\n")
    assert cli.run(["distill", "--config", file, "--max-steps", "2", "--temperature=2"]) == 0
    assert (seen[0].method, seen[0].max_steps, seen[0].temperature) == ("kd", 2, 2)
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_help_all_lists_every_flag(capsys):
    assert cli.run(["distill", "--help-all"]) == 0
    out = capsys.readouterr().out
    assert "--teacher_model_name_or_path" in out
    assert "--gradient_accumulation_steps" in out
