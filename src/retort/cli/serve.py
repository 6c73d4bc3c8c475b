"""``retort serve``: an OpenAI-compatible server on the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retort.cli.generate import parse_budget
from retort.cli.output import say
from retort.cli.speculation import SpecConfig, SpecMethod, SpecModel, SpecTokens, drafting
from retort.errors import ConfigurationError

_NEEDS = ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client")
_PASSED = ("host", "port", "request_timeout", "send_timeout", "shutdown_timeout")


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("serve")(serve)


def serve(
    model: Annotated[str, typer.Argument(help="A zoo name, a folder or a hub id.")],
    drafter: Annotated[
        str | None, typer.Option(help="prompt-lookup, or a model's name or folder.")
    ] = None,
    draft_budget: Annotated[
        str, typer.Option(help="auto, counts (auto without a clock), or draft tokens a row.")
    ] = "auto",
    spec_method: SpecMethod = None,
    spec_model: SpecModel = None,
    spec_tokens: SpecTokens = None,
    speculative_config: SpecConfig = None,
    host: Annotated[str, typer.Option(help="Address; others reach it only if you say so.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="RETORT_API_KEY", help="Let in only clients with it; may repeat."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys from a file, one a line: not seen in `ps`.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for clients; may repeat. Default: MODEL.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Rows that decode at once.")] = 16,
    max_num_queued_reqs: Annotated[
        int, typer.Option(min=0, help="Rows that may wait; more are told to retry.")
    ] = 256,
    max_queued_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of all rows let in.")
    ] = None,
    max_cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of all running rows.")
    ] = None,
    prefill_stretch: Annotated[
        float, typer.Option(help="How much longer steps may take for prompts beside them.")
    ] = 2.0,
    prefix_cache_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of kept prompt prefixes; 0 keeps none.")
    ] = 4096,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt with its completion.")
    ] = None,
    max_prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens read in one step beside decoding rows.")
    ] = 128,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request.")] = 600.0,
    send_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a client that reads nothing is cut off.")
    ] = 30.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests after SIGTERM.")
    ] = 30.0,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the tokenizer's template.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    cpu_backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients, with a playground at /.

    Examples:

        retort serve smollm2-135m-instruct --drafter prompt-lookup

        RETORT_API_KEY=secret retort serve ./model --host 0.0.0.0 --port 8080
    """
    given = dict(locals())
    _check_installed()
    raise typer.Exit(_run(given))


def _run(given: dict[str, Any]) -> int:
    from retort.models.zoo import locate
    from retort.serve.client import Limits
    from retort.serve.messages import Configure
    from retort.serve.server import ServeOptions
    from retort.serve.server import serve as run

    least, most = given["max_model_len"], given["max_cache_tokens"]
    if least and most and most < least:
        raise ConfigurationError("--max-cache-tokens must be at least --max-model-len")
    drafter, budget = drafting(given)
    engine = {name: given[name] for name in Configure.__struct_fields__}
    engine["model"] = locate(given["model"], say)  # fetches a zoo model; a wrong name ends here
    template = given["chat_template"]
    options = ServeOptions(
        Configure(**{**engine, "drafter": drafter, "draft_budget": parse_budget(budget)}),
        names=given["served_model_name"] or [_public_name(given["model"])],
        api_keys=[*(given["api_key"] or []), *_keys(given["api_key_file"])],
        chat_template=None if template is None else _read(template, "--chat-template"),
        limits=Limits(**{name: given[name] for name in Limits.__dataclass_fields__}),
        **{name: given[name] for name in _PASSED},
    )
    return run(options, say)


def _public_name(model: str) -> str:
    """Clients see a folder's name, never where it lies."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"serving needs {', '.join(missing)}: pip install 'retort-lm[serve]'"
        )


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    keys = [line.strip() for line in _read(path, "--api-key-file").splitlines() if line.strip()]
    if not keys:
        raise ConfigurationError(f"--api-key-file {path} holds no key")
    return keys


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigurationError(f"{flag} {path}: {reason}") from None
