"""What the stages of the demo leave in its folder, and the page made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from retort.provenance import Provenance, write_whole


def write_report(folder: Path, student: Path, settings: dict[str, Any], seed: int) -> Path:
    """All records on one page.

    Args:
        folder: the demo's.
        student: where its trainer worked.
        settings, seed: for the provenance.
    """
    from retort.report import DecodingRow, build, load, save
    from retort.report.records import Heading

    records = replace(
        load(student),
        decoding=[DecodingRow(**row) for row in stored(folder, "drafting")],
        evaluation=_evaluation(folder),
        samples=_samples(folder),
        provenance=Provenance.collect(settings, {"seed": seed}),
        heading=Heading(
            "Retort demo",
            f"{settings['model']} decoded plainly, padded and unpadded; a DenseRetNet student "
            "distilled from it with semantic revision; and the student as its drafter.",
        ),
    )
    save(folder, records)
    return build(folder)


def write_rows(folder: Path, split: str, chats: list, outputs: list) -> None:
    """Prompts and the teacher's answers, as rows to train from or to judge by."""
    rows = [
        {
            "prompt": chat,
            "completion": [{"role": "assistant", "content": output.text}],
            "text": output.text,
            "prompt_ids": output.prompt_token_ids,
            "completion_ids": output.token_ids,
        }
        for chat, output in zip(chats, outputs, strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(folder / f"{split}.jsonl", lambda file: file.writelines(lines))


def read_rows(folder: Path, split: str) -> list[dict]:
    """What `write_rows` wrote."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stored(folder: Path, name: str) -> Any:
    """The result of a finished stage."""
    return json.loads((folder / f"{name}.stage.json").read_text("utf-8"))


def decoding_row(result: Any) -> dict:
    """An `ArmResult` as the report's `DecodingRow`."""
    rows = max(result.row_steps, 1)
    return {
        "arm": result.arm,
        "batch_size": result.batch_size,
        "tokens": result.tokens,
        "seconds": result.tokens / result.tokens_per_second,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_step": result.tokens_per_step,
        "padding_share": result.padding_share,
        "outputs_equal": result.equal_to_plain,
        "draft_tokens": result.draft_tokens,
        "accepted_tokens": result.accepted_tokens,
        "mean_draft_length": result.draft_tokens / rows,
    }


def decoding_line(row: dict) -> str:
    """The same, to be printed."""
    equal = "yes" if row["outputs_equal"] else "NO"
    return (
        f"      {row['arm']:44} {row['tokens_per_second']:7.1f} tokens/s  "
        f"{row['tokens_per_step']:.2f} tokens a step  {row['padding_share']:4.0%} padding  "
        f"equal: {equal}"
    )


def _evaluation(folder: Path) -> list:
    from retort.evaluate.significance import paired_bootstrap
    from retort.report import EvaluationRow

    before, after = stored(folder, "before"), stored(folder, "after")
    change = paired_bootstrap(before["rouge_l"], after["rouge_l"])
    first, last = (sum(x["rouge_l"]) / len(x["rouge_l"]) for x in (before, after))
    return [
        EvaluationRow("rouge_l", first, last, low=change.low, high=change.high),
        EvaluationRow("acceptance", before["acceptance"], after["acceptance"]),
        EvaluationRow(
            "negative log-likelihood",
            before["nll"],
            after["nll"],
            higher_is_better=False,
            note="a token of the teacher's answers, in nats",
        ),
    ]


def _samples(folder: Path) -> list:
    from retort.report import Sample

    before, after = stored(folder, "before")["texts"], stored(folder, "after")["texts"]
    return [
        Sample(row["prompt"][0]["content"], row["text"], old, new)
        for row, old, new in zip(read_rows(folder, "dev"), before, after, strict=True)
    ][:6]
