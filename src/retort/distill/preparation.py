"""What is made and checked before a trainer reads weights: rows as ids, limits, a capture.

Whatever can be refused is refused here, in the order of what it costs: tokenizers, rows, the
capture, the checkpoint that is to be gone on from. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retort.distill.capture_facts import data_hash
from retort.distill.captured import Capture, checked_capture
from retort.distill.config import DistillConfig, fixed_choices
from retort.distill.data import tokenize
from retort.distill.encoding import Encoding, end_tokens
from retort.distill.parts import Models
from retort.distill.remote_rows import answered, prompts_to_ask
from retort.errors import ConfigurationError
from retort.train import checkpoint


@dataclass
class Preparation:
    """Rows of a run and the limits of its texts.

    Attributes:
        train, evaluation: tokenised rows, or None; a dictionary of data sets stays one.
        prompts: what a teacher behind a URL is still to be asked; ``train`` is None until then.
        end_tokens: ids that end a text.
        max_length: most tokens of a sequence.
        vocab_size: ids that both models know, from 0.
        capture: the teacher's captured signal, or None.
    """

    config: DistillConfig
    tokenizer: Any
    end_tokens: tuple[int, ...]
    max_length: int
    vocab_size: int | None = None
    train: Any = None
    evaluation: Any = None
    prompts: Any = None
    capture: Capture | None = None

    def add_rows(self, train: Any, evaluation: Any) -> None:
        """Tokenise what was given; raises ConfigurationError naming a row that does not fit."""
        if isinstance(train, dict):
            raise ConfigurationError(
                f"train_dataset is {sorted(train)}: give one of these data sets"
            )
        self.evaluation = self._tokenized(evaluation, "eval_dataset")
        if train is not None and self.config.teacher_url is not None:
            self.prompts = prompts_to_ask(train, self.config, self._encoding("train_dataset"))
        else:
            self.train = self._tokenized(train, "train_dataset")

    def ask(self) -> None:
        """Let the teacher behind the URL write the training rows, where there is one."""
        if self.prompts is not None:
            self.train = self._tokenized(answered(self.prompts, self.config), "train_dataset")

    def fixed(self) -> dict[str, Any]:
        """What a run and its continuation share; rows and captured signal too, where known."""
        rows = {} if self.train is None else {"train_rows": self._rows}
        signal = {} if self.capture is None else {"captured": f"hash {self.capture.content}"}
        return {**fixed_choices(self.config), **rows, **signal}

    @cached_property
    def _rows(self) -> str:
        return f"{len(self.train)} rows of hash {data_hash(self.train)[:16]}"

    def _tokenized(self, rows: Any, name: str) -> Any:
        if rows is None:
            return None
        if isinstance(rows, dict):
            return {key: self._tokenized(value, f"{name} {key!r}") for key, value in rows.items()}
        return tokenize(rows, self._encoding(name), self.config.dataset_num_proc)

    def _encoding(self, name: str) -> Encoding:
        config, evaluating = self.config, name.startswith("eval")
        origin = (config.eval_dataset_name if evaluating else None) or config.dataset_name or name
        return Encoding(
            tokenizer=self.tokenizer,
            eos_ids=self.end_tokens,
            max_length=self.max_length,
            completion=evaluating or config.recipe.reads_dataset,
            as_chat=config.as_chat,
            skip_long_prompts=config.skip_long_prompts,
            whole=not config.predict_with_generate if evaluating else config.learns_whole_rows,
            completion_only=config.completion_only_loss,
            vocab_size=self.vocab_size,
            origin=Path(origin).name,
        )


def prepare(
    models: Models, tokenizer: Any, train: Any, evaluation: Any, resume_from: Any = None
) -> Preparation:
    """Check all that is known before weights are read, and tokenise the rows.

    Raises ConfigurationError, in one line, for what does not fit together, or does not go on
    from the checkpoint ``resume_from``.
    """
    config = models.config
    models.check_tokenizers(tokenizer)
    models.check_drafter()
    ends = end_tokens(tokenizer, models.outlines[0])
    made = Preparation(config, tokenizer, ends, models.longest_sequence(), models.vocab_size())
    made.add_rows(train, evaluation)
    live = models.outlines[1] is not None
    made.capture = checked_capture(config, tokenizer, made.train, made.evaluation, live)
    if resume_from is not None:
        checkpoint.check_same_run(resume_from, made.fixed())
    return made
