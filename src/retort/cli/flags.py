"""Flags of the training verbs: a dataclass's fields, with defaults from a YAML file."""

from __future__ import annotations

import difflib
from argparse import Action
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from retort.errors import ConfigurationError

T = TypeVar("T")


class FlagParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are a `ConfigurationError` of one line.

    Attributes:
        elsewhere: names that there are not, each with what to set instead.
    """

    elsewhere: Mapping[str, str] = {}  # read only

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which has hundreds of flags."""
        raise ConfigurationError(f"{message}; `{self.prog} --help-all` lists every flag")


def parse_flags(kind: type[T], arguments: Sequence[str], prog: str) -> T:
    """Build a ``kind`` from ``--flag value`` arguments; ``--config FILE.yaml`` gives defaults.

    Args:
        kind: a dataclass that HfArgumentParser understands.
        arguments: the command line after the verb; dashes and underscores mean the same.
        prog: the verb, for messages.

    Raises:
        ConfigurationError: an unknown flag or YAML key, a value of the wrong type, a bad file.
    """
    parser = flag_parser(kind, prog)
    file, rest = _split_config(list(arguments))
    if file is not None:
        _apply_defaults(parser, file)
    value, unknown = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ConfigurationError(f"unknown argument {unknown[0]!r}{_nearest(unknown[0], parser)}")
    return value


def flag_parser(kind: Any, prog: str) -> FlagParser:
    """The parser of ``kind``'s fields; abbreviations are off, so that a typo is an error."""
    parser = FlagParser(kind, prog=prog, allow_abbrev=False, add_help=False)
    parser.elsewhere = getattr(kind, "ELSEWHERE", {})
    return parser


def _split_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        taken = 1 if equals else 2
        if len(arguments) < index + taken:
            raise ConfigurationError("--config needs a YAML file")
        path = value if equals else arguments[index + 1]
        return Path(path), arguments[:index] + arguments[index + taken :]
    return None, arguments


def _apply_defaults(parser: FlagParser, file: Path) -> None:
    actions = {action.dest: action for action in parser._actions}
    for key, value in _read_yaml(file).items():
        if key not in actions:
            raise ConfigurationError(f"{file}: unknown key {key!r}{_nearest(key, parser)}")
        actions[key].required = False
        parser.set_defaults(**{key: _converted(parser, actions[key], value, file)})


class _OnceEach(yaml.SafeLoader):
    """The safe loader, which by itself lets the last of two equal keys win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"key {key.value!r} twice, line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_OnceEach)  # a SafeLoader
    except OSError as error:
        raise ConfigurationError(f"cannot read --config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config {file} is not YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {file} must map names of flags to values")
    return {str(key): value for key, value in values.items()}


def _converted(parser: FlagParser, action: Action, value: Any, file: Path) -> Any:
    """Check a YAML value as argparse would check the same text on the command line."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list) and action.nargs is not None:
        return [_converted(parser, action, item, file) for item in value]
    try:
        converted = parser._get_value(action, str(value))
        parser._check_value(action, converted)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{file}: {action.dest}: {value!r} is wrong: {reason}") from error
    return converted


def _nearest(name: str, parser: FlagParser) -> str:
    known = [action.dest for action in parser._actions]
    plain = name.partition("=")[0].lstrip("-").replace("-", "_")
    if (advice := parser.elsewhere.get(plain)) is not None:
        return f": {advice}"
    near = difflib.get_close_matches(plain, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
