"""Results of `retort bench decode` as Markdown tables.

python bench/table.py results/decode-*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HEAD = (
    "| batch | arm | tokens/s | ratio [95 %] | tokens a step | padding | accepted / drafted "
    "| rows drafted for | equal |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        data = json.loads(file.read_text("utf-8"))
        for category in dict.fromkeys(category_of(data, row) for row in data["results"]):
            rows = [row for row in data["results"] if category_of(data, row) == category]
            print(f"\n{title(data['provenance'], category, rows)}\n\n{HEAD}")
            for row in rows:
                print(line(row))


def category_of(data: dict, row: dict) -> str:
    """Older files have one category, in their arguments."""
    return row.get("category") or data["provenance"]["arguments"]["category"] or "all"


def title(record: dict, category: str, results: list[dict]) -> str:
    told, machine = record["arguments"], record["platform"]
    rates = sorted({round(row["bandwidth"]) for row in results})
    return (
        f"`{category}` prompts of at most {told['prompt_tokens']} tokens, "
        f"{told['max_new_tokens']} new, median of {told['repeats']} interleaved repeats; "
        f"{machine.get('processor')}, {told['threads']} threads, read bandwidth "
        f"{rates[0]}–{rates[-1]} GB/s; torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}."
    )


def _batch(row: dict) -> str:
    """With the number of prompts where some had to wait for a place."""
    size, prompts = row["batch_size"], row.get("prompts", row["batch_size"])
    return f"{size}" if prompts == size else f"{size} of {prompts}"


def _drafted(row: dict) -> str:
    """Older files do not know."""
    return f"{row['drafted_rows']} of {row['prompts']}" if "drafted_rows" in row else ""


def line(row: dict) -> str:
    interval = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return (
        f"| {_batch(row)} | {row['arm']} | {row['tokens_per_second']:.0f} | {interval} "
        f"| {row['tokens_per_step']:.2f} | {row['padding_share']:.0%} "
        f"| {row['accepted_tokens']} / {row['draft_tokens']} | {_drafted(row)} "
        f"| {'yes' if row['equal_to_plain'] else 'no'} |"
    )


if __name__ == "__main__":
    main()
