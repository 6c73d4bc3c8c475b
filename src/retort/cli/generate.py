"""``retort generate``: complete prompts with the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retort.cli.output import print_json, say
from retort.cli.prompts import Prompt, read_prompts
from retort.errors import ConfigurationError

if TYPE_CHECKING:
    from retort.decode.engine import Engine
    from retort.decode.params import SamplingParams
    from retort.decode.request import RequestOutput

_RESUME = ("chat", "max_new_tokens", "dtype")  # what changes rows, beside the model's files


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("generate")(generate)


def generate(
    model: Annotated[str, typer.Argument(help="A zoo name, a folder or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May repeat.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Prompts: .txt (one a line), .jsonl, or - for stdin."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON Lines, row by row in order; - for stdout."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin --output anew instead of going on with it.")
    ] = False,
    on_error: Annotated[
        str, typer.Option(help="What a line does that cannot be answered: stop or skip.")
    ] = "stop",
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
    chat template. Lines in OpenAI's batch format are answered in that format. A run that was
    killed goes on where it stopped when the same command is given again.

    Examples:

        retort generate smollm2-135m-instruct --chat -p "What is the capital of France?"

        retort generate smollm2-135m-instruct -i prompts.jsonl -o out.jsonl --drafter prompt-lookup
    """
    given = dict(locals())
    if on_error not in ("stop", "skip"):
        raise ConfigurationError(f"--on-error {on_error!r} is neither stop nor skip")
    if not prompt and prompts_file is None:
        raise ConfigurationError("no prompt; give --prompt TEXT or --input FILE")
    budget = parse_budget(draft_budget)
    options: dict[str, Any] = {
        "drafter": drafter,
        "draft_budget": budget,
        "max_batch_size": max_batch_size,
    }
    options |= {"dtype": dtype, "device": device, "cpu_backend": cpu_backend}
    options["trust_remote_code"] = trust_remote_code
    if prompts_file == Path("-") and output is None:
        output = Path("-")
    if output is None:
        _to_terminal(given, options)
    else:
        from retort.cli.batch import run_batch

        raise typer.Exit(run_batch({**given, "output": output}, options))


def _to_terminal(given: dict[str, Any], options: dict[str, Any]) -> None:
    prompts = _collect(given["prompt"] or [], given["prompts_file"], given["chat"])
    say(f"Loading {given['model']}")
    from retort.decode.engine import Engine
    from retort.decode.params import SamplingParams

    with Engine.from_pretrained(given["model"], **options) as engine:
        params = SamplingParams(max_new_tokens=given["max_new_tokens"])
        _show(prompts, complete(engine, prompts, params), given["as_json"])


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
    if not chat:
        return prompts
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def _show(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], as_json: bool) -> None:
    from retort.batch.rows import output_row
    from retort.decode.outputs import require_whole

    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if as_json:
            print_json(output_row(index, prompt, output))
        else:
            print(output.text if len(prompts) == 1 else f"[{index}] {output.text}")
    require_whole(outputs)  # the others are shown all the same


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from retort.cli.progress import bar

    with bar() as progress:
        task = progress.add_task("Generating", total=total)
        yield lambda count: progress.advance(task, count)
