"""The command line: one file a verb, heavy imports inside the verb so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from retort.errors import RetortError

# These verbs hand their flags to argparse, where `--debug` belongs to TrainingArguments.
PASS_THROUGH = ("distill", "pretrain")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a fault of ours, 2 the user's error."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; with ``--debug`` errors keep their traceback."""
    if not sys.stderr.isatty():  # in a log file every redrawn bar would be a line
        os.environ.setdefault("TQDM_DISABLE", "1")
    from retort.cli.app import command

    arguments, debug = _split_debug(arguments)
    try:
        code = command().main(_with_dashes(arguments), prog_name="retort", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            raise
        line, code = explain(error)
        print(f"retort: {line}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """One line for ``error`` and the exit code that goes with it."""
    if isinstance(error, RetortError):
        return _one_line(str(error)), 2
    if hasattr(error, "format_message"):  # typer's usage errors, whichever click it carries
        return _usage(error), 2
    if isinstance(error, OSError) and error.filename is not None:
        return _one_line(f"{error.filename}: {error.strerror}"), 2
    if isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError):
        return _one_line(str(error)), 2  # transformers': what to install for an option
    reason = _one_line(f"{type(error).__name__}: {error}")
    return f"{reason} (a fault of Retort; --debug shows where)", 1


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "retort"
    return f"{_one_line(error.format_message())} See `{path} --help`."  # type: ignore[attr-defined]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take ``--debug`` out, except where it belongs to a verb's own flags."""
    verbs = [i for i, argument in enumerate(arguments) if argument in PASS_THROUGH]
    end = verbs[0] if verbs else len(arguments)
    own = [argument for argument in arguments[:end] if argument != "--debug"]
    return own + arguments[end:], "--debug" in arguments[:end]


def _with_dashes(arguments: list[str]) -> list[str]:
    """Accept ``--max_new_tokens`` for ``--max-new-tokens``; argparse verbs accept both."""
    if any(verb in arguments[:1] for verb in PASS_THROUGH):
        return arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_dashed(argument) for argument in arguments[:end]] + arguments[end:]


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
