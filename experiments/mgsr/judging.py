"""Judges a student by ROUGE-L of its greedy answers."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

from settings import SETS, VALIDATION, Places, Settings

from retort.decode.engine import Engine
from retort.evaluate.rouge import rouge_l_scores
from retort.evaluate.texts import generate_texts


def judge(
    model: str | Path, names: tuple[str, ...], prompts: int, settings: Settings, places: Places
) -> dict[str, Any]:
    """Scores of each prompt by file, and what generating took."""
    found: dict[str, Any] = {}
    with Engine.from_pretrained(str(model), max_batch_size=16) as engine:
        for name in names:
            rows = questions(places.data / f"{name}.jsonl", engine.tokenizer, prompts, settings)
            started = time.perf_counter()
            chats = [chat(row["prompt"]) for row in rows]
            made = generate_texts(engine, chats, max_new_tokens=settings.max_new_tokens)
            scores = rouge_l_scores(made.texts, [row["reference"] for row in rows])
            found[name] = {
                "mean": round(sum(scores) / len(scores), 4),
                "scores": [round(score, 2) for score in scores],
                "ids": [row["id"] for row in rows],
                "tokens": [len(ids) for ids in made.token_ids],
                "seconds": round(time.perf_counter() - started, 1),
            }
    return found


def tests(model: str | Path, settings: Settings, places: Places) -> dict[str, Any]:
    """The five test sets and the mean of their means."""
    sets = judge(model, SETS, settings.prompts, settings, places)
    means = [found["mean"] for found in sets.values()]
    return {"average": round(sum(means) / len(means), 4), "sets": sets}


def validation(model: str | Path, settings: Settings, places: Places) -> dict[str, Any]:
    """The validation set, by which learning rates are chosen."""
    names, prompts = (VALIDATION,), settings.validation_prompts
    return judge(model, names, prompts, settings, places)[VALIDATION]


def questions(path: Path, tokenizer: Any, prompts: int, settings: Settings) -> list[dict[str, Any]]:
    """The first prompts of a file that are short enough (fewer where the file has fewer)."""
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        short = (
            row for row in rows if len(tokenizer(row["prompt"]).input_ids) <= settings.prompt_tokens
        )
        return list(islice(short, prompts))


def chat(prompt: str) -> list[dict[str, str]]:
    """A prompt as a user's message."""
    return [{"role": "user", "content": prompt}]
