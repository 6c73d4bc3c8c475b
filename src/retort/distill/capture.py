"""Capture a teacher once: its top-k predictions of a dataset's completions, to train from later.

A capture is a folder of safetensors shards with a manifest. For each completion token it keeps the
K likeliest ids (uint16 where the vocabulary allows, else int32), their log-probabilities (float16)
and the log of the remaining mass (float32): 4K + 4 bytes, 260 at K = 64 [our choice].

A shard holds a fixed run of rows. A run that was killed goes on at the first one that is missing or
damaged (`capture_folder`), and since batches never cross a shard, the result is the same bits as
that of an unbroken run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from retort.disk import writing
from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.capture_facts import CaptureSettings, Rows, digest, facts_of, known_facts
from retort.distill.capture_folder import (
    add_shard,
    begin,
    begun,
    finish,
    is_finished,
    is_whole,
    require_ours,
    require_same,
)
from retort.distill.signals import TopKSignal
from retort.distill.teachers import Teacher
from retort.errors import ConfigurationError, RetortError
from retort.manifest import read_manifest
from retort.train.checkpoint import alone

HEAD_ROWS = 128


def capture(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    folder: str | Path,
    settings: CaptureSettings | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the teacher ``model``'s signal on ``rows`` into ``folder``, or go on with it.

    Args:
        model: a causal language model; frozen, in evaluation mode afterwards.
        tokenizer: its tokenizer; students must share it.
        rows: tokenised rows; only completions are captured.
        folder: new, empty, or holding an unfinished (or finished) capture of the same inputs.
        settings: sizes.
        name: the teacher's name, for the manifest.
        progress: called with the number of finished rows and of all rows.

    Raises:
        ConfigurationError: no rows, or ``folder`` holds something else or another run writes to it.
        RetortError: a prediction is not finite, or the disk is full; what was captured stays.
    """
    folder, settings = Path(folder), settings or CaptureSettings()
    if not len(rows):
        raise ConfigurationError("there are no rows to capture: give at least one")
    facts = facts_of(model, tokenizer, rows, settings, name)
    if is_finished(folder, facts):
        return folder
    require_ours(folder)
    with writing(folder), alone(folder):
        return _capture(Teacher(model), rows, folder, settings, facts, progress)


def check_folder(
    tokenizer: Any, rows: Rows, folder: str | Path, settings: CaptureSettings, name: str = ""
) -> None:
    """Refuse what `capture` would refuse, as far as that is known without the teacher's weights.

    Raises ConfigurationError; nothing is written.
    """
    folder = Path(folder)
    before = read_manifest(folder) or begun(folder)
    if before is None:
        require_ours(folder)
    else:
        require_same(folder, before, known_facts(tokenizer, rows, settings, name))


def _capture(
    teacher: Teacher,
    rows: Rows,
    folder: Path,
    settings: CaptureSettings,
    facts: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Write what is missing, in a folder that no other run writes to."""
    if is_finished(folder, facts):  # by a run that held it until now
        return folder
    done, finished = begin(folder, facts), 0
    for number, part in enumerate(_shards(rows, settings.shard_tokens)):
        shard = f"shard-{number:05d}.safetensors"
        if not is_whole(folder / shard, done.get(shard)):
            tensors = _captured(teacher, [rows[i] for i in part], settings)
            add_shard(folder, facts, done, shard, tensors)
        finished += len(part)
        if progress is not None:
            progress(finished, len(rows))
    return finish(folder, facts)


def stored(signal: TopKSignal) -> TopKSignal:
    """``signal`` rounded as a capture stores it: compact ids, float16 and a float32 tail."""
    return TopKSignal(
        signal.indices.to(id_type(signal.vocab_size)),
        signal.log_probs_kept.half(),
        signal.log_tail.float(),
        signal.vocab_size,
    )


def id_type(vocab_size: int) -> torch.dtype:
    """What a capture of so many ids stores them as."""
    return torch.uint16 if vocab_size <= 1 << 16 else torch.int32


def _captured(teacher: Teacher, rows: Sequence[dict], settings: CaptureSettings) -> dict:
    """The tensors of a shard; rows of like length are read together."""
    order = sorted(range(len(rows)), key=lambda i: -_length(rows[i]))
    found: list[TopKSignal | None] = [None] * len(rows)
    for start in range(0, len(order), settings.batch_size):
        group = order[start : start + settings.batch_size]
        signals = _batch_signals(teacher, [rows[i] for i in group], settings.top_k)
        for i, signal in zip(group, signals, strict=True):
            found[i] = signal
    kept = [signal for signal in found if signal is not None]
    counts = torch.tensor([0, *(len(signal) for signal in kept)])
    digests = b"".join(digest(row["prompt_ids"], row["completion_ids"]) for row in rows)
    return {
        "ids": torch.cat([signal.indices for signal in kept]),
        "log_probs": torch.cat([signal.log_probs_kept for signal in kept]),
        "log_tail": torch.cat([signal.log_tail for signal in kept]),
        "offsets": counts.cumsum(0),
        "digests": torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(len(rows), -1),
    }


def _batch_signals(teacher: Teacher, rows: Sequence[dict], top_k: int) -> list[TopKSignal]:
    sequences = [
        TrainingSequence(row["prompt_ids"], row["completion_ids"], False, True) for row in rows
    ]
    device = teacher.model.device
    batch = {name: value.to(device) for name, value in build_batch(sequences, 0).items()}
    source = teacher.signal(batch, stream_mask(batch, "distilled"))
    parts = []
    for start in range(0, len(source), HEAD_ROWS):
        dense = source.rows(start, min(start + HEAD_ROWS, len(source)))
        if not dense.logits.isfinite().all():
            raise RetortError(
                "the teacher's logits are not finite: try another dtype; what was captured before "
                "is kept"
            )
        parts.append(stored(dense.top_k(top_k)))
    whole = _joined(parts)
    ends = torch.tensor([len(row["completion_ids"]) for row in rows]).cumsum(0).tolist()
    return [whole.rows(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _joined(parts: Sequence[TopKSignal]) -> TopKSignal:
    return TopKSignal(
        torch.cat([part.indices for part in parts]).cpu(),
        torch.cat([part.log_probs_kept for part in parts]).cpu(),
        torch.cat([part.log_tail for part in parts]).cpu(),
        parts[0].vocab_size,
    )


def _length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def _shards(rows: Rows, tokens: int) -> Iterator[list[int]]:
    """Runs of rows with ``tokens`` completion tokens at least (the last one may have fewer)."""
    part: list[int] = []
    held = 0
    for index in range(len(rows)):
        part.append(index)
        held += len(rows[index]["completion_ids"])
        if held >= tokens:
            yield part
            part, held = [], 0
    if part:
        yield part
