"""Capture a teacher once: its top-k predictions of a dataset's completions, to train from later.

A capture is a folder of safetensors shards with a manifest. For each completion token it keeps the
K likeliest ids (uint16 where the vocabulary allows, else int32), their log-probabilities (float16)
and the log of the remaining mass (float32): 4K + 4 bytes, 260 at K = 64 [our choice].

A shard holds a fixed run of rows and is written beside and renamed; its hash is noted at once. A
run that was killed goes on at the first shard that is missing or damaged, and since batches never
cross a shard, the result is the same bits as that of an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from retort.disk import writing
from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.signals import TopKSignal, tokenizer_hash
from retort.distill.teachers import Teacher
from retort.errors import ConfigurationError, RetortError
from retort.manifest import first_fault, read_manifest, sha256, write_manifest
from retort.provenance import Provenance, versions, write_json
from retort.train.checkpoint import LOCK, alone

FORMAT = 1
PROGRESS = "capture.partial.json"
PROVENANCE = "provenance.json"
HEAD_ROWS = 128
DIGEST_BYTES = 16

Rows = Sequence[dict[str, Any]]
"""Tokenised rows with ``prompt_ids`` and ``completion_ids`` (see `retort.distill.data`)."""


@dataclass(frozen=True)
class CaptureSettings:
    """How a capture is made.

    Attributes:
        top_k: K, ids kept of each prediction.
        batch_size: rows of a teacher forward.
        shard_tokens: completion tokens after which a shard is closed; what a killed run loses.

    Raises:
        ConfigurationError: one of them is below 1.
    """

    top_k: int = 64
    batch_size: int = 8
    shard_tokens: int = 16_384

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigurationError(f"{name}={value} is wrong: it must be at least 1")


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
    facts = _facts(model, tokenizer, rows, settings, name)
    if _is_finished(folder, facts):
        return folder
    _require_ours(folder)
    with writing(folder), alone(folder):
        return _capture(Teacher(model), rows, folder, settings, facts, progress)


def check_folder(
    tokenizer: Any, rows: Rows, folder: str | Path, settings: CaptureSettings, name: str = ""
) -> None:
    """Refuse what `capture` would refuse, as far as that is known without the teacher's weights.

    Raises ConfigurationError; nothing is written.
    """
    folder = Path(folder)
    before = read_manifest(folder) or _begun(folder)
    if before is None:
        _require_ours(folder)
    else:
        _require_same(folder, before, _known(tokenizer, rows, settings, name))


def _capture(
    teacher: Teacher,
    rows: Rows,
    folder: Path,
    settings: CaptureSettings,
    facts: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Write what is missing, in a folder that no other run writes to."""
    if _is_finished(folder, facts):  # by a run that held it until now
        return folder
    done, finished = _begin(folder, facts), 0
    for number, part in enumerate(_shards(rows, settings.shard_tokens)):
        shard = f"shard-{number:05d}.safetensors"
        if not _is_whole(folder / shard, done.get(shard)):
            _write_shard(folder / shard, _captured(teacher, [rows[i] for i in part], settings))
            done[shard] = sha256(folder / shard)
            write_json(folder / PROGRESS, {**facts, "shards": done})
        finished += len(part)
        if progress is not None:
            progress(finished, len(rows))
    return _finish(folder, facts)


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


def digest(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """Sixteen bytes that name a tokenised row, wherever it stands in a dataset."""
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for ids in (prompt_ids, completion_ids):
        made.update(len(ids).to_bytes(8, "little"))
        made.update(torch.tensor(list(ids), dtype=torch.int64).numpy().tobytes())
    return made.digest()


def data_hash(rows: Rows) -> str:
    """Hash of all rows in their order, hexadecimal."""
    made = hashlib.sha256()
    for row in rows:
        made.update(digest(row["prompt_ids"], row["completion_ids"]))
    return made.hexdigest()


# The teacher's predictions


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


# The folder


def _facts(
    model: Any, tokenizer: Any, rows: Rows, settings: CaptureSettings, name: str
) -> dict[str, Any]:
    """What a capture is of; equal facts give equal bits."""
    return {
        **_known(tokenizer, rows, settings, name),
        "teacher_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "vocab_size": model.config.get_text_config().vocab_size,
    }


def _known(tokenizer: Any, rows: Rows, settings: CaptureSettings, name: str) -> dict[str, Any]:
    """The facts that need no model."""
    return {
        "format": FORMAT,
        "teacher": name,
        "tokenizer": tokenizer_hash(tokenizer),
        "data": data_hash(rows),
        "rows": len(rows),
        "tokens": sum(len(row["completion_ids"]) for row in rows),
        **vars(settings),
        "versions": versions(("torch", "transformers", "safetensors")),
    }


def fingerprint(model: Any) -> str:
    """Hash of every parameter's name, shape and bytes: another checkpoint differs."""
    made = hashlib.sha256()
    for name, value in model.named_parameters():
        made.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        made.update(flat.view(torch.uint8).numpy())
    return made.hexdigest()


def _is_finished(folder: Path, facts: dict[str, Any]) -> bool:
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return False
    _require_same(folder, manifest, facts)
    fault = first_fault(folder, full=True)
    if fault is not None:
        raise ConfigurationError(f"{folder} is damaged: {fault}; delete it and capture again")
    (folder / PROGRESS).unlink(missing_ok=True)
    return True


def _begin(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Hashes of the shards that are there; claims an empty folder."""
    before = _begun(folder)
    if before is not None:
        _require_same(folder, before, facts)
        return before["shards"]
    write_json(folder / PROGRESS, {**facts, "shards": {}})
    return {}


def _begun(folder: Path) -> dict[str, Any] | None:
    """What an unfinished capture has noted, None where there is none."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        return {**before, "shards": dict(before["shards"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{path} is damaged: delete {folder}") from error


def _require_ours(folder: Path) -> None:
    """Refuse a folder of something else, before anything is put there."""
    if not folder.is_dir() or (folder / PROGRESS).is_file():
        return
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty and holds no capture: name another folder")


def _require_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise ConfigurationError(
                f"{folder} holds a capture with {key}={before.get(key)!r}, this one has "
                f"{value!r}: name another folder, or give the same inputs"
            )


def _is_whole(path: Path, expected: str | None) -> bool:
    return expected is not None and path.is_file() and sha256(path) == expected


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:  # `save_file` would leave a file of its own when killed
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _finish(folder: Path, facts: dict[str, Any]) -> Path:
    for left in folder.glob(".*.partial"):
        left.unlink()
    provenance = Provenance.collect({k: v for k, v in facts.items() if k != "versions"})
    write_json(folder / PROVENANCE, provenance.to_dict())
    write_manifest(folder, facts, skip=(PROGRESS, PROVENANCE, LOCK))
    (folder / PROGRESS).unlink()
    return folder
