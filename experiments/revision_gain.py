"""Does revising a student's texts (SCRG) bring them nearer to its teacher?

    python experiments/revision_gain.py STUDENT TEACHER VALID.jsonl --output revision-gain.json

The student writes greedily and its texts are revised (`--rounds`); the teacher writes greedily too.
Printed is the change of the texts' mean NLL under the teacher and of excess accumulated error,
with paired bootstrap intervals over prompts. STUDENT may be `cut:N`, the untrained first rival: N
layers of the teacher.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from retort.distill.data import load_rows, tokenize
from retort.distill.encoding import Encoding, end_tokens
from retort.distill.init import cut_layers
from retort.distill.sequences.writers import StudentWriter, WritingSettings
from retort.evaluate.predictions import Example
from retort.evaluate.revision import RevisionGain, revision_gain
from retort.models import zoo
from retort.provenance import Provenance, write_json


def main() -> None:
    """Write, revise, compare, print and keep."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    teacher = zoo.load_model(given.teacher)
    student = _student(given.student, teacher)
    gain = measure(given, student, teacher)
    print(table(gain, given.prompts))
    names = {k: Path(str(vars(given)[k])).name for k in ("student", "teacher", "valid")}
    settings = {**vars(given), **names, "output": None}
    record = Provenance.collect(settings).to_dict() | {"command": []}
    write_json(given.output, {**asdict(gain), "provenance": record})


def measure(given: Any, student: Any, teacher: Any) -> RevisionGain:
    """The comparison over the file's first prompts that fit."""
    tokenizer = zoo.load_tokenizer(given.teacher)
    ends = end_tokens(tokenizer, teacher)
    rows = load_rows(str(given.valid))
    how = Encoding(tokenizer, ends, given.max_length, as_chat=True, skip_long_prompts=True)
    prompts = tokenize(rows, how)["prompt_ids"][: given.prompts]
    settings = WritingSettings(
        ends, given.new_tokens, given.max_length + given.new_tokens, rounds=given.rounds
    )
    own = texts(StudentWriter(student, teacher, settings), prompts)
    revised = texts(StudentWriter(student, teacher, settings), prompts, revise=True)
    guide = texts(StudentWriter(teacher, student, settings), prompts)
    return revision_gain(teacher, student, own, revised, guide)


def texts(writer: StudentWriter, prompts: list[list[int]], revise: bool = False) -> list[Example]:
    """Completions in the order of the prompts."""
    made = writer.write(prompts, revise=revise).texts
    return [(text.prompt, text.tokens) for text in made]


def table(gain: RevisionGain, prompts: int) -> str:
    """Markdown: both measures before and after, and the change."""
    lines = ["| measure | own | revised | change [95 %] | |", "|---|---|---|---|---|"]
    for name, own, revised, change in (
        ("NLL under the teacher", gain.nll_own, gain.nll_revised, gain.nll),
        ("excess accumulated error, %", gain.excess_own, gain.excess_revised, gain.excess),
    ):
        verdict = "separable" if change.separable else "not separable"
        span = f"{change.difference:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        lines.append(f"| {name} | {own:.3f} | {revised:.3f} | {span} | {verdict} |")
    return "\n".join([*lines, "", f"{gain.changed} of {prompts} texts were changed."])


def _student(name: str, teacher: Any) -> Any:
    if name.startswith("cut:"):
        return cut_layers(teacher, int(name.removeprefix("cut:")))
    return zoo.load_model(name)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("valid", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=192, help="of prompts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("revision-gain.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
