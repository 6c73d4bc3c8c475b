"""The training file of a seed: rows that fit, in an order in which neighbours are equally long.

Dolly's rows differ so much in length that eight at random are 1.9 times as long, padded, as their
tokens. Here rows are shuffled, sorted by length within pools, and cut into groups of a step; the
groups are shuffled. The trainer then reads the file in order, for every method alike.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

from settings import Places, Settings

from retort.distill.data import load_rows, tokenize
from retort.distill.encoding import Encoding, end_tokens
from retort.models import zoo

POOL = 32  # groups that are sorted together


def training_file(seed: int, settings: Settings, places: Places) -> str:
    """The file's path; written once."""
    path = places.work / f"train-seed{seed}.jsonl"
    if not path.is_file():
        places.work.mkdir(parents=True, exist_ok=True)
        ordered = in_groups(fitting_rows(settings, places), settings.rows, seed)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("".join(json.dumps(row) + "\n" for row, _ in ordered), "utf-8")
        part.replace(path)
    return str(path)


def fitting_rows(settings: Settings, places: Places) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows whose completion may be written whole and that are read whole, with their ids."""
    tokenizer = zoo.load_tokenizer(settings.model)
    encoding = Encoding(tokenizer, end_tokens(tokenizer), 10**6, as_chat=True)
    raw = load_rows(str(places.data / "dolly_train.jsonl"))
    raw = raw.select(range(min(settings.train_rows, len(raw))))
    kept = []
    for row, made in zip(raw, tokenize(raw, encoding), strict=True):
        completion, ids = made["completion_ids"], made["prompt_ids"] + made["completion_ids"]
        if len(completion) <= settings.max_completion_length and len(ids) <= settings.max_length:
            kept.append((dict(row), ids))
    return kept


def in_groups(rows: list[Any], size: int, seed: int) -> list[Any]:
    """``rows`` (a row and its ids) by groups of ``size``; what fills no group is left out."""
    draw = random.Random(f"order/{seed}")
    rows = draw.sample(rows, len(rows))
    ordered = []
    for start in range(0, len(rows), POOL * size):
        pool = sorted(rows[start : start + POOL * size], key=lambda row: len(row[1]))
        groups = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        ordered += [row for group in draw.sample(groups, len(groups)) for row in group]
    return ordered
