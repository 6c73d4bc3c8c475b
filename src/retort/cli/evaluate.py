"""``retort evaluate``: one table out of many runs and data sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from retort.cli.output import print_json, print_table, say


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("evaluate")(evaluate)


def evaluate(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs or models, or zoo names.")],
    data: Annotated[list[Path], typer.Option(help="JSONL file; may repeat.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the table, its page and its cells.")
    ] = Path("evaluation"),
    teacher: Annotated[
        str | None, typer.Option(help="Adds acceptance, tokens a step and exposure bias.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The run that others are compared with; else the first.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="Send prompts through the chat template.")
    ] = False,
    draft_length: Annotated[int, typer.Option(min=1, help="Drafts a step, measured.")] = 4,
    seed: Annotated[int, typer.Option(help="Of sampled texts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The whole table as JSON.")] = False,
) -> None:
    """Judge runs on data sets: ROUGE-L, exact match, perplexity, distinct-n, and a teacher's view.

    Rows with 'prompt' are answered; with 'reference' they get ROUGE-L and reference_perplexity,
    with 'answer' exact match of the final number. Rows with 'text' alone get perplexity. A row that
    lacks one of them, or has it empty, is left out of that number, and the table says of how many
    rows it is. Every mean over rows is compared with the baseline's by paired bootstrap.

    A cell is judged once; the same command goes on where a killed one stopped.

    Examples:

        retort evaluate runs/kd runs/mgsr --data dolly_valid.jsonl --as-chat

        retort evaluate runs/a runs/b --data gsm8k.jsonl --teacher smollm2-135m-instruct --json
    """
    from retort.evaluate.comparing import compare
    from retort.evaluate.runs import EvaluationSettings, evaluate_runs
    from retort.provenance import write_json
    from retort.report.comparison import build_comparison

    settings = EvaluationSettings(max_new_tokens, max_prompts, as_chat, draft_length, seed)
    if baseline is not None and baseline not in runs:
        raise typer.BadParameter(f"--baseline {baseline!r} is none of the runs")
    table = evaluate_runs(runs, data, output, settings, teacher, say)
    compared = [asdict(c) for c in compare(table, baseline or runs[0])]
    write_json(output / "evaluation.json", {**table, "comparisons": compared})
    say(f"Wrote {build_comparison(table, compared, output / 'evaluation.html')}")
    if as_json:
        print_json({**table, "comparisons": compared})
        return
    _show(table["cells"], compared)


def _show(cells: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    verdicts = {(c["run"], c["dataset"], c["metric"]): c["verdict"] for c in compared}
    lines = []
    for cell in cells:
        for metric, value in cell["metrics"].items():
            verdict = verdicts.get((cell["run"], cell["dataset"], metric), "")
            shown = "-" if value is None else f"{value:.4g}"
            seed = "-" if cell["seed"] is None else str(cell["seed"])
            rows = f"{cell['scored'][metric]} of {cell['prompts']}"
            lines.append([cell["dataset"], metric, cell["run"], seed, rows, shown, verdict])
    order = sorted(lines, key=lambda line: (line[0], line[1]))
    head = ["data", "metric", "run", "seed", "rows", "value", "against the baseline"]
    print_table(head, order)
