"""A captured teacher (see `capture`) in place of a live one: checked, then read by memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from retort.distill.batch import Batch, sequence_slices
from retort.distill.capture_facts import Rows, data_hash, digest
from retort.distill.capture_files import open_capture
from retort.distill.config import DistillConfig
from retort.distill.losses import IGNORED
from retort.distill.signals import TopKSignal, tokenizer_hash
from retort.distill.teachers import AdapterOffTeacher, Teacher
from retort.errors import ConfigurationError

_READ = ("input_ids", "attention_mask", "position_ids", "targets")


class Capture:
    """The signal of a finished capture, row by row; nothing but its index is held in memory.

    Every file is hashed and looked through when it is opened. Raises ConfigurationError, naming
    file and key, for a capture that is missing, unfinished, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts, self._files = open_capture(self.folder)
        self.vocab_size: int = self.facts["vocab_size"]
        self._places = self._index()

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    @property
    def content(self) -> str:
        """Hash of all shards' hashes: another teacher's capture in the same place differs."""
        hashes = json.dumps(self.facts["files"], sort_keys=True)
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    def check(self, tokenizer: Any, rows: Rows, origin: str) -> None:
        """Refuse a capture of another tokenizer, or one that lacks a row of the data ``origin``."""
        if tokenizer_hash(tokenizer) != self.facts["tokenizer"]:
            raise ConfigurationError(
                f"{self.folder} was captured with another tokenizer than the student's: capture "
                "again, or use the teacher's tokenizer"
            )
        if len(rows) == self.facts["rows"] and data_hash(rows) == self.facts["data"]:
            return
        for place, row in enumerate(rows):
            if digest(row["prompt_ids"], row["completion_ids"]) not in self:
                number = row.get("index", place) + 1  # rows before it may have been left out
                raise ConfigurationError(
                    f"{self.folder} was captured for other data: row {number} of {origin} is not "
                    "in it; capture again with the same data, max_length and chat settings"
                )

    def signal(self, names: Sequence[bytes]) -> TopKSignal:
        """The signals of rows, by `digest`, one after the other; int64 ids, on the CPU."""
        parts = [self._read(*self._places[name]) for name in names]
        ids, log_probs, log_tail = (torch.cat(p) for p in zip(*parts, strict=True))
        return TopKSignal(ids, log_probs, log_tail, self.vocab_size)

    def nothing(self) -> TopKSignal:
        """A signal of no rows."""
        shape = (0, min(self.facts["top_k"], self.vocab_size))
        empty = torch.zeros(shape, dtype=torch.float16)
        return TopKSignal(empty.long(), empty, torch.zeros(0), self.vocab_size)

    def _read(self, shard: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        file = self._files[shard]
        ids, log_probs, tail = (
            file.get_slice(name)[start:stop] for name in ("ids", "log_probs", "log_tail")
        )
        return ids.long(), log_probs, tail

    def _index(self) -> dict[bytes, tuple[int, int, int]]:
        places: dict[bytes, tuple[int, int, int]] = {}
        for shard, file in enumerate(self._files):
            offsets = file.get_tensor("offsets").tolist()
            names = file.get_tensor("digests").numpy()
            for name, a, b in zip(names, offsets, offsets[1:], strict=False):
                places.setdefault(name.tobytes(), (shard, a, b))
        return places


class CapturedTeacher:
    """Answers as `Teacher` does, from a capture; rows that are not in it go to ``live``.

    ``live`` (a `Teacher`) is only needed to evaluate on data that was not captured.
    """

    def __init__(self, capture: Capture, live: Any = None) -> None:
        self.capture, self.live = capture, live
        self._seconds = 0.0

    @property
    def model(self) -> Any:
        """The live teacher's model, None without one."""
        return None if self.live is None else self.live.model

    @property
    def seconds(self) -> float:
        """Time spent reading, and in the live teacher's forwards."""
        return self._seconds + (0.0 if self.live is None else self.live.seconds)

    def signal(self, batch: Batch, mask: Tensor) -> Any:
        """What the teacher predicts at ``mask`` (bool ``[R, T]``), in the batch's order."""
        started = perf_counter()
        names = _names(batch, mask)
        if self.live is not None and any(name not in self.capture for name in names):
            return self.live.signal(batch, mask)
        found = self.capture.signal(names) if names else self.capture.nothing()
        device = mask.device
        self._seconds += perf_counter() - started
        return TopKSignal(
            found.indices.to(device),
            found.log_probs_kept.to(device),
            found.log_tail.to(device),
            found.vocab_size,
        )


def checked_capture(
    config: DistillConfig, tokenizer: Any, train: Any, evaluation: Any, live: bool
) -> Capture | None:
    """The capture that the configuration names, checked against tokenizer and rows.

    Args:
        config, tokenizer: of the run.
        train: tokenised rows.
        evaluation: tokenised rows, a dictionary of such, or None.
        live: there is a teacher beside it, to answer for rows of the evaluation.
    """
    if config.teacher_signal is None:
        return None
    capture = Capture(config.teacher_signal)
    origin = Path(config.dataset_name or "the training data").name
    parts = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    asked = [(train, origin)]
    asked += [] if live else [(rows, "the evaluation data (or name a teacher)") for rows in parts]
    for rows, name in asked:
        if rows is not None:
            capture.check(tokenizer, rows, name)
    return capture


def build_teacher(config: DistillConfig, model: Any, student: Any, capture: Any = None) -> Any:
    """The teacher of a run: captured, live, the student's own base, or None where none is needed.

    ``model`` is the loaded teacher or None; ``student`` may be a PEFT model, whose base teaches
    when nothing else does (see `require_able_base`).
    """
    live = None if model is None else Teacher(model, config.device)
    if capture is not None:
        return CapturedTeacher(capture, live)
    return AdapterOffTeacher(student) if live is None and config.recipe.needs_teacher else live


def require_able_base(config: DistillConfig) -> None:
    """Refuse a method whose teacher writes or revises, for which a base needs its own copy."""
    recipe = config.recipe
    if recipe.scrg or recipe.interleave_top_k or recipe.completions == "teacher":
        raise ConfigurationError(
            f"method={config.method!r}: the student's base model cannot write or revise as well as "
            "teach: set teacher_model_name_or_path to it"
        )


def _names(batch: Batch, mask: Tensor) -> list[bytes]:
    """`digest` of every sequence that has a position in ``mask``: a prompt and a completion."""
    names = []
    parts = {name: batch[name].cpu() for name in _READ if name in batch}
    wanted = mask.cpu()
    for row, place in sequence_slices(parts):
        if not wanted[row, place].any():
            continue
        targets = parts["targets"][row, place]
        counted = (targets != IGNORED).nonzero()[:, 0]
        prompt = parts["input_ids"][row, place][: int(counted[0]) + 1]
        names.append(digest(prompt.tolist(), targets[counted].tolist()))
    return names
