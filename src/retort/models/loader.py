"""The one place where weights and tokenizers are loaded, with a foreign folder's tricks refused.

Safetensors only; remote code only when the caller passed the flag; a configuration cannot name
code; a checkpoint that lacks weights is an error rather than a model with random parts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from retort.errors import ConfigurationError, RetortError
from retort.manifest import MANIFEST, first_fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES["float64"] = torch.float64
_UNREADABLE = (OSError, ValueError, KeyError, StrictDataclassError)  # the last: a wrong type


def load_model(
    where: str,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **keywords: Any,
) -> PreTrainedModel:
    """Load the causal language model at ``where`` (a folder or a hub id) for inference.

    Args:
        where: a local folder or a hub id; zoo names go through `retort.models.zoo.load_model`.
        dtype: ``"auto"``, a torch dtype, or its name.
        device: where the weights go; the CPU by default.
        trust_remote_code: the user's own flag, handed on by name.
        **keywords: passed to ``from_pretrained``.

    Raises:
        ConfigurationError: unknown ``dtype``, no such ``device``, or a keyword that fits nothing.
        RetortError: the folder holds pickles only, links out of itself, damaged or missing
            weights, or a configuration that names code.
    """
    where, wanted = checked(where), parse_dtype(dtype)
    check_device(device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **keywords,
        )
    except RetortError:
        raise
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        raise RetortError(f"cannot load the model {where!r}: {_one_line(error)}") from error
    except (TypeError, AttributeError) as error:
        if not keywords:  # then nobody but us said anything that could be of a wrong type
            raise
        raise ConfigurationError(
            f"cannot load the model {where!r} with the keywords {keywords}: {_one_line(error)}; "
            "correct them, or leave them out"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise RetortError(
            f"the checkpoint {where!r} lacks {len(missing)} weights that the model needs, "
            f"{missing[0]} among them; it belongs to another architecture or was cut short"
        )
    return model.to(device).eval() if device is not None else model.eval()


@dataclass(frozen=True)
class Outline:
    """What is known of a model before its weights are read; the names are those of a model."""

    config: PreTrainedConfig
    generation_config: GenerationConfig


def load_outline(where: str, trust_remote_code: bool = False, **keywords: Any) -> Outline:
    """Load what `load_model` with the same ``keywords`` would, but for the weights.

    Raises:
        RetortError: as `load_model`.
    """
    config = load_config(where, trust_remote_code, **keywords)
    revision = {k: v for k, v in keywords.items() if k == "revision"}
    try:
        return Outline(config, GenerationConfig.from_pretrained(where, **revision))
    except OSError:  # as transformers does where there is no such file
        return Outline(config, GenerationConfig.from_model_config(config))
    except (ValueError, KeyError, TypeError) as error:
        reason = _one_line(error)
        raise RetortError(f"cannot load the generation config of {where!r}: {reason}") from error


def load_config(where: str, trust_remote_code: bool = False, **keywords: Any) -> PreTrainedConfig:
    """Load the configuration at ``where`` alone, to refuse a model before its weights are read.

    Values of the configuration among ``keywords`` win over those of its file.

    Raises:
        RetortError: as `load_model`.
    """
    found, remote = checked(where), trust_remote_code
    try:
        return AutoConfig.from_pretrained(found, trust_remote_code=remote, **keywords)
    except RetortError:
        raise
    except (*_UNREADABLE, TypeError) as error:
        raise RetortError(f"cannot load the config of {where!r}: {_one_line(error)}") from error


def load_tokenizer(where: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer at ``where`` (a folder or a hub id).

    Raises:
        RetortError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetortError(f"cannot load the tokenizer of {where!r}: {_one_line(error)}") from error


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype for its name; ``"auto"`` and dtypes stay.

    Raises:
        ConfigurationError: an unknown name.
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    name = str(dtype).removeprefix("torch.")  # a keyword from JSON may be anything
    if name not in _DTYPES:
        raise ConfigurationError(f"unknown dtype {dtype!r}; one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_device(device: str | torch.device | None) -> None:
    """Find out before weights are read whether ``device`` is there.

    Raises:
        ConfigurationError: no device of that name, or PyTorch cannot use it here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigurationError(f"device {str(device)!r} cannot be used: {reason}") from error


def checked(where: str) -> str:
    """Return ``where`` if nothing in it can run code or is damaged.

    Raises:
        RetortError: names the file or key and the next step.
    """
    folder = Path(where)
    if folder.is_dir():
        _check_files(folder)
    _check_config(where)
    return where


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise RetortError(f"{folder} has no config.json; give the folder of a saved model")
    if (folder / MANIFEST).is_file() and (fault := first_fault(folder)):
        raise RetortError(f"{folder} is damaged: {fault}; fetch or save it again")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
        found = f"only pickled weights ({pickles[0]}), which can run code" if pickles else "none"
        raise RetortError(f"{folder} needs weights in safetensors and has {found}; convert them")
    _check_index(folder)
    for path in weights:
        _check_inside(folder, path)
        _check_safetensors(path)


def _check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RetortError(f"{index} is not a safetensors index: {_one_line(error)}") from error
    for shard in sorted(map(str, shards)):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise RetortError(f"{index} names the shard {shard!r}, which is not in its folder")


def _check_inside(folder: Path, path: Path) -> None:
    """Refuse links that leave the folder; the hub's own cache links to its blobs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    target = path.resolve()
    homes = (folder.resolve(), Path(HF_HUB_CACHE).resolve())
    if not any(target.is_relative_to(home) for home in homes):
        raise RetortError(f"{path} is a link out of its folder, to {target}; copy the file instead")


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise RetortError(
            f"{path} is damaged or not safetensors ({_one_line(error)}); fetch it again"
        ) from error


def _check_config(where: str) -> None:
    try:
        config, _ = PreTrainedConfig.get_config_dict(where)
    except (OSError, ValueError) as error:
        raise RetortError(f"cannot read the config of {where!r}: {_one_line(error)}") from error
    if (named := _kernel_named(config)) is not None:
        raise RetortError(
            f"the config of {where!r} asks to run code from {named!r} for its attention or "
            "experts; remove that key from config.json"
        )


def _kernel_named(config: Any) -> str | None:
    """The repository that some ``…_implementation`` key names, at any depth."""
    if not isinstance(config, dict):
        return None
    for key, value in config.items():
        if key.endswith(("_implementation", "_implementation_internal")):
            names = value.values() if isinstance(value, dict) else (value,)
            foreign = [name for name in names if isinstance(name, str) and "/" in name]
            if foreign:
                return foreign[0]
        elif (inner := _kernel_named(value)) is not None:
            return inner
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
