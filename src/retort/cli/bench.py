"""``retort bench``: load on a running server, and decoding speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from retort.cli.output import print_json, print_table, say
from retort.errors import ConfigurationError, RetortError

_HELP = """Measure a running server, or decoding.

Examples:

    retort bench serve --prompts spec_bench.jsonl --request-rate 2

    retort bench decode --prompts spec_bench.jsonl --batch-sizes 1 4 8
"""


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    bench = typer.Typer(help=_HELP, no_args_is_help=True)
    bench.command("serve")(serve)
    bench.command(
        "decode", context_settings={"ignore_unknown_options": True, "help_option_names": []}
    )(decode)
    app.add_typer(bench, name="bench")


def serve(
    prompts: Annotated[Path, typer.Option(help="JSON Lines with `prompt`.")],
    base_url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="So many of them, at even distances; default all.")
    ] = None,
    request_rate: Annotated[
        float, typer.Option(min=0, help="Requests a second (Poisson); `inf` sends all at once.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    chat: Annotated[bool, typer.Option(help="Chat, or bare completions.")] = True,
    model: Annotated[str | None, typer.Option(help="Served name, where one is wanted.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="RETORT_API_KEY", help="Key.")] = None,
    extra_body: Annotated[
        str, typer.Option(help="""More fields, as JSON: '{"speculation": "off"}'.""")
    ] = "{}",
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request counts as failed.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
) -> None:
    """Put an open-loop load on a running server: throughput, latency, acceptance.

    Requests arrive at random times of a fixed rate, however busy the server is.

    Examples:

        retort bench serve --prompts spec_bench.jsonl --num-prompts 200 --request-rate 2 -o r.json
    """
    given = dict(locals())
    raise typer.Exit(_serve(given))


def _serve(given: dict[str, Any]) -> int:
    import asyncio

    from retort.bench.load import Load, read_prompts, run
    from retort.bench.page import page
    from retort.bench.stream import Address
    from retort.bench.summary import rows, summarize
    from retort.provenance import Provenance, write_json, write_text

    address = Address.parse(given["base_url"], given["api_key"])
    if given["request_rate"] <= 0:
        raise ConfigurationError("--request-rate must be above 0")
    texts = read_prompts(given["prompts"], given["num_prompts"])
    names = ("max_tokens", "chat", "model", "seed")
    options = {name: given[name] for name in names}
    options |= {"extra": _fields(given["extra_body"]), "timeout": given["request_timeout"]}
    load = Load(texts, given["request_rate"], **options)
    say(f"{len(texts)} requests to {given['base_url']}, {given['request_rate']:g} a second")
    samples = asyncio.run(run(address, load))
    summary = summarize(samples)
    if summary.failed == summary.requests:
        raise RetortError(f"every request failed; the first one: {samples[0].error}")
    record = Provenance.collect({k: v for k, v in given.items() if k != "api_key"}).to_dict()
    if given["output"] is not None:
        result = {"provenance": record, "summary": summary.as_dict(), "samples": samples}
        write_json(given["output"], json.loads(json.dumps(result, default=vars_or_text)))
    if given["html"] is not None:
        write_text(given["html"], page("Retort: load on a server", summary, samples))
    if given["as_json"]:
        print_json(summary.as_dict())
    else:
        print_table(("what", "value"), rows(summary))
    return 0


def vars_or_text(value: Any) -> Any:
    """A sample's fields; text of anything else."""
    return vars(value) if hasattr(value, "__dict__") and not isinstance(value, Path) else str(value)


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigurationError("--extra-body must be a JSON object")
    return fields


def decode(
    arguments: Annotated[list[str] | None, typer.Argument(help="See --help.")] = None,
) -> None:
    """Measure decoding: arms in turns, equality with plain decoding, JSON, a page and lines.

    Examples:

        retort bench decode --prompts spec_bench.jsonl --category summarization --batch-sizes 1 4
    """
    from retort.bench.decode_options import parser

    options = parser().parse_args(arguments or [])
    from retort.bench.decode import run

    run(options)
