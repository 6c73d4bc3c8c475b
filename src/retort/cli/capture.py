"""``retort capture``: write a teacher's predictions of a dataset down, to train from them later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from retort.cli.output import print_json, say
from retort.errors import ConfigurationError

_OWN_FLAGS = {
    "dtype": "--dtype",
    "device": "--device",
    "trust_remote_code": "--trust-remote-code",
}


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("capture")(capture)


def capture(
    teacher: Annotated[str, typer.Argument(help="A zoo name, a folder or a hub id.")],
    dataset: Annotated[str, typer.Argument(help="JSONL or Parquet file, folder or hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder of the capture, new or unfinished.")],
    top_k: Annotated[int, typer.Option(min=1, help="Ids kept of each prediction.")] = 64,
    max_length: Annotated[
        int, typer.Option(min=2, help="As in training: most tokens of prompt + completion.")
    ] = 1024,
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="As in training: text prompts become chat messages.")
    ] = False,
    skip_long_prompts: Annotated[
        bool, typer.Option("--skip-long-prompts", help="As in training: leave such rows out.")
    ] = False,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of the dataset.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="The first rows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a teacher forward.")] = 8,
    shard_tokens: Annotated[
        int, typer.Option(min=1, help="Completion tokens of a shard; what a killed run loses.")
    ] = 16_384,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    model_init_kwargs: Annotated[
        str | None, typer.Option(help="Keywords of the teacher's from_pretrained, as JSON.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Capture a teacher's top-k predictions of a dataset's completions.

    Train from it with --teacher_signal FOLDER, any number of times, without the teacher. The same
    command goes on where a killed run stopped, and ends in the same bits.

    Examples:

        retort capture smollm2-135m-instruct train.jsonl captures/train --as-chat

        retort distill --method kd --teacher_signal captures/train --dataset_name train.jsonl
    """
    keywords = _keywords(model_init_kwargs)
    from retort.decode.support import max_length as context_of
    from retort.distill.capture import capture as run
    from retort.distill.capture import check_folder
    from retort.distill.capture_facts import CaptureSettings
    from retort.distill.data import load_rows, tokenize
    from retort.distill.encoding import Encoding, end_tokens
    from retort.models import zoo

    settings = CaptureSettings(top_k, batch_size, shard_tokens)
    rows = load_rows(dataset, split, dataset_config)
    rows = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
    tokenizer = zoo.load_tokenizer(teacher, trust_remote_code)
    outline = zoo.load_outline(teacher, trust_remote_code, **keywords)
    context = context_of(outline.config)
    encoding = Encoding(
        tokenizer=tokenizer,
        eos_ids=end_tokens(tokenizer, outline),
        max_length=max_length if context is None else min(max_length, context),
        as_chat=as_chat,
        skip_long_prompts=skip_long_prompts,
        vocab_size=outline.config.get_text_config().vocab_size,
        origin=Path(dataset).name,
    )
    examples = tokenize(rows, encoding)
    check_folder(tokenizer, examples, output, settings, teacher)
    say(f"Loading {teacher}")
    model = zoo.load_model(teacher, dtype, device, trust_remote_code, **keywords)
    with _progress(len(examples)) as progress:
        run(model, tokenizer, examples, output, settings, teacher, progress)
    _answer(output, as_json)


def _keywords(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(f"--model-init-kwargs {text!r} is wrong: it must be a JSON object")
    for name in found.keys() & _OWN_FLAGS.keys():
        raise ConfigurationError(f"--model-init-kwargs has {name!r}: use {_OWN_FLAGS[name]}")
    return found


def _answer(folder: Path, as_json: bool) -> None:
    from retort.manifest import read_manifest

    facts = read_manifest(folder) or {}
    size = sum((folder / name).stat().st_size for name in facts["files"])
    rows, tokens = facts["rows"], facts["tokens"]
    if as_json:
        numbers = {"rows": rows, "tokens": tokens, "bytes": size, "bytes_per_token": size / tokens}
        print_json({"folder": str(folder), "top_k": facts["top_k"], **numbers})
        return
    say(f"{rows} rows, {tokens} tokens, {size / tokens:.0f} bytes a token")
    print(folder)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from retort.cli.progress import bar

    with bar() as shown:
        task = shown.add_task("Capturing", total=total)
        yield lambda done, _: shown.update(task, completed=done)
