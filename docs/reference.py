"""Write docs/reference.md: the command line and the configuration, from the code itself.

make docs        (or: .venv/bin/python docs/reference.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("reference.md")
SKIPPED = ("help", "install_completion", "show_completion")


def reference() -> str:
    """The whole page in Markdown."""
    lines = ["# Reference", "", "Written by `make docs`; do not edit.", "", "## Command line", ""]
    lines += [*command_line(), "## `DistillConfig`", "", *distill_config()]
    lines += ["", "## `PretrainConfig`", "", *pretrain_config()]
    return "\n".join(lines).rstrip() + "\n"


def command_line() -> Iterator[str]:
    """A heading, the help and the flags of each verb."""
    from retort.cli.app import command

    for name, one in command().commands.items():
        yield from verb(f"retort {name}", one)
        for inner, part in getattr(one, "commands", {}).items():
            yield from verb(f"retort {name} {inner}", part)


def verb(name: str, one: Any) -> Iterator[str]:
    """Heading, help and flags of one verb."""
    yield from (f"### `{name}`", "", *one.help.strip().splitlines(), "")
    rows = list(bench_decode() if name == "retort bench decode" else map(parameter, one.params))
    if any(rows):
        yield from ("| flag | default | meaning |", "|---|---|---|", *filter(None, rows), "")


def bench_decode() -> Iterator[str]:
    """The flags of the verb that has a parser of its own."""
    from retort.bench.decode_options import parser

    for action in parser()._actions:
        if action.dest not in SKIPPED:
            yield row(f"`{action.option_strings[0]}`", action.default, action.help or "")


def parameter(parameter: Any) -> str:
    """One row of a verb's table; empty for parameters that have no flag of their own."""
    if parameter.name in SKIPPED:
        return ""
    names = ", ".join(f"`{option}`" for option in parameter.opts)
    if not names.startswith("`-"):
        names = f"`{parameter.name.upper()}`"
    return row(names, parameter.default, getattr(parameter, "help", "") or "")


def distill_config() -> Iterator[str]:
    """Our own fields; transformers' are in its documentation."""
    from retort.distill.config import DistillConfig

    yield from (
        "Keywords in Python, flags of `retort distill` and keys of its YAML file, on top of "
        "transformers' `TrainingArguments`. A default of `None` means: the method's own.",
        "",
        *own_fields(DistillConfig),
    )


def pretrain_config() -> Iterator[str]:
    """The same for pretraining."""
    from retort.pretrain.config import PretrainConfig

    yield from (
        "Keywords in Python, flags of `retort pretrain` and keys of its recipes, on top of "
        "transformers' `TrainingArguments`.",
        "",
        *own_fields(PretrainConfig),
    )


def own_fields(kind: Any) -> Iterator[str]:
    """A table of what a configuration adds to `TrainingArguments`, or sets differently."""
    from transformers import TrainingArguments

    yield from ("| field | default | meaning |", "|---|---|---|")
    theirs = {f.name: default_of(f) for f in fields(TrainingArguments)}
    for f in fields(kind):
        if f.name not in theirs or default_of(f) != theirs[f.name]:
            yield row(f"`{f.name}`", default_of(f), f.metadata.get("help", ""))


def default_of(f: Field) -> Any:
    """The default of a dataclass field, ``None`` where a factory makes it."""
    return None if f.default is MISSING else f.default


def row(name: str, default: Any, meaning: str) -> str:
    """A row of a Markdown table."""
    shown = "" if default in (None, False, "") or callable(default) else f"`{default}`"
    return f"| {name} | {shown} | {' '.join(meaning.split()).replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}")
