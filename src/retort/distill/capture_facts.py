"""What a capture is of: rows, data, tokenizer, teacher and sizes; equal facts give equal bits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retort.distill.signals import tokenizer_hash
from retort.errors import ConfigurationError
from retort.provenance import versions

FORMAT = 1
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


def facts_of(
    model: Any, tokenizer: Any, rows: Rows, settings: CaptureSettings, name: str
) -> dict[str, Any]:
    """What a capture is of; equal facts give equal bits."""
    return {
        **known_facts(tokenizer, rows, settings, name),
        "teacher_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "vocab_size": model.config.get_text_config().vocab_size,
    }


def known_facts(tokenizer: Any, rows: Rows, settings: CaptureSettings, name: str) -> dict[str, Any]:
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
