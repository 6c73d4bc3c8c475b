"""Results of bench/decode.py as Markdown tables.

python bench/table.py results/decode-*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HEAD = (
    "| batch | arm | tokens/s | ratio [95 %] | tokens a step | padding | accepted / drafted "
    "| equal |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        data = json.loads(file.read_text("utf-8"))
        print(f"\n{title(data['provenance'], data['results'])}\n\n{HEAD}")
        for row in data["results"]:
            print(line(row))


def title(record: dict, results: list[dict]) -> str:
    told, machine = record["arguments"], record["platform"]
    rates = sorted({round(row["bandwidth"]) for row in results})
    return (
        f"`{told['category'] or 'all'}` prompts of at most {told['prompt_tokens']} tokens, "
        f"{told['max_new_tokens']} new, median of {told['repeats']} interleaved repeats; "
        f"{machine.get('processor')}, {told['threads']} threads, read bandwidth "
        f"{rates[0]}–{rates[-1]} GB/s; torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}."
    )


def line(row: dict) -> str:
    interval = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return (
        f"| {row['batch_size']} | {row['arm']} | {row['tokens_per_second']:.0f} | {interval} "
        f"| {row['tokens_per_step']:.2f} | {row['padding_share']:.0%} "
        f"| {row['accepted_tokens']} / {row['draft_tokens']} "
        f"| {'yes' if row['equal_to_plain'] else 'no'} |"
    )


if __name__ == "__main__":
    main()
