"""Exit codes, one-line errors, and a quick ``--help``."""

import os
import subprocess
import sys

import pytest

from retort import cli
from retort.cli.app import command
from retort.errors import RetortError

VERBS = sorted(command().commands)


def run(capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    code = cli.run(list(arguments))
    return code, *capsys.readouterr()


def test_verbs_of_today_are_there():
    assert {"models", "pull", "generate", "distill", "env"} <= set(VERBS)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_and_loads_no_torch(verb, python, cpu_seconds):
    code = f"""
import sys
from retort import cli
code = cli.run({[*verb.split(), "--help"]})
print("loaded:", [name for name in ("torch", "transformers") if name in sys.modules], code)
"""
    output = []
    assert cpu_seconds(lambda: output.append(python(code))) < 1
    assert "loaded: [] 0" in output[0]
    assert "Example" in output[0] or verb == ""


def test_every_verb_has_its_help_written():
    for name, verb in command().commands.items():
        assert verb.help, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["generate"], "Missing argument 'model'"),
        (["generate", "m", "--promt", "x"], "No such option: --promt"),
        (["generate", "m", "--max-new-tokens", "many"], "Invalid value"),
        (["pull", "smolm2"], "nearest known: smollm2-135m-instruct"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("retort: ")
    assert err.count("\n") == 1


def test_debug_keeps_the_traceback():
    with pytest.raises(RetortError):
        cli.run(["pull", "smolm2", "--debug"])
    with pytest.raises(RetortError):
        cli.run(["--debug", "pull", "smolm2"])


def test_fault_of_ours_is_one_line_and_exit_1(capsys, monkeypatch):
    monkeypatch.setattr("retort.models.zoo.is_cached", lambda entry: 1 / 0)
    code, _, err = run(capsys, "models")
    assert code == 1
    assert (
        err
        == "retort: ZeroDivisionError: division by zero (a fault of Retort; --debug shows where)\n"
    )


def test_a_package_that_an_option_needs_is_the_users_to_install():
    assert cli.explain(ImportError("install\nbitsandbytes")) == ("install bitsandbytes", 2)
    assert cli.explain(ModuleNotFoundError("No module named 'x'"))[1] == 1


def test_underscores_are_dashes():
    assert cli._with_dashes(["pull", "--as_x=a_b", "a_b", "-p", "--", "--c_d"]) == [
        "pull",
        "--as-x=a_b",
        "a_b",
        "-p",
        "--",
        "--c_d",
    ]
    assert cli._with_dashes(["distill", "--max_steps"]) == ["distill", "--max_steps"]


def test_debug_of_training_arguments_is_left_alone():
    assert cli._split_debug(["distill", "--debug", "x"]) == (["distill", "--debug", "x"], False)
    assert cli._split_debug(["--debug", "distill"]) == (["distill"], True)


def test_version(capsys):
    assert run(capsys, "--version")[1].strip() == "0.1.0"


def test_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "retort", "pull", "nobody"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("retort: unknown model 'nobody'")
