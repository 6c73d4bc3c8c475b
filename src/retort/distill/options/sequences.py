"""What is written during training, by whom, and how it is revised."""

from __future__ import annotations

from dataclasses import dataclass

from retort.train.arguments import say


@dataclass
class SequenceOptions:
    """Rollouts, replay, revision."""

    max_completion_length: int = say(512, "N: most tokens that the student writes.")
    lmbda: float | str | None = say(
        None, "Share of distilled sequences that the student writes, or 'adaptive' (DistiLLM's)."
    )
    do_sample: bool | None = say(None, "The student draws its texts; else its likeliest tokens.")
    rollout_temperature: float = say(1.0, "Divides the logits that the student draws from.")
    completions: str | None = say(
        None, "Text that the student did not write: 'dataset' or 'teacher', who writes it once."
    )
    teacher_text_file: str | None = say(
        None, "JSONL file that keeps the teacher's texts for later runs; else in output_dir."
    )
    interleave_top_k: int | None = say(
        None, "K of speculative KD: the teacher replaces student tokens below its K; 0: off."
    )
    rollout_batch_size: int = say(
        16, "Rows that are written at once; a place is refilled when its text ends."
    )
    rollout_drafter: str | None = say(
        None, "'prompt-lookup' speculates while the student writes; the text stays the same."
    )
    rollout_draft_budget: int = say(4, "Drafts a row and step; fixed, so that resume is exact.")
    replay_buffer_size: int | None = say(
        None, "Student sequences that are kept for reuse, the oldest goes first; 0: none."
    )
    replay_share: float = say(0.0, "Share of the student's sequences that come from the buffer.")
    scrg: bool | None = say(None, "Revise the student's sequences at their worst error.")
    scrg_rounds: int = say(1, "Corrections of each sequence.")
    scrg_warmup_steps: float = say(
        0.1, "Optimiser steps before sequences are revised; below 1: a share of all steps."
    )
