"""README's Python runs on the real model, and the commands and links in it exist."""

import re

import pytest

from retort.cli.app import command
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "console" for line in code.splitlines()]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("number", range(1, len(PYTHON)))
def test_other_python_runs_and_prints(number, capsys, zoo_folder):
    exec(compile(PYTHON[number], f"README block {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_the_first_block_is_six_lines_that_answer(capsys, zoo_folder):
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 8
    exec(PYTHON[0], {})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "accepted_tokens" in printed


def test_set_up_is_the_two_make_targets():
    assert {"make demo", "make test"} <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def test_ci_runs_the_command_that_the_readme_names():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_verbs_and_flags_exist():
    verbs = command().commands
    lines = [line for line in COMMANDS if line.startswith("retort ")]
    assert lines
    for line in lines:
        _, verb, *rest = line.split()
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        if verb not in ("distill", "pretrain"):  # its other flags are the configuration's fields
            assert {word for word in rest if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link
