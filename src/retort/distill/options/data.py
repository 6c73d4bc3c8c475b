"""Which rows are learned from and evaluated on, and how they become ids."""

from __future__ import annotations

from dataclasses import dataclass

from retort.train.arguments import say


@dataclass
class DataOptions:
    """Files, columns, lengths and packing."""

    dataset_name: str | None = say(
        None, "JSONL or Parquet file, folder, or hub name; rows: messages, or prompt + completion."
    )
    dataset_config: str | None = say(None, "Configuration of a hub dataset.")
    dataset_train_split: str = say("train", "Split to train on.")
    dataset_test_split: str | None = say(None, "Split of dataset_name to evaluate on.")
    eval_dataset_name: str | None = say(None, "Another file, folder or name to evaluate on.")
    max_train_rows: int | None = say(None, "Train on the first rows only.")
    max_eval_rows: int | None = say(None, "Evaluate on the first rows only.")
    predict_with_generate: bool = say(
        False, "Evaluation answers its prompts too (greedy) and logs ROUGE-L and distinct n-grams."
    )
    report_samples: int = say(
        3, "Prompts answered before and after training, for the report; 0: none."
    )
    report_sample_tokens: int = say(48, "Most tokens of such an answer.")
    dataset_num_proc: int | None = say(None, "Processes that tokenise.")
    skip_long_prompts: bool = say(
        False, "Leave out rows whose prompt leaves no room in max_length, instead of refusing them."
    )
    completion_only_loss: bool = say(
        True, "Learn the completion only; false: the prompt too (methods without student text)."
    )
    as_chat: bool = say(False, "Wrap prompts that are plain text as a user's chat message.")
    max_length: int = say(
        1024, "Most tokens of prompt + completion; longer completions are cut, prompts refused."
    )
    packing: bool = say(
        False,
        "Several examples of a batch in one row of at most max_length tokens (no student text).",
    )
