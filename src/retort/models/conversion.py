"""Checkpoints of other formats: the authors' published DenseRetNets, and `convert`.

The authors' checkpoints (`model_type` "DenseGauRetNet") load through the Auto classes without
remote code: a thin configuration and model carry their `model_type`, two names are mapped, and
what the authors store but never read is dropped. Saving such a model writes a plain
`dense_retnet` checkpoint. Mamba checkpoints become DenseMamba with gates of zero, which computes
the same (`retort.models.dense_mamba`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from retort.errors import ConfigurationError, RetortError
from retort.manifest import MANIFEST, sha256, write_manifest
from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM
from retort.provenance import Provenance

RENAMED = {r"\.to_hidden\.0\.": ".vg_proj.", r"\.to_out\.0\.": ".o_proj."}
"""Authors' names to ours; `to_hidden.0` holds v and the gate, as `vg_proj` does."""

UNREAD = (
    r"retnet_rel_pos\.(angle|decay)$",
    r"layers\.0\.self_attn\.[kv]_(select|norm)\.",
)
"""Stored but never read: two constants, and the fusion of layer 0, which has nothing to fuse."""

TARGETS = {"DenseGauRetNet": "dense_retnet", "mamba": "dense_mamba"}
"""What `convert` reads (`model_type` of config.json), and what becomes of it."""

_CARRIED = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
            "vocab.json", "merges.txt", "*.jinja", "LICENSE*", "README.md")  # fmt: skip


class DenseGauRetNetConfig(DenseRetNetConfig):
    """Configuration of a published checkpoint; its keys are ours."""

    model_type = "DenseGauRetNet"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved: that of a `dense_retnet` model."""
        names = {
            "model_type": DenseRetNetConfig.model_type,
            "architectures": [DenseRetNetForCausalLM.__name__],
        }
        return super().to_dict() | names


class DenseGauRetNetForCausalLM(DenseRetNetForCausalLM):
    """DenseRetNet from a published checkpoint."""

    config_class = DenseGauRetNetConfig
    _keys_to_ignore_on_load_unexpected = list(UNREAD)  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a missing or an unknown weight is an error.

        The cache is on whatever the file says: the authors switched it off for training, where
        ours is off by itself, and without it each new token would compute its whole prefix.

        Raises:
            ConfigurationError: the checkpoint lacks weights or holds unknown ones.
        """
        kwargs["key_mapping"] = RENAMED | (kwargs.get("key_mapping") or {})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = None  # saving keeps our names
        model.config.use_cache = model.generation_config.use_cache = True
        return loaded


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    **changes: Any,
) -> dict[str, Any]:
    """Write the checkpoint in the folder ``source`` as one of ours to the folder ``target``.

    The new folder appears whole or not at all, with the tokenizer of the old one and a manifest
    that names the source, its hashes and this program's versions.

    Args:
        source: folder of a "DenseGauRetNet" (becomes `dense_retnet`) or of a "mamba" (becomes
            `dense_mamba`, the same function until it is trained).
        target: must not exist yet, or be empty.
        dtype: of the written weights; "auto" keeps the checkpoint's.
        **changes: of the configuration, for "mamba" only: ``dense_block_layers`` and others.

    Returns:
        What the manifest says, and ``path``, ``model_type`` and ``parameters``.

    Raises:
        ConfigurationError: another kind of checkpoint, weights that do not fit, a target in use.
        RetortError: the source is damaged, pickled or names code.
    """
    old, new = Path(source), Path(target).absolute()
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise ConfigurationError(f"{new} exists and is not an empty folder; name another target")
    model, kind = _converted(old, dtype, changes)
    about = {
        "source": {"folder": old.name, "model_type": kind, "sha256": _hashes(old)},
        "changes": changes,
        "provenance": Provenance.collect({"dtype": str(dtype)}).to_dict(),
    }
    _write(model, old, new, about)
    facts = {"model_type": TARGETS[kind], "parameters": model.num_parameters(), **about}
    return {"path": str(new), **facts}


def _converted(source: Path, dtype: str | torch.dtype, changes: dict[str, Any]) -> tuple[Any, str]:
    from retort.models.dense_mamba import DenseMambaForCausalLM
    from retort.models.loader import checked, parse_dtype

    wanted = parse_dtype(dtype)
    kind = _model_type(Path(checked(str(source))))
    if kind in TARGETS.values():
        raise ConfigurationError(f"{source} holds a {kind} already; it loads as it is")
    if kind not in TARGETS:
        known = ", ".join(f"{old} to {new}" for old, new in TARGETS.items())
        raise ConfigurationError(f"{source} holds a {kind!r}; convert knows {known}")
    if kind != "mamba" and changes:
        raise ConfigurationError(
            f"{', '.join(sorted(changes))} cannot change: {source} holds a trained {kind}, whose "
            "weights fit its own configuration only"
        )
    cls: Any = DenseMambaForCausalLM if kind == "mamba" else DenseGauRetNetForCausalLM
    try:
        with _quiet():
            return cls.from_pretrained(source, dtype=wanted, use_safetensors=True, **changes), kind
    except RetortError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RetortError(f"cannot read {source} as {cls.__name__}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings about the very things that a conversion changes."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _model_type(source: Path) -> str:
    """`model_type` of a folder whose config.json is known to be an object."""
    found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
    return str(found)


def _write(model: Any, old: Path, new: Path, about: dict[str, Any]) -> None:
    """Save beside ``new`` and rename."""
    new.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{new.name}.", dir=new.parent) as work:
        made = Path(work) / "model"
        model.save_pretrained(made)
        for pattern in _CARRIED:
            for path in sorted(old.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, made / path.name)
        write_manifest(made, about)
        made.replace(new)  # an empty folder there gives way


def _hashes(folder: Path) -> dict[str, str]:
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {path.name: sha256(path) for path in files if path.name != MANIFEST}
