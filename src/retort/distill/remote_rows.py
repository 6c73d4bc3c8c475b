"""Rows whose completions a teacher behind a URL writes before training: SeqKD without its weights.

The texts are kept in a file as `remote.write_texts` describes, so that a killed run, and other
runs, go on with it. Only text is exchanged, so that the teacher's tokenizer may be another one.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from retort.distill.config import DistillConfig
from retort.distill.data import load_rows, tokenize
from retort.distill.encoding import Encoding, prompt_of
from retort.distill.remote import RemoteTeacher, served_model, write_texts

API_KEY = "RETORT_TEACHER_API_KEY"
"""The environment's variable that holds the server's key, which no file of a run may hold."""


Prompt = str | list[dict[str, str]]


def prompts_to_ask(rows: Any, config: DistillConfig, encoding: Encoding) -> list[Prompt]:
    """The prompts of ``rows``, whose completions are not read.

    Raises ConfigurationError for a row whose answer could not be learned.
    """
    asking = replace(encoding, completion=False, whole=False, completion_only=True)
    kept = tokenize(rows, asking, config.dataset_num_proc)["index"]
    return [prompt_of(rows[index], asking) for index in kept]


def answered(prompts: list[Prompt], config: DistillConfig) -> Any:
    """Rows of ``prompts`` with the completions of ``config.teacher_url``.

    Raises ConfigurationError for what `write_texts` refuses; RetortError where the server does
    not answer.
    """
    path = Path(config.teacher_text_file or Path(str(config.output_dir)) / "teacher_text.jsonl")
    with config.main_process_first(desc="asking the teacher"):  # others find the whole file
        write_texts(remote_teacher(config), prompts, path)
    return load_rows(str(path))


def remote_teacher(config: DistillConfig) -> RemoteTeacher:
    """The server as the configuration describes it; greedy, as the local teacher's texts are."""
    url, key = str(config.teacher_url), os.environ.get(API_KEY)
    name = config.teacher_served_model_name or served_model(url, key)
    return RemoteTeacher(url, name, max_tokens=config.max_completion_length, api_key=key)
