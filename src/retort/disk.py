"""A disk that is full or read-only, in one line, whichever library met it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retort.errors import RetortError

# safetensors and tokenizers quote the system's error, PyTorch's archives only say that they broke.
_QUOTED = re.compile(r"([^:]+) \(os error \d+\)")
_ARCHIVE = re.compile(r"inline_container\.cc|PytorchStreamWriter|iostream error")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the block cannot write into a RetortError that names ``path``.

    The block must leave older files as they are, and no half of a new one.
    """
    try:
        yield
    except RetortError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise RetortError(
            f"{path} could not be written ({reason}); what was saved before is untouched: make "
            "room there and run the same command again"
        ) from error


def _reason(error: Exception) -> str | None:
    """Why the disk refused, None where ``error`` is about something else."""
    if isinstance(error, OSError):
        return error.strerror  # None: not the system's, e.g. an answer of the hub
    if (quoted := _QUOTED.search(str(error))) is not None:
        return quoted[1].strip()
    return "the disk took only a part" if _ARCHIVE.search(str(error)) else None
