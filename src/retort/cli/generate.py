"""``retort generate``: complete prompts with the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from retort.cli.output import print_json, say
from retort.cli.prompts import Prompt, read_prompts
from retort.errors import ConfigurationError

if TYPE_CHECKING:
    from retort.decode.engine import Engine
    from retort.decode.request import RequestOutput, SamplingParams

Rows = list[dict[str, Any]]


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("generate")(generate)


def generate(
    model: Annotated[str, typer.Argument(help="A zoo name, a folder or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May repeat.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--input", "-i", help="Prompts: .txt (one a line) or .jsonl.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSON Lines here, whole.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send each text through the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens a prompt.")] = 64,
    drafter: Annotated[
        str | None, typer.Option(help="prompt-lookup, or a model's name or folder.")
    ] = None,
    draft_budget: Annotated[
        str, typer.Option(help="auto, counts (auto without a clock), or draft tokens a row.")
    ] = "auto",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Rows that decode at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    cpu_backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines on standard output.")] = False,
) -> None:
    """Complete prompts greedily, many at once.

    Texts are completed as they stand; messages, and texts with --chat, go through the model's
    chat template.

    Examples:

        retort generate smollm2-135m-instruct --chat -p "What is the capital of France?"

        retort generate smollm2-135m-instruct -i prompts.jsonl -o out.jsonl --drafter prompt-lookup
    """
    given = locals()
    prompts = _collect(prompt or [], prompts_file, chat)
    _check_output(output)
    budget = parse_budget(draft_budget)

    say(f"Loading {model}")
    from retort.decode.engine import Engine
    from retort.decode.request import SamplingParams

    options: dict[str, Any] = {
        "drafter": drafter,
        "draft_budget": budget,
        "max_batch_size": max_batch_size,
    }
    options |= {"dtype": dtype, "device": device, "cpu_backend": cpu_backend}
    with Engine.from_pretrained(model, trust_remote_code=trust_remote_code, **options) as engine:
        outputs = complete(engine, prompts, SamplingParams(max_new_tokens=max_new_tokens))
    _deliver(_rows(prompts, outputs), output, as_json, given)


def parse_budget(text: str) -> str | int:
    """``auto``, ``counts`` or a whole number of at least 0.

    Raises:
        ConfigurationError: anything else.
    """
    if text in ("auto", "counts"):
        return text
    if not text.isdecimal():
        raise ConfigurationError(
            f"--draft-budget {text!r} is none of auto, counts and a whole number"
        )
    return int(text)


def complete(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams
) -> list[RequestOutput]:
    """Run all prompts through ``engine`` with a progress bar; outputs come in their order.

    Raises:
        ConfigurationError: a prompt is empty or too long; the message counts from 1.
    """
    ids = [_add(engine, number, prompt, params) for number, prompt in enumerate(prompts, 1)]
    done: dict[str, RequestOutput] = {}
    with _progress(len(ids)) as advance:
        while len(done) < len(ids):
            finished = engine.step()
            done |= {output.request_id: output for output in finished}
            advance(len(finished))
    return [done[i] for i in ids]


def _add(engine: Engine, number: int, prompt: Prompt, params: SamplingParams) -> str:
    try:
        return engine.add_request(prompt, params)
    except ConfigurationError as error:
        raise ConfigurationError(f"prompt {number}: {error}") from error


def _collect(texts: list[str], file: Path | None, chat: bool) -> list[Prompt]:
    prompts: list[Prompt] = [*texts, *(read_prompts(file) if file is not None else [])]
    if not prompts:
        raise ConfigurationError("no prompt; give --prompt TEXT or --input FILE")
    if not chat:
        return prompts
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def _check_output(output: Path | None) -> None:
    """Find out before the work whether the file can be written."""
    if output is None:
        return
    special = output.exists() and not output.is_file()
    if special or not output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output {output}: it must be a file in a folder that exists")


def _rows(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> Rows:
    return [
        {
            "index": index,
            "prompt": prompt,
            "text": output.text,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            "stats": asdict(output.stats),
        }
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def _deliver(rows: Rows, output: Path | None, as_json: bool, given: dict[str, Any]) -> None:
    if output is not None:
        _write(rows, output, given)
    if as_json:
        for row in rows:
            print_json(row)
    elif output is None:
        for row in rows:
            print(row["text"] if len(rows) == 1 else f"[{row['index']}] {row['text']}")


def _write(rows: Rows, output: Path, given: dict[str, Any]) -> None:
    from retort.provenance import Provenance, write_json, write_whole

    def lines(file: TextIO) -> None:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    record = Provenance.collect(given)
    write_json(output.with_name(output.name + ".provenance.json"), record.to_dict())
    write_whole(output, lines)
    say(f"Wrote {len(rows)} rows to {output}")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from retort.cli.progress import bar

    with bar() as progress:
        task = progress.add_task("Generating", total=total)
        yield lambda count: progress.advance(task, count)
